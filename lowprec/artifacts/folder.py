"""The run folder: one run at a time, every file whole or not there, every step redone only when its inputs changed.

Layout:

    D/.lock                 held with flock by the run that uses D; the kernel drops it when that process dies
    D/<step>.json           {"inputs": {name: digest}, "record": ..., "schema_version": 1}
    D/solved/<group>.safetensors    codes and scales of one group; the inputs' digests stand in its metadata

A file is written to a hidden neighbour, flushed to the disk and renamed over the old one, so that a reader sees the old
or the new content and never a part. Step files are caches: one that is damaged, of another version, or made from other
inputs counts as not there (with a logged line) and is made again. Input files of the user are never treated so.

Left out: locks across machines that share a file system without flock.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote, unquote

from torch import Tensor

from lowprec.artifacts.safetensors_io import load_tensors, tensor_entries, write_safetensors
from lowprec.errors import ArtifactError, ConfigError
from lowprec.formats.base import WEIGHT_FORMATS, QuantizedWeight
from lowprec.records import SCHEMA_VERSION, digest, from_json

LOG = logging.getLogger(__name__)
TEMPORARY = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def explained(path: Path, error: OSError) -> ArtifactError:
    """The user's version of an operating system error while writing `path`: what happened and what to do."""
    if error.errno in _FULL:
        return ArtifactError(path, "the disk is full; free some space or choose another folder, then run again")
    if error.errno in _READ_ONLY:
        return ArtifactError(path, f"cannot be written ({error.strerror}); choose a folder that you may write to")
    return ArtifactError(path, f"cannot be written ({error.strerror or error})")


def require_space(path: Path, needed_bytes: int) -> None:
    """Raises ArtifactError when the file system that holds (or will hold) `path` has less than `needed_bytes` free."""
    present = path.absolute()
    while not present.exists():
        present = present.parent
    free = shutil.disk_usage(present).free
    if free < needed_bytes:
        raise ArtifactError(
            path,
            f"needs {needed_bytes / 1e6:,.1f} MB but only {free / 1e6:,.1f} MB are free; "
            "free some space or choose a folder on another disk",
        )


def atomic_write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Lets `write` fill a temporary neighbour of `path`, then puts it in place; on failure `path` stays as it was.

    Raises:
        ArtifactError: disk full, folder not writable or not there.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        # The cleanup may fail for the same reason as the write; the first error is the one to tell.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explained(path, error) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    atomic_write(path, lambda file: _put(file, text.encode()))


def _put(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def canonical_json(value: Any) -> str:
    """JSON of plain data and records: sorted keys, two blanks of indent, a final newline; NaN is refused."""
    return json.dumps(_plain(value), indent=2, sort_keys=True, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _rebuilt(kind: Any, value: Any) -> Any:
    """`value` as `kind`: a record class, `tuple[Record, ...]`, or None for plain data."""
    if kind is None:
        return value
    if typing.get_origin(kind) is tuple:
        (item, *_) = typing.get_args(kind)
        return tuple(_rebuilt(item, part) for part in value)
    return from_json(kind, json.dumps(value))


class RunFolder:
    """The folder of one run, made if it is not there, locked for as long as this object lives.

    Use it as a context manager, or call `close`.

    Args:
        path: the folder.

    Raises:
        ArtifactError: another run holds the folder, or it cannot be made or written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115 - lives as long as the run
        except FileExistsError as error:
            raise ArtifactError(self.path, "is a file, not a folder; choose another --out") from error
        except OSError as error:
            raise explained(self.path, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise ArtifactError(
                self.path, f"is in use by another run (process {owner}); wait for it to end or choose another --out"
            ) from error
        try:
            self._lock.truncate(0)
            self._lock.write(f"{os.getpid()}\n")
            self._lock.flush()
            for leftover in self.path.rglob(f".*{TEMPORARY}"):
                leftover.unlink()
        except OSError as error:
            self.close()
            raise explained(self.path, error) from error

    def close(self) -> None:
        """Gives the folder free; harmless when called twice."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write_text(self, name: str, text: str) -> Path:
        """Writes D/`name` whole or not at all and returns its path."""
        write_text(self.path / name, text)
        return self.path / name

    def write_step(self, name: str, record: Any, inputs: Mapping[str, str]) -> str:
        """Stores a step's result with the digests of what it was made from.

        Args:
            name: the step; the file is D/`name`.json.
            record: a record, a tuple of records, or plain JSON data.
            inputs: name -> digest of everything that the result depends on.

        Returns:
            The digest of the record, for the next step's inputs.
        """
        whole = {"inputs": dict(inputs), "record": record, "schema_version": SCHEMA_VERSION}
        self.write_text(f"{name}.json", canonical_json(whole))
        return digest(canonical_json(record))

    def read_step(self, name: str, inputs: Mapping[str, str] | None, kind: Any = None) -> Any | None:
        """The stored result of a step, or None when it must be made (again).

        Args:
            name: the step.
            inputs: digests that must equal the stored ones; None takes the result whatever it was made from.
            kind: record class, or `tuple[Record, ...]`; None returns the plain data.
        """
        path = self.path / f"{name}.json"
        if not path.exists():
            return None
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(whole, dict) or whole.get("schema_version") != SCHEMA_VERSION:
                raise ConfigError(f"schema version {SCHEMA_VERSION} expected")
            if inputs is not None and whole["inputs"] != dict(inputs):
                LOG.info("step %s: its inputs have changed, it is made again", name)
                return None
            return _rebuilt(kind, whole["record"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            LOG.warning("step %s: %s cannot be used (%s), it is made again", name, path, error)
            return None

    def write_solved(self, group: str, weights: Mapping[str, QuantizedWeight], inputs: Mapping[str, str]) -> None:
        """Stores the solved layers of one group in D/solved/, with the digests of what they were made from."""
        tensors: dict[str, Tensor] = {}
        for layer, weight in weights.items():
            tensors[f"{layer}.codes"] = weight.codes
            tensors[f"{layer}.scale"] = weight.scale
            if weight.exponents is not None:
                tensors[f"{layer}.exponents"] = weight.exponents
        formats = {layer: weight.format for layer, weight in weights.items()}
        metadata = {
            "inputs": json.dumps(dict(inputs), sort_keys=True),
            "formats": json.dumps(formats, sort_keys=True),
            "content": _content_digest(tensors),
        }
        path = self._solved(group)
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise explained(path.parent, error) from error
        atomic_write(path, lambda file: write_safetensors(file, tensor_entries(tensors), metadata))

    def read_solved(self, group: str, inputs: Mapping[str, str]) -> dict[str, QuantizedWeight] | None:
        """The solved layers of one group, or None when they must be solved (again)."""
        path = self._solved(group)
        if not path.exists():
            return None
        try:
            tensors, metadata = load_tensors(path)
            if metadata.get("inputs") != json.dumps(dict(inputs), sort_keys=True):
                LOG.info("group %s: its inputs have changed, it is solved again", group)
                return None
            if metadata.get("content") != _content_digest(tensors):
                raise ArtifactError(path, "its content does not match its digest")
            return {
                layer: QuantizedWeight(
                    format=WEIGHT_FORMATS[name].name,
                    codes=tensors[f"{layer}.codes"],
                    scale=tensors[f"{layer}.scale"],
                    exponents=tensors.get(f"{layer}.exponents"),
                )
                for layer, name in json.loads(metadata["formats"]).items()
            }
        except (ArtifactError, ConfigError, ValueError, KeyError, OSError) as error:
            LOG.warning("group %s: %s cannot be used (%s), it is solved again", group, path, error)
            return None

    def forget_solved(self, groups: Iterable[str]) -> None:
        """Deletes what is stored of these groups."""
        for group in groups:
            self._solved(group).unlink(missing_ok=True)

    def solved_names(self) -> list[str]:
        """The names of all groups that something is stored of."""
        return sorted(unquote(file.stem) for file in (self.path / "solved").glob("*.safetensors"))

    def _solved(self, group: str) -> Path:
        # Group names may hold characters that a file name may not.
        return self.path / "solved" / f"{quote(group, safe='')}.safetensors"


def _content_digest(tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256()
    for entry in tensor_entries(tensors):
        state.update(f"{entry.name}:{entry.dtype}:{entry.shape};".encode())
        state.update(entry.raw())
    return state.hexdigest()
