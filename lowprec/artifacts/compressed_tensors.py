"""Writes a solved model as a compressed-tensors `mixed-precision` folder, which plain transformers and vLLM load.

Layout of the folder:

    config.json                  the model's, plus `quantization_config`: one config group per scheme, under its name
    model[-0000i-of-0000n].safetensors, model.safetensors.index.json
    generation_config.json, tokenizer files, README.md, probe.safetensors, digests.json (the last three by `finish`)

Everything is checked before a byte is written (`plan_artefact`); then the folder is written beside its place and
renamed into it. One tensor at a time is in memory. Tied embeddings: when the head is quantised and the embedding is
not, the two part (`tie_word_embeddings` false, the embedding stored as it is); otherwise the tie stays, stored once.

Source: github.com/vllm-project/compressed-tensors (configuration classes, packing of codes into int32).
Left out: Conv1D (see `ct_schemes.unsupported` and `own_form`), zero points (there, too), fused experts, sparsity. What
can be said of a KV cache: see `stored_cache`.
"""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import compressed_tensors
import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from lowprec.artifacts.ct_checks import Skeleton, check_layers, check_tensors, skeleton_of
from lowprec.artifacts.ct_schemes import MIXED, PACKED, quantization_scheme, runtime_notes, storage_format
from lowprec.artifacts.folder import explained, require_space, sync_folder, write_text
from lowprec.artifacts.packed import code_shape, pack_codes
from lowprec.artifacts.safetensors_io import TensorEntry, write_safetensors
from lowprec.artifacts.stored_cache import cache_entries, cache_notes, cache_scheme
from lowprec.errors import ArtifactError
from lowprec.formats.base import SCALE_DTYPE, QuantizedWeight
from lowprec.records import RoundedPart, Scheme

SHARD_BYTES = 5_000_000_000
DIGESTS = "digests.json"
OWN_FORM = "lowprec.json"
INDEX = "model.safetensors.index.json"
CONFIG_BYTES = 50_000_000
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArtefactPlan:
    """A checked artefact that is ready to be written.

    Attributes:
        entries: every tensor that will be stored.
        config: the finished content of config.json.
        runtime_notes: what runtimes other than transformers refuse or do differently.
    """

    entries: tuple[TensorEntry, ...]
    config: Any
    quantization: dict[str, Any]
    untied: bool
    runtime_notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenArtefact:
    """What was written: the folder, the bytes of its tensors, and the notes for its model card."""

    path: Path
    weight_bytes: int
    shards: int
    runtime_notes: tuple[str, ...]


def plan_artefact(
    *,
    config: Any,
    tensors: Mapping[str, Tensor],
    solved: Mapping[str, QuantizedWeight],
    schemes: Mapping[str, Scheme],
    input_scales: Mapping[str, float] | None = None,
    fused: Iterable[tuple[str, ...]] = (),
    dtype: torch.dtype = torch.bfloat16,
    cache: Sequence[RoundedPart] = (),
) -> ArtefactPlan:
    """Checks that the parts make an artefact that transformers and vLLM accept, without writing anything.

    Args:
        config: the model's transformers configuration; not changed.
        tensors: name in the model's state dict -> tensor; may read lazily. Tied ones may be left out.
        solved: layer -> its quantised weight [N, K], for every layer whose scheme quantises weights.
        schemes: layer -> scheme; layers that are left out stay as they are.
        input_scales: layer -> scale of its input, a bfloat16 value; for static schemes.
        fused: sets of layers that a runtime fuses, beyond those known by name.
        dtype: what everything that is not quantised is stored in.
        cache: what is rounded of the KV cache.

    Raises:
        UnsupportedError: layers, schemes or shapes that the format or vLLM cannot hold, one reason each.
        ModelError: tensors that are missing, unknown or of the wrong shape.
    """
    scales = dict(input_scales or {})
    skeleton = skeleton_of(config)
    quantized = {layer: scheme for layer, scheme in schemes.items() if scheme.weight is not None}
    check_layers(skeleton, solved, schemes, scales, tuple(fused))
    check_tensors(skeleton, tensors)
    untied = any(f"{layer}.weight" in pair for layer in quantized for pair in skeleton.tied.items())
    entries = [
        *_kept_entries(skeleton, tensors, quantized, dtype, untied),
        *(e for layer, scheme in quantized.items() for e in _layer_entries(layer, scheme, solved[layer])),
        *(_scale_entry(layer, scales[layer]) for layer in quantized if layer in scales),
        *cache_entries(cache),
    ]
    head = any(layer == skeleton.head for layer in quantized)
    return ArtefactPlan(
        entries=tuple(sorted(entries, key=lambda e: e.name)),
        config=model_config(config, untied, dtype),
        quantization=_quantization(quantized, [name for name in skeleton.linears if name not in quantized], cache),
        untied=untied,
        runtime_notes=(*runtime_notes(quantized.values(), head), *cache_notes(cache)),
    )


def _kept_entries(
    skeleton: Skeleton, tensors: Mapping[str, Tensor], quantized: Mapping[str, Scheme], dtype: torch.dtype, untied: bool
) -> list[TensorEntry]:
    entries = []
    for name, (shape, own) in skeleton.tensors.items():
        layer = name.removesuffix(".weight")
        if (name != layer and layer in quantized) or (name in skeleton.tied and not untied):
            continue
        source = name if name in tensors else skeleton.tied[name]
        kept = dtype if own.is_floating_point else own
        entries.append(
            TensorEntry(name=name, dtype=kept, shape=shape, produce=lambda s=source, d=kept: tensors[s].to(d))  # type: ignore[misc]
        )
    return entries


def _layer_entries(layer: str, scheme: Scheme, weight: QuantizedWeight) -> list[TensorEntry]:
    n, k = weight.codes.shape

    def entry(name: str, dtype: torch.dtype, shape: tuple[int, ...], produce: Callable[[], Tensor]) -> TensorEntry:
        return TensorEntry(name=f"{layer}.{name}", dtype=dtype, shape=shape, produce=produce)

    scale = entry("weight_scale", SCALE_DTYPE, tuple(weight.scale.shape), lambda: weight.scale.to(SCALE_DTYPE))
    if storage_format(scheme) != PACKED:
        return [entry("weight", weight.codes.dtype, (n, k), lambda: weight.codes), scale]
    return [
        entry("weight_packed", torch.int32, code_shape(weight.format, n, k), lambda: pack_codes(weight)),
        entry("weight_shape", torch.int64, (2,), lambda: torch.tensor([n, k])),
        scale,
    ]


def _scale_entry(layer: str, scale: float) -> TensorEntry:
    return TensorEntry(
        name=f"{layer}.input_scale",
        dtype=SCALE_DTYPE,
        shape=(1,),
        produce=lambda: torch.tensor([scale], dtype=SCALE_DTYPE),
    )


def _quantization(
    quantized: Mapping[str, Scheme], ignore: Sequence[str], cache: Sequence[RoundedPart]
) -> dict[str, Any]:
    said = cache_scheme(cache)
    if not quantized and said is None:
        return {}
    targets: dict[str, list[str]] = {}
    for layer, scheme in quantized.items():
        targets.setdefault(scheme.name, []).append(layer)
    config = QuantizationConfig(
        config_groups={
            name: quantization_scheme(quantized[layers[0]], sorted(layers)) for name, layers in sorted(targets.items())
        },
        format=MIXED,
        quantization_status="compressed",
        ignore=sorted(ignore),
        kv_cache_scheme=said,
    )
    plain: dict[str, Any] = config.model_dump(mode="json")
    return {**plain, "version": compressed_tensors.__version__}


def model_config(config: Any, untied: bool, dtype: torch.dtype) -> Any:
    """A copy of `config` for weights in `dtype`, without tied embeddings when the two have parted."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    if untied:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
    return config


def _siblings(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def recover(path: Path) -> None:
    """Puts an earlier artefact back where a run was killed between the two renames that replace it."""
    fresh, old = _siblings(path)
    if old.exists() and not path.exists():
        os.replace(old, path)
    for leftover in (fresh, old):
        if leftover.exists():
            shutil.rmtree(leftover)


def write_artefact(
    path: Path | str,
    *,
    config: Any,
    tensors: Mapping[str, Tensor],
    solved: Mapping[str, QuantizedWeight],
    schemes: Mapping[str, Scheme],
    tokenizer: Any = None,
    generation_config: Any = None,
    input_scales: Mapping[str, float] | None = None,
    fused: Iterable[tuple[str, ...]] = (),
    dtype: torch.dtype = torch.bfloat16,
    cache: Sequence[RoundedPart] = (),
    shard_bytes: int = SHARD_BYTES,
    finish: Callable[[Path], None] | None = None,
) -> WrittenArtefact:
    """Writes the artefact at `path`, whole or not at all; an earlier one is replaced only after success.

    Args:
        path: the folder; an existing one must be empty or an earlier artefact.
        tokenizer, generation_config: saved along when given.
        shard_bytes: largest size of one safetensors file (a tensor larger than that gets a file of its own).
        finish: called with the folder before it is put in place, to add probe set, card and digests.
        (the rest: see `plan_artefact`)

    Raises:
        ArtifactError: disk full, folder not writable, or `path` holds something that is no artefact.
        UnsupportedError, ModelError: see `plan_artefact`.
    """
    path = Path(path)
    plan = plan_artefact(
        config=config,
        tensors=tensors,
        solved=solved,
        schemes=schemes,
        input_scales=input_scales,
        fused=fused,
        dtype=dtype,
        cache=cache,
    )

    def fill(folder: Path) -> int:
        shards = _write_weights(folder, plan.entries, shard_bytes)
        write_texts(folder, plan, tokenizer, generation_config)
        if finish is not None:
            finish(folder)
        return shards

    shards = write_folder(path, plan.bytes, fill)
    return WrittenArtefact(path=path, weight_bytes=plan.bytes, shards=shards, runtime_notes=plan.runtime_notes)


def write_folder(path: Path, weight_bytes: int, fill: Callable[[Path], T]) -> T:
    """Lets `fill` make a folder beside `path`, then puts it in place; on failure an earlier artefact stays.

    Raises:
        ArtifactError: disk full, folder not writable, or `path` holds something that is no artefact.
    """
    fresh, old = _siblings(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        _check_place(path)
        require_space(path.parent, weight_bytes + CONFIG_BYTES)
        fresh.mkdir()
        result = fill(fresh)
        sync_folder(fresh)
        _exchange(path, fresh, old)
    except BaseException as error:
        with contextlib.suppress(OSError):
            recover(path)
        if isinstance(error, OSError):
            raise explained(path, error) from error
        raise
    return result


def _check_place(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ArtifactError(path, "is a file, not a folder; choose another name")
    if not any(path.iterdir()):
        return
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        earlier = config["quantization_config"]["quant_method"] == "compressed-tensors"
    except (OSError, ValueError, KeyError, TypeError):
        earlier = False
    # A mix that leaves every layer as it is has no quantization_config; its digests tell that it is ours.
    if not earlier and not any((path / name).exists() for name in (DIGESTS, OWN_FORM)):
        raise ArtifactError(path, "holds files that are no earlier artefact; choose an empty or a new folder")


def _exchange(path: Path, fresh: Path, old: Path) -> None:
    if path.exists():
        os.replace(path, old)
    os.replace(fresh, path)
    sync_folder(path.parent)
    if old.exists():
        shutil.rmtree(old)


def _write_weights(folder: Path, entries: Sequence[TensorEntry], shard_bytes: int) -> int:
    shards: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.bytes
    count = len(shards)
    places: dict[str, str] = {}
    for number, members in enumerate(shards, start=1):
        name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        with open(folder / name, "wb") as file:
            write_safetensors(file, members, {"format": "pt"})
            file.flush()
            os.fsync(file.fileno())
        places.update({entry.name: name for entry in members})
    if count > 1:
        total = sum(entry.bytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return count


def write_texts(folder: Path, plan: ArtefactPlan, tokenizer: Any, generation_config: Any) -> None:
    """Writes config.json, and the files of the tokenizer and of the generation defaults where there are any."""
    plan.config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if plan.quantization:
        stored["quantization_config"] = plan.quantization
    if getattr(plan.config, "tie_word_embeddings", None) is False:
        # A value that equals the class's default is not saved, but other runtimes may know another default.
        stored["tie_word_embeddings"] = False
    write_text(folder / "config.json", json.dumps(stored, indent=2, sort_keys=True) + "\n")
    for part in (generation_config, tokenizer):
        if part is not None:
            part.save_pretrained(folder)
