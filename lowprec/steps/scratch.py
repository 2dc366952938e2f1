"""Tensors that one step keeps on disk for itself: hidden states between blocks, and where it stands.

Everything is written to a temporary name and renamed, so a killed run finds either the old file or the new one.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowprec.artifacts.folder import explained, write_text
from lowprec.errors import ArtifactError


class Scratch:
    """A folder of lists of tensors and small JSON notes, tied to the digest of what it was made from.

    Args:
        path: the folder; made when first written to.
        digest: of the step's inputs; contents of another digest are thrown away.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        if self.note("inputs") != digest:
            self.clear()
            self.set_note("inputs", digest)

    def save(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Stores the list under `name`.

        Raises:
            ArtifactError: the disk is full or not writable.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = self._file(name)
        fresh = file.with_suffix(".new")
        try:
            save_file({f"{i:06d}": t.detach().cpu().contiguous() for i, t in enumerate(tensors)}, fresh)
            os.replace(fresh, file)
        except (OSError, SafetensorError) as error:
            fresh.unlink(missing_ok=True)
            raise ArtifactError(file, f"cannot be written ({error}); free some space, then run again") from error

    def load(self, name: str) -> list[Tensor] | None:
        """The list stored under `name`, None when there is none."""
        file = self._file(name)
        if not file.exists():
            return None
        try:
            stored = load_file(file)
        except SafetensorError as error:
            raise ArtifactError(file, "is damaged; delete its folder and run again") from error
        return [stored[key] for key in sorted(stored)]

    def set_note(self, name: str, value: Any) -> None:
        """Stores a JSON value under `name`."""
        file = self.path / f"{name}.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explained(self.path, error) from error
        write_text(file, json.dumps(value))

    def note(self, name: str) -> Any:
        """The JSON value stored under `name`, None when there is none."""
        file = self.path / f"{name}.json"
        try:
            return json.loads(file.read_text()) if file.exists() else None
        except ValueError as error:
            raise ArtifactError(file, "is damaged; delete its folder and run again") from error

    def forget(self, name: str) -> None:
        """Deletes the list stored under `name`."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        # Names of groups may hold characters that a file name may not.
        return self.path / f"{quote(name, safe='')}.safetensors"

    def clear(self) -> None:
        """Deletes everything."""
        shutil.rmtree(self.path, ignore_errors=True)
