"""Safetensors files: a streaming writer, and a reader of headers that notices every kind of damage.

Layout (https://github.com/huggingface/safetensors, "Format"): eight bytes with the header's length, little endian;
the header, JSON: name -> {dtype, shape, data_offsets}, plus "__metadata__"; the tensors' bytes without gaps.

The library's own writer needs all tensors of a file in memory at once. This one plans the header from dtypes and shapes
alone and asks for one tensor at a time; its output depends on its input only, byte for byte. Reading goes through the
library. Left out: big-endian machines.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowprec.errors import ArtifactError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor to be written: `produce` is called when its turn comes and must return `shape` in `dtype`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    produce: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def raw(self) -> memoryview:
        """The tensor's bytes; ValueError when `produce` does not keep its promise."""
        tensor = self.produce().detach().cpu()
        if tensor.dtype != self.dtype or tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.name}: {tensor.dtype} {tuple(tensor.shape)}, not {self.dtype} {self.shape}")
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says of itself: name -> (dtype, shape), and the metadata."""

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    metadata: dict[str, str]


def tensor_entries(tensors: Mapping[str, Tensor]) -> list[TensorEntry]:
    """Entries of tensors that are in memory already."""
    return [
        TensorEntry(name=name, dtype=t.dtype, shape=tuple(t.shape), produce=lambda t=t: t)  # type: ignore[misc]
        for name, t in sorted(tensors.items())
    ]


def write_safetensors(file: BinaryIO, entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> None:
    """Writes one file, one tensor in memory at a time. OSError of the file passes through."""
    # Wide types first, as the library does, so that every tensor is aligned to its own size.
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in ordered:
        file.write(entry.raw())


def _damaged(path: Path, what: str) -> ArtifactError:
    return ArtifactError(path, f"{what}; get the file again")


def read_header(path: Path) -> Header:
    """Header of the file at `path`, checked against the file's size.

    Raises:
        ArtifactError: missing, truncated, or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, f"is truncated or not a safetensors file ({size} bytes)")
            text = file.read(length)
    except FileNotFoundError as error:
        raise _damaged(path, "is missing") from error
    except OSError as error:
        raise ArtifactError(path, f"cannot be read ({error.strerror})") from error
    try:
        raw = json.loads(text)
        metadata = raw.pop("__metadata__", {})
        tensors = {name: (DTYPES[item["dtype"]], tuple(item["shape"])) for name, item in raw.items()}
        spans = sorted((*item["data_offsets"], name) for name, item in raw.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"has an unreadable safetensors header ({error})") from error
    end = 0
    for start, stop, name in spans:
        dtype, shape = tensors[name]
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise _damaged(path, f"has a header that does not fit its tensor {name}")
        end = stop
    if size != 8 + length + end:
        raise _damaged(path, f"is truncated: {size} bytes, its header promises {8 + length + end}")
    return Header(tensors=tensors, metadata=metadata)


def load_tensors(path: Path, names: Iterable[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (all, or those in `names`) and metadata of the file at `path`.

    Raises:
        ArtifactError: the file is damaged or has no tensor of that name.
    """
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names or header.tensors}, header.metadata
    except SafetensorError as error:
        raise _damaged(path, f"cannot be read ({error})") from error
