"""Checks of an artefact's parts against the model's own skeleton, before anything is written.

The skeleton is the model built from its configuration on the meta device: every name, shape and class, no memory.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lowprec.artifacts.ct_schemes import FUSED_SUFFIXES, PACKED, storage_format, unsupported
from lowprec.errors import ModelError, UnsupportedError
from lowprec.formats.base import ACTIVATION_FORMATS, WEIGHT_FORMATS, QuantizedWeight, as_bfloat16
from lowprec.records import Scheme
from lowprec.registry import closest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Skeleton:
    """Names, shapes and classes of a model.

    Attributes:
        tensors: name in the state dict -> (shape, dtype).
        modules: name -> module, on the meta device.
        linears: names of the nn.Linear modules, in the model's order.
        tied: name of a tied tensor -> name of the tensor that is stored for it.
        unexpected: patterns of names that checkpoints may carry and the model ignores.
        head: name of the layer that makes the logits, or None.
    """

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    modules: dict[str, nn.Module]
    linears: tuple[str, ...]
    tied: dict[str, str]
    unexpected: tuple[str, ...]
    head: str | None


def architecture_of(config: Any) -> Any:
    """The transformers class that `config.architectures` names.

    Raises:
        UnsupportedError: there is none, or this version of transformers does not know it.
    """
    names = getattr(config, "architectures", None) or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise UnsupportedError(
            "the configuration names no architecture that transformers knows",
            (f"architectures is {names or 'missing'}; set it to a class name such as LlamaForCausalLM",),
        )
    return found


def makes_logits(architecture: str) -> bool:
    """Whether a transformers class of that name answers with logits over the next token."""
    return architecture.endswith(("ForCausalLM", "LMHeadModel"))


def skeleton_of(config: Any) -> Skeleton:
    """Builds the skeleton of the model that `config` describes."""
    with torch.device("meta"):
        model = architecture_of(config)(config)
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    return Skeleton(
        tensors={name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()},
        modules=modules,
        linears=tuple(name for name, module in modules.items() if type(module) is nn.Linear),
        tied=dict(getattr(model, "all_tied_weights_keys", None) or {}),
        unexpected=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        head=next((name for name, module in modules.items() if module is head), None) if head is not None else None,
    )


def check_tensors(skeleton: Skeleton, tensors: Mapping[str, Tensor]) -> None:
    """Raises ModelError when tensors are missing, unknown, or of another shape than the configuration says."""
    present = set(tensors)
    missing = [n for n in skeleton.tensors if n not in present and skeleton.tied.get(n) not in present]
    if missing:
        raise ModelError(f"{len(missing)} tensors are missing, the first is {missing[0]}; get the model again")
    for name in sorted(present - set(skeleton.tensors)):
        if not any(re.search(pattern, name) for pattern in skeleton.unexpected):
            raise ModelError(f"unknown tensor {name}: {closest(name, list(skeleton.tensors)[:8])}, ...")
    for name in present & set(skeleton.tensors):
        shape = skeleton.tensors[name][0]
        if tuple(tensors[name].shape) != shape:
            raise ModelError(f"tensor {name} is {list(tensors[name].shape)}, the configuration says {list(shape)}")


def check_layers(
    skeleton: Skeleton,
    solved: Mapping[str, QuantizedWeight],
    schemes: Mapping[str, Scheme],
    input_scales: Mapping[str, float],
    fused: tuple[tuple[str, ...], ...],
) -> None:
    """Raises UnsupportedError with every reason why these layers cannot be stored or would not be loaded as planned."""
    quantized = {layer for layer, scheme in schemes.items() if scheme.weight is not None}
    reasons = [f"{layer}: solved, but no scheme quantises it" for layer in sorted(set(solved) - quantized)]
    reasons += [f"{layer}: has an input scale, but is not quantised" for layer in sorted(set(input_scales) - quantized)]
    for layer, scheme in schemes.items():
        module = skeleton.modules.get(layer)
        if module is None:
            reasons.append(f"{layer}: the model has no such layer; {closest(layer, list(skeleton.linears))}")
        elif scheme.weight is not None:
            reason = unsupported(module, scheme)
            if reason is None and layer not in solved:
                reason = f"planned as {scheme.name}, but not solved"
            if reason is None:
                reason = weight_reason(tuple(module.weight.shape), scheme, solved[layer])  # type: ignore[arg-type]
            if reason is None:
                reason = scale_reason(scheme, input_scales.get(layer))
            if reason:
                reasons.append(f"{layer}: {reason}")
    reasons += _fused_reasons(skeleton, schemes, input_scales, fused)
    if reasons:
        raise UnsupportedError("this model cannot be written as compressed-tensors", tuple(reasons))


def weight_reason(shape: tuple[int, int], scheme: Scheme, weight: QuantizedWeight) -> str | None:
    """Why `weight` cannot be stored for a layer of `shape` [N, K] in `scheme`, or None when it can."""
    n, k = shape
    form = WEIGHT_FORMATS[weight.format]
    codes, scale = weight.codes, weight.scale
    if weight.format != scheme.weight:
        return f"planned as {scheme.name} ({scheme.weight}), solved as {weight.format}"
    if misfit := form.fits(k):
        return misfit
    if tuple(codes.shape) != (n, k) or codes.dtype != form.code_dtype:
        return f"codes are {codes.dtype} {list(codes.shape)}, not {form.code_dtype} {[n, k]}"
    if storage_format(scheme) == PACKED and k * form.bits % 32:
        return f"rows of K = {k} codes of {form.bits} bits do not end with an int32"
    groups = k // (form.group_size or k)
    if tuple(scale.shape) != (n, groups):
        return f"scales are {list(scale.shape)}, not {[n, groups]}"
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        return "has scales that are not positive and finite"
    if not torch.equal(as_bfloat16(scale), scale.to(torch.float32)):
        return "has scales that bfloat16 cannot hold, so what is loaded would not be what was scored"
    return form.refuses(weight)


def scale_reason(scheme: Scheme, scale: float | None) -> str | None:
    """Why `scale` cannot be the input scale of a layer in `scheme`, or None when it can."""
    static = scheme.activation is not None and not ACTIVATION_FORMATS[scheme.activation].dynamic
    if not static:
        return None if scale is None else f"{scheme.name} takes no input scale"
    if scale is None:
        return f"{scheme.name} needs an input scale; calibrate the layer first"
    if not (math.isfinite(scale) and scale > 0):
        return f"has the input scale {scale}, which is not positive and finite"
    if as_bfloat16(torch.tensor(scale, dtype=torch.float64)).item() != scale:
        return f"has the input scale {scale}, which bfloat16 cannot hold; round it before the model is scored"
    return None


def fused_sets(layers: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Sets of `layers` that runtimes fuse, found by their names."""
    known = set(layers)
    found = []
    for suffixes in FUSED_SUFFIXES:
        for layer in layers:
            parent, _, leaf = layer.rpartition(".")
            members = tuple(f"{parent}.{suffix}" for suffix in suffixes)
            if leaf == suffixes[0] and known.issuperset(members):
                found.append(members)
    return found


def _fused_reasons(
    skeleton: Skeleton,
    schemes: Mapping[str, Scheme],
    input_scales: Mapping[str, float],
    fused: tuple[tuple[str, ...], ...],
) -> list[str]:
    reasons = []
    for members in dict.fromkeys([*fused_sets(skeleton.linears), *fused]):
        names = {m: schemes[m].name if m in schemes else "bf16" for m in members}
        if len(set(names.values())) > 1:
            told = ", ".join(f"{m.rpartition('.')[2]} {name}" for m, name in names.items())
            reasons.append(f"{members[0]}: runtimes fuse it with its siblings, which need one scheme ({told})")
        elif len({input_scales.get(m) for m in members}) > 1:
            reasons.append(f"{members[0]}: runtimes fuse it with its siblings, which need one input scale")
    return reasons
