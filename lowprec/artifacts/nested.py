"""Nested weights on disk: an ordinary INT4 artefact, and beside it what its second level needs.

    residual.safetensors
        <layer>.residual   int32 [N, K/8]          residuals, eight to a word, as compressed-tensors packs 4-bit codes
        <layer>.ratio      uint8 [ceil(N G / 4)]   G groups to a row, four to a byte, the first in the lowest two bits:
                                                   where in RATIOS each group's ratio stands
        metadata           form (nested-int4-int8), layers (JSON list), base: the digest of plane 1

The folder without this file is what every reader of such artefacts takes it for: its INT4 model. So a runtime that
knows nothing of levels loads it, and no byte of plane 1 is stored twice. The digest of plane 1 binds the two, and
digests.json lists both: a residual beside other codes would give noise, so it is refused.

Where the INT4 weights have zero points, which compressed-tensors folders do not hold, the artefact is in lowprec's own
form (`lowprec.artifacts.own_form`). Layers of other schemes stay single-level.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from lowprec.artifacts.digests import FILE_NAME as DIGESTS
from lowprec.artifacts.digests import sha256_of, write_digests
from lowprec.artifacts.folder import atomic_write
from lowprec.artifacts.loading import load_artefact, read_back
from lowprec.artifacts.probe import FILE_NAME as PROBE
from lowprec.artifacts.safetensors_io import TensorEntry, load_tensors, read_header, write_safetensors
from lowprec.errors import ArtifactError, ConfigError
from lowprec.formats import QuantizedWeight
from lowprec.formats.base import SCALE_DTYPE
from lowprec.formats.nested import LEVEL_NAMES, LEVELS, NAME, RATIO_BITS, RATIOS, NestedWeight, refuses
from lowprec.ladder import Ladder
from lowprec.records import digest
from lowprec.registry import closest
from lowprec.runtime.nested import nest_
from lowprec.runtime.switch import Switch

RESIDUAL = "residual.safetensors"
AGAIN = "copy the artefact again"
_PER_BYTE = 8 // RATIO_BITS


def with_residual(
    nested: Mapping[str, NestedWeight], then: Callable[[Path], None] | None = None
) -> Callable[[Path], None]:
    """For `write_artefact` and `write_own_form`: finishes a folder by `then`, plane 2, and digests that list it.

    Raises:
        ConfigError: (now) parts that are no nested weight; names the layer.
    """
    for layer, weight in nested.items():
        if reason := refuses(weight):
            raise ConfigError(f"{layer} cannot be stored in two levels: it {reason}")

    def finish(folder: Path) -> None:
        if then is not None:
            then(folder)
        add_residual(folder, nested)

    return finish


def add_residual(folder: Path, nested: Mapping[str, NestedWeight]) -> Path:
    """Writes plane 2 beside the INT4 artefact in `folder`, whose weights must be those of plane 1.

    Raises:
        ArtifactError: the folder holds other codes, or cannot be written.
    """
    stored = read_back(folder)
    for layer, weight in nested.items():
        if layer not in stored or not _equal(stored[layer], weight.base):
            raise ArtifactError(folder, f"does not hold the INT4 codes and scales of {layer} that the residual is for")
    path = folder / RESIDUAL
    metadata = {"form": NAME, "layers": json.dumps(sorted(nested)), "base": _digest({k: stored[k] for k in nested})}
    entries = [entry for layer, weight in sorted(nested.items()) for entry in _entries(layer, weight)]
    atomic_write(path, lambda file: write_safetensors(file, entries, metadata))
    if (folder / DIGESTS).exists():
        write_digests(folder)
    return path


def _equal(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    return one.format == other.format and torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)


def _digest(base: Mapping[str, QuantizedWeight]) -> str:
    """SHA-256 over the codes, zero points and scales of plane 1."""
    state = hashlib.sha256()
    for layer, weight in sorted(base.items()):
        state.update(f"{layer}:{weight.format}:{tuple(weight.codes.shape)};".encode())
        for part in (weight.codes, weight.scale.to(SCALE_DTYPE).view(torch.int16)):
            state.update(part.contiguous().numpy().data)
    return state.hexdigest()


def _expected(layer: str, base: QuantizedWeight) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    n, k = base.codes.shape
    return {
        f"{layer}.residual": (torch.int32, (n, -(-k // 8))),
        f"{layer}.ratio": (torch.uint8, (-(-base.scale.numel() // _PER_BYTE),)),
    }


def _entries(layer: str, weight: NestedWeight) -> list[TensorEntry]:
    producers: list[Callable[[], Tensor]] = [
        lambda: pack_to_int32(weight.residual.cpu(), 4),
        lambda: pack_ratios(weight.ratio),
    ]
    return [
        TensorEntry(name=name, dtype=dtype, shape=shape, produce=produce)
        for (name, (dtype, shape)), produce in zip(_expected(layer, weight.base).items(), producers, strict=True)
    ]


def pack_ratios(ratio: Tensor) -> Tensor:
    """[N, G] int8, values of RATIOS -> [ceil(N G / 4)] uint8."""
    places = torch.searchsorted(torch.tensor(RATIOS, dtype=torch.int8), ratio.flatten().cpu().contiguous())
    filled = torch.nn.functional.pad(places, (0, -len(places) % _PER_BYTE)).view(-1, _PER_BYTE).to(torch.uint8)
    shifts = torch.arange(_PER_BYTE, dtype=torch.uint8) * RATIO_BITS
    return (filled << shifts).sum(1, dtype=torch.uint8)


def unpack_ratios(packed: Tensor, n: int, groups: int) -> Tensor:
    """The inverse of `pack_ratios`: [N, G] int8."""
    shifts = torch.arange(_PER_BYTE, dtype=torch.uint8) * RATIO_BITS
    places = ((packed[:, None] >> shifts) & ((1 << RATIO_BITS) - 1)).flatten()[: n * groups]
    return torch.tensor(RATIOS, dtype=torch.int8)[places.long()].view(n, groups)


def is_nested(path: Path | str) -> bool:
    """Whether the artefact at `path` has a second plane."""
    return (Path(path) / RESIDUAL).exists()


def read_nested(path: Path | str) -> dict[str, NestedWeight]:
    """Layer -> nested weight of an artefact, bit for bit as it was written.

    Raises:
        ArtifactError: there is no second plane, so no level 8; it is damaged; or it belongs to other codes.
    """
    path = Path(path)
    file = path / RESIDUAL
    if not file.exists():
        raise ArtifactError(
            path,
            f"has one plane, so level {LEVELS[0]} alone: {RESIDUAL} is missing; copy it from where the artefact was "
            "made, or make it with lowprec.nest",
        )
    header = read_header(file)
    try:
        form, names = header.metadata["form"], json.loads(header.metadata["layers"])
        bound = header.metadata["base"]
    except (KeyError, ValueError) as error:
        raise ArtifactError(file, f"is no second plane of nested weights ({error}); {AGAIN}") from error
    if form != NAME:
        raise ArtifactError(file, f"is in the form {form!r}, this version reads {NAME}; update lowprec")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ArtifactError(
            file, f"is no second plane of nested weights: its layers are {names!r}, not a list of names; {AGAIN}"
        )
    stored = read_back(path)
    if missing := [name for name in names if name not in stored]:
        raise ArtifactError(file, f"has a residual of {missing[0]}, which the artefact beside it does not; {AGAIN}")
    base = {name: stored[name] for name in names}
    if _digest(base) != bound:
        raise ArtifactError(file, f"does not belong to the INT4 weights beside it; {AGAIN}")
    return {name: _read(file, header.tensors, name, base[name]) for name in names}


def _read(
    file: Path, present: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], layer: str, base: QuantizedWeight
) -> NestedWeight:
    expected = _expected(layer, base)
    for name, kind in expected.items():
        if present.get(name) != kind:
            raise ArtifactError(file, f"has no tensor {name} in {kind[0]} {list(kind[1])}; {AGAIN}")
    tensors = load_tensors(file, expected)[0]
    residual = unpack_from_int32(tensors[f"{layer}.residual"], 4, torch.Size(base.codes.shape))
    ratio = unpack_ratios(tensors[f"{layer}.ratio"], *base.scale.shape)
    weight = NestedWeight(base=base, residual=residual, ratio=ratio)
    if reason := refuses(weight):
        raise ArtifactError(file, f"is damaged: {layer} {reason}; {AGAIN}")
    return weight


def stored_digest(path: Path | str) -> str:
    """What a ladder names this artefact by: a digest of all of its weights, both planes, as they are in its files.

    Raises:
        ArtifactError: it has one plane.
    """
    path = Path(path)
    if not path.is_dir():
        raise ArtifactError(path, "is no folder of an artefact; lowprec calibrate --ladder writes one, as nested/")
    if not is_nested(path):
        raise ArtifactError(path, f"has one plane, so level {LEVELS[0]} alone: {RESIDUAL} is missing")
    files = [file for file in sorted(path.glob("*.safetensors")) if file.name != PROBE]
    return digest(*(f"{file.name}:{sha256_of(file)}" for file in files))


def stored_bits_per_weight(path: Path | str) -> float:
    """Bits that a nested weight takes in the artefact's files, both planes with their scales, ratios and zero points.

    Raises:
        ArtifactError: see `read_nested`.
    """
    path = Path(path)
    weights = {layer: weight.residual.numel() for layer, weight in read_nested(path).items()}
    stored = sum(
        math.prod(shape) * dtype.itemsize
        for file in path.glob("*.safetensors")
        for name, (dtype, shape) in read_header(file).tensors.items()
        if name.rpartition(".")[0] in weights
    )
    return 8 * stored / sum(weights.values())


def level_vectors(ladder: Ladder) -> list[dict[str, int]]:
    """The rungs of a ladder as a switch takes them: group -> level of a nested weight.

    Raises:
        ConfigError: levels that nested weights do not have.
    """
    for level in ladder.levels:
        if level not in LEVEL_NAMES:
            raise ConfigError(f"level {level!r} is none of nested weights: {closest(level, list(LEVEL_NAMES))}")
    return [{group: LEVEL_NAMES[level] for group, level in rung.levels} for rung in ladder.rungs]


def load_nested(
    path: Path | str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    rungs: Sequence[int | Mapping[str, int]] = LEVELS,
    ladder: Ladder | None = None,
) -> tuple[Any, Any, Switch]:
    """Loads a nested artefact as a model that runs in its codes.

    Args:
        path: the artefact's folder.
        dtype: of what is not nested, and of the computation.
        groups, rungs: see `lowprec.runtime.nested.nest_`.
        ladder: the artefact's own, whose groups and rungs are taken then.

    Returns:
        The model in eval mode, its tokenizer or None, and the switch, at its highest rung.

    Raises:
        ArtifactError: see `read_nested` and `load_artefact`.
        ConfigError: groups or rungs that do not fit; a level that does not exist; the ladder of another model, or
            one that does not say which layers its groups have.
    """
    if ladder is not None:
        ladder.check_model(stored_digest(path))
        groups, rungs = dict(ladder.layers), level_vectors(ladder)
        if not groups:
            raise ConfigError("the ladder does not say which layers its groups have: make it by calibrate --ladder")
    nested = read_nested(path)
    model, tokenizer = load_artefact(path, dtype)
    return model, tokenizer, nest_(model, nested, groups=groups, rungs=rungs)
