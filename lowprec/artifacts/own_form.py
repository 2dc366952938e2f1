"""lowprec's own form: for what compressed-tensors cannot hold (GPT-2's Conv1D layers, any plain `nn.Module`).

Layout of the folder:

    lowprec.json           `Manifest`: form, model, revision, and scheme, shape and input scale of every layer
    lowprec.safetensors    <layer>.codes   [N, K] int8 or float8_e4m3fn; of fewer bits int32 words, see
                                           `lowprec.artifacts.packed`
                           <layer>.scale   [N, K/G] bfloat16
                           <layer>.zero    int32 words, for formats with zero points
                           of rows of two widths (`lowprec.formats.rows`): <layer>.rows [N/8] uint8, a bit a row, the
                           lowest first, set where it is INT8; <layer>.fine.codes, .fine.scale, .coarse.codes,
                           .coarse.scale as above, the rows of each kind in their order
    README.md, digests.json, probe.safetensors (by `finish`)

In the form "lowprec" a transformers model is whole: config.json, tokenizer files, and in the same safetensors file all
other tensors under their own names, in their own precision. In the form "lowprec-layers" the rest of the model is the
user's module. The weights are not called model.safetensors, because plain transformers would load that and fill the
quantised layers with random numbers; so it refuses the folder instead. The safetensors metadata has the manifest's
digest, so that files of two artefacts are never taken for one.

Left out: shards, remote code (a model that brings its own is stored as layers), `parametrize`d weights.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from lowprec.artifacts.compressed_tensors import (
    OWN_FORM,
    ArtefactPlan,
    WrittenArtefact,
    model_config,
    write_folder,
    write_texts,
)
from lowprec.artifacts.ct_checks import check_tensors, scale_reason, skeleton_of, weight_reason
from lowprec.artifacts.folder import atomic_write, write_text
from lowprec.artifacts.packed import code_shape, pack_codes, pack_zeros, unpack, zero_shape
from lowprec.artifacts.safetensors_io import (
    TensorEntry,
    load_tensors,
    read_header,
    tensor_entries,
    write_safetensors,
)
from lowprec.errors import ArtifactError, ConfigError, ModelError, UnsupportedError
from lowprec.formats import SCHEMES, WEIGHT_FORMATS, QuantizedWeight, WeightFormat
from lowprec.formats.base import SCALE_DTYPE
from lowprec.formats.rows import FINE, MixedRows
from lowprec.records import SCHEMA_VERSION, ArtefactForm, Scheme, digest, from_json, to_json
from lowprec.registry import closest
from lowprec.runtime.convert import weight_of, weighted_modules

WEIGHTS = "lowprec.safetensors"
BOUND = "lowprec_artefact"
"""Key of the metadata that says which manifest the file belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayer:
    """One quantised layer: its shape [n, k], and the input scale where the scheme's activations are static.

    `tables` are the embeddings that have the same weight.
    """

    name: str
    scheme: Scheme
    n: int
    k: int
    input_scale: float | None
    tables: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The modules whose weight this is."""
        return (self.name, *self.tables)

    def expected(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of its tensors."""
        fmt = WEIGHT_FORMATS[str(self.scheme.weight)]
        if not isinstance(fmt, MixedRows):
            return _pair(self.name, fmt, self.n, self.k)
        fine = fmt.fine_rows(self.n)
        return {
            f"{self.name}.rows": (torch.uint8, (math.ceil(self.n / 8),)),
            **_pair(f"{self.name}.fine", WEIGHT_FORMATS[FINE], fine, self.k),
            **_pair(f"{self.name}.coarse", WEIGHT_FORMATS[fmt.coarse], self.n - fine, self.k),
        }


def _pair(name: str, fmt: WeightFormat, n: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Codes, scales and zero points of [n, k] weights; codes of fewer than 8 bits lie in words."""
    codes = (fmt.code_dtype, (n, k)) if fmt.bits == 8 else (torch.int32, code_shape(fmt.name, n, k))
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{name}.codes": codes,
        f"{name}.scale": (SCALE_DTYPE, (n, k // (fmt.group_size or k))),
    }
    zeros = zero_shape(fmt.name, n, k)
    return found if zeros is None else {**found, f"{name}.zero": (torch.int32, zeros)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What lowprec.json says. `revision` is the `weights_digest` of the model that the codes were made from."""

    form: ArtefactForm
    model: str
    revision: str
    module: str
    layers: tuple[StoredLayer, ...]
    schema_version: int = SCHEMA_VERSION

    @property
    def key(self) -> str:
        """Digest of all of it."""
        return digest(to_json(self))


def form_of(path: Path) -> ArtefactForm:
    """The form of the artefact at `path`; ArtifactError when its lowprec.json is damaged."""
    return read_manifest(path).form if (path / OWN_FORM).exists() else "compressed-tensors"


# Writing


def write_own_form(
    path: Path | str,
    *,
    module: nn.Module,
    name: str,
    revision: str,
    solved: Mapping[str, QuantizedWeight],
    schemes: Mapping[str, Scheme],
    input_scales: Mapping[str, float] | None = None,
    tables: Mapping[str, tuple[str, ...]] | None = None,
    tokenizer: Any = None,
    generation_config: Any = None,
    dtype: torch.dtype | None = None,
    finish: Callable[[Path], None] | None = None,
) -> WrittenArtefact:
    """Writes the artefact at `path`, whole or not at all; an earlier one is replaced only after success.

    Args:
        path: the folder; an existing one must be empty or an earlier artefact.
        module: the model that was solved, with its own weights; not changed.
        name, revision: of the model (`Model.name`, `Model.revision`).
        solved: layer -> its quantised weight [N, K], for every layer whose scheme quantises weights.
        schemes: layer -> scheme; layers that are left out stay as they are.
        input_scales: layer -> scale of its input, a bfloat16 value; for static schemes.
        tables: layer -> the embeddings that are tied to it and take its codes.
        tokenizer, generation_config: saved along with a whole model.
        dtype: what everything that is not quantised is stored in; None: in the dtype that it has.
        finish: called with the folder before it is put in place, to add probe set, card and digests.

    Returns:
        Where it lies; `weight_bytes` counts the codes, the scales and every tensor of the model that stays, be it in
        the file or in the user's module.

    Raises:
        UnsupportedError: layers or codes that cannot be stored, one reason each.
        ArtifactError: disk full, folder not writable, or `path` holds something that is no artefact.
    """
    path, scales, shared = Path(path), dict(input_scales or {}), dict(tables or {})
    layers = tuple(
        StoredLayer(
            name=layer, scheme=scheme, n=n, k=k, input_scale=scales.get(layer), tables=tuple(shared.get(layer, ()))
        )
        for layer, scheme, (n, k) in _checked(module, solved, schemes, scales)
    )
    config = _config_of(module)
    kept, untied = _kept(module, [name for layer in layers for name in layer.names], whole=config is not None)
    form: ArtefactForm = "lowprec-layers" if config is None else "lowprec"
    manifest = Manifest(form=form, model=name, revision=revision, module=type(module).__name__, layers=layers)
    codes = [entry for layer in layers for entry in _entries(layer, solved[layer.name])]
    others = tensor_entries({name: _in_dtype(tensor, dtype) for name, tensor in kept.items()})
    plan = ArtefactPlan(
        entries=tuple(codes if config is None else [*codes, *others]),
        config=None if config is None else model_config(config, untied, dtype or config.dtype),
        quantization={},
        untied=untied,
        runtime_notes=(),
    )

    def fill(folder: Path) -> None:
        atomic_write(folder / WEIGHTS, lambda file: write_safetensors(file, plan.entries, {BOUND: manifest.key}))
        write_text(folder / OWN_FORM, to_json(manifest))
        if config is not None:
            write_texts(folder, plan, tokenizer, generation_config)
        if finish is not None:
            finish(folder)

    write_folder(path, plan.bytes, fill)
    size = sum(entry.bytes for entry in [*codes, *others])
    return WrittenArtefact(path=path, weight_bytes=size, shards=1, runtime_notes=())


def _in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.detach().to(dtype)


def _checked(
    module: nn.Module,
    solved: Mapping[str, QuantizedWeight],
    schemes: Mapping[str, Scheme],
    scales: Mapping[str, float],
) -> list[tuple[str, Scheme, tuple[int, int]]]:
    """The quantised layers with their shapes; UnsupportedError with every reason why they cannot be stored."""
    known = weighted_modules(module)
    quantised = {layer: scheme for layer, scheme in schemes.items() if scheme.weight is not None}
    reasons = [f"{layer}: solved, but no scheme quantises it" for layer in sorted(set(solved) - set(quantised))]
    found = []
    for layer, scheme in quantised.items():
        if layer not in known:
            reasons.append(f"{layer}: the model has no such layer; {closest(layer, list(known))}")
        elif layer not in solved:
            reasons.append(f"{layer}: planned as {scheme.name}, but not solved")
        else:
            n, k = weight_of(known[layer]).shape
            reason = weight_reason((n, k), scheme, solved[layer]) or scale_reason(scheme, scales.get(layer))
            reasons += [f"{layer}: {reason}"] if reason else []
            found.append((layer, scheme, (n, k)))
    if reasons:
        raise UnsupportedError("this model cannot be written in lowprec's own form", tuple(reasons))
    return found


def is_whole(module: nn.Module) -> bool:
    """Whether an artefact of `module` holds all of it, so that other weights than the rounded may differ from it."""
    return _config_of(module) is not None


def _config_of(module: nn.Module) -> Any:
    """The configuration from which transformers rebuilds exactly `module`, or None."""
    name = type(module).__name__
    if not isinstance(module, transformers.PreTrainedModel) or getattr(transformers, name, None) is not type(module):
        return None
    config = copy.deepcopy(module.config)
    config.architectures, config.dtype = [name], module.dtype
    try:
        check_tensors(skeleton_of(config), module.state_dict())
    except ModelError:
        # The user has changed its layers; then the configuration does not tell all of it.
        return None
    return config


def _kept(module: nn.Module, quantised: Iterable[str], whole: bool) -> tuple[dict[str, Tensor], bool]:
    """What stays of the model, tied tensors once, and whether a quantised weight parts from a tensor that stays."""
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    if whole:
        named = module.state_dict(keep_vars=True)
    replaced = {f"{layer}.weight" for layer in quantised}
    kept: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in named.items():
        if name not in replaced:
            kept.setdefault(id(tensor), (name, tensor))
    return dict(kept.values()), any(id(named[name]) in kept for name in replaced)


def _entries(layer: StoredLayer, weight: QuantizedWeight) -> list[TensorEntry]:
    fmt = WEIGHT_FORMATS[weight.format]
    if isinstance(fmt, MixedRows):
        rows, fine, coarse = fmt.split(weight)
        produced = [lambda: _bits(rows), *_producers(fine), *_producers(coarse)]
    else:
        produced = _producers(weight)
    return [
        TensorEntry(name=name, dtype=dtype, shape=shape, produce=produce)
        for (name, (dtype, shape)), produce in zip(layer.expected().items(), produced, strict=True)
    ]


def _producers(weight: QuantizedWeight) -> list[Callable[[], Tensor]]:
    fmt = WEIGHT_FORMATS[weight.format]
    made = [lambda: pack_codes(weight) if fmt.bits < 8 else weight.codes, lambda: weight.scale.to(SCALE_DTYPE)]
    return made if fmt.symmetric else [*made, lambda: pack_zeros(weight)]


def _bits(rows: Tensor) -> Tensor:
    """[N] bool -> [ceil(N / 8)] uint8, the first row in the lowest bit."""
    return torch.from_numpy(np.packbits(rows.numpy(), bitorder="little"))


def _rows(bits: Tensor, n: int) -> Tensor:
    """The inverse of `_bits`."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=n, bitorder="little").astype(bool))


# Reading


def read_manifest(path: Path) -> Manifest:
    """What lowprec.json in the folder `path` says; ArtifactError when it is missing, damaged or of another version."""
    file = path / OWN_FORM
    try:
        manifest = from_json(Manifest, file.read_text(encoding="utf-8"))
        sound = all(SCHEMES.get(x.scheme.name) == x.scheme and min(x.n, x.k) > 0 for x in manifest.layers)
    except FileNotFoundError as error:
        raise ArtifactError(file, "is missing; it is no artefact of lowprec's own form") from error
    except (ConfigError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ArtifactError(file, f"cannot be used ({error}); copy the artefact again or update lowprec") from error
    if not sound:
        raise ArtifactError(file, "names schemes or shapes that this version does not know; update lowprec")
    return manifest


def read_own_form(path: Path) -> tuple[Manifest, dict[str, QuantizedWeight]]:
    """The manifest, and codes and scales of every quantised layer as they were solved.

    Raises:
        ArtifactError: missing or damaged files, or files of two artefacts.
    """
    manifest = read_manifest(path)
    file = path / WEIGHTS
    header = read_header(file)
    if header.metadata.get(BOUND) != manifest.key:
        raise ArtifactError(file, f"does not belong to the {OWN_FORM} beside it; copy the artefact again")
    solved = {}
    for layer in manifest.layers:
        expected = layer.expected()
        for name, kind in expected.items():
            if header.tensors.get(name) != kind:
                raise ArtifactError(file, f"has no tensor {name} in {kind[0]} {list(kind[1])}; copy the artefact again")
        weight = _weight(layer, load_tensors(file, expected)[0], file)
        reason = weight_reason((layer.n, layer.k), layer.scheme, weight) or scale_reason(
            layer.scheme, layer.input_scale
        )
        if reason:
            raise ArtifactError(file, f"is damaged: {layer.name} {reason}; copy the artefact again")
        solved[layer.name] = weight
    return manifest, solved


def _weight(layer: StoredLayer, tensors: Mapping[str, Tensor], file: Path) -> QuantizedWeight:
    name = str(layer.scheme.weight)
    fmt = WEIGHT_FORMATS[name]
    if not isinstance(fmt, MixedRows):
        return _one(layer.name, name, tensors, layer.k)
    rows = _rows(tensors[f"{layer.name}.rows"], layer.n)
    if int(rows.sum()) != fmt.fine_rows(layer.n):
        raise ArtifactError(file, f"is damaged: {layer.name} has {int(rows.sum())} INT8 rows; copy the artefact again")
    kinds = (("fine", FINE), ("coarse", fmt.coarse))
    fine, coarse = (_one(f"{layer.name}.{kind}", f, tensors, layer.k) for kind, f in kinds)
    return fmt.joined(rows, fine, coarse)


def _one(prefix: str, fmt: str, tensors: Mapping[str, Tensor], k: int) -> QuantizedWeight:
    codes, scale = tensors[f"{prefix}.codes"], tensors[f"{prefix}.scale"].to(torch.float32)
    if WEIGHT_FORMATS[fmt].bits < 8:
        return unpack(fmt, codes, tensors.get(f"{prefix}.zero"), scale, k)
    return QuantizedWeight(format=fmt, codes=codes, scale=scale)


def kept_tensors(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors that are not quantised, under the names of the model's state dict."""
    codes = {name for layer in manifest.layers for name in layer.expected()}
    return load_tensors(path / WEIGHTS, [n for n in read_header(path / WEIGHTS).tensors if n not in codes])[0]
