"""The KV cache as groups of a plan: what a decoder stores of each token, found by running it, and what that costs.

A trace tells which module hands keys and values of which shape to which layer of the cache; no architecture is known by
name. Keys and values of each layer are groups of their own where every token's heads have scales of their own: keys of
the first layers, where a few channels are always large, stand it worst by far, and values hardly notice. A static
format is one group for the whole model: that is all that `kv_cache_scheme` of a checkpoint can say, and what runtimes
compute with.

Layers that keep a window of tokens or a state stay as they are: what they keep does not grow with the context.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, cache_utils

from lowprec.errors import ModelError, UnsupportedError
from lowprec.formats import CACHE_FORMATS
from lowprec.formats.base import as_bfloat16
from lowprec.records import CacheGroup, CachePart, CachePlace, RoundedPart, Workload
from lowprec.runtime.kvcache import PARTS, by_layer, cache_argument
from lowprec.runtime.request_cache import fit_layers
from lowprec.runtime.serving_cache import tap_cache
from lowprec.steps.measure import run_through
from lowprec.steps.stream import Override, Stream
from lowprec.transforms import Merge

WHOLE = "kv_cache"
REMEDY = "give --kv-cache none: the cache then stays as the model computes it"
Place = tuple[str, CachePart]
"""(attention module, part)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """The groups of a model's cache, the format that each of them may have, and the scales of a static one.

    `scales` has (module, part, scales), a single one where the format has one for all channels; `left` says why layers
    are in no group.
    """

    groups: tuple[CacheGroup, ...] = ()
    format: str = ""
    scales: tuple[tuple[str, CachePart, tuple[float, ...]], ...] = ()
    left: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The groups' names, as the model runs."""
        return [group.name for group in self.groups]

    @property
    def modules(self) -> list[str]:
        """The attention layers, in order."""
        return list(dict.fromkeys(place.module for group in self.groups for place in group.places))

    def inside(self, wanted: Callable[[str], bool]) -> "Caches":
        """The groups with those of their places alone whose attention layer is `wanted`."""
        groups = (replace(g, places=tuple(p for p in g.places if wanted(p.module))) for g in self.groups)
        return replace(self, groups=tuple(group for group in groups if group.places))

    def at(self, module: str, part: CachePart) -> tuple[CachePlace, RoundedPart] | None:
        """A part of an attention layer, and how it may be rounded; None where it is in no group."""
        for group in self.groups:
            for place in group.places:
                if (place.module, place.part) == (module, part):
                    return place, self._rounded(place)
        return None

    def _rounded(self, place: CachePlace) -> RoundedPart:
        found = next((s for module, part, s in self.scales if (module, part) == (place.module, place.part)), ())
        rounded = RoundedPart(module=place.module, layer=place.layer, part=place.part, format=self.format)
        by_channel = CACHE_FORMATS[self.format].by_channel
        return replace(rounded, **({"scales": found} if by_channel else {"scale": found[0]})) if found else rounded

    def parts(self, schemes: Mapping[str, str]) -> tuple[RoundedPart, ...]:
        """What is rounded where `schemes` (group -> scheme) hold, by layer, keys before values."""
        rounded = [p for g in self.groups if schemes.get(g.name) == self.format for p in g.places]
        return tuple(self._rounded(p) for p in sorted(rounded, key=lambda p: (p.layer, p.part)))

    def behind(self, merges: Sequence[tuple[Merge, Tensor]]) -> "Caches":
        """The same once scales are merged into the model: values whose channel c is divided by 2^e[c] have scales that
        are, too, so their codes stay; a scale for all channels grows with the one that grows most.
        """
        by_channel = bool(self.format) and CACHE_FORMATS[self.format].by_channel
        scales = list(self.scales)
        for merge, exponents in merges:
            share = torch.exp2(-exponents.float())
            if not by_channel:
                share = share.max().clamp_min(1.0)[None]
            for index, (module, part, found) in enumerate(scales):
                if part == "values" and merge.source.startswith(f"{module}."):
                    scales[index] = (module, part, tuple((torch.tensor(found) * share).tolist()))
        return replace(self, scales=tuple(scales))

    def overlay(self, schemes: Mapping[str, str]) -> dict[str, Override]:
        """What attention sees where `schemes` hold, for a `Stream`."""
        found = by_layer(self.parts(schemes)).values()
        return {next(iter(r.values())).module: Override(weight=None, cache=r) for r in found}


NO_CACHES = Caches()


class _Noted(cache_utils.DynamicCache):  # type: ignore[misc]
    """A cache that notes who hands what to which of its layers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.inside: list[str] = []
        self.places: dict[int, list[tuple[str, Tensor, Tensor]]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values of all tokens."""
        self.places.setdefault(layer_idx, []).append((self.inside[-1], key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def find_places(module: nn.Module, ids: Tensor) -> tuple[tuple[CachePlace, ...], tuple[str, ...]]:
    """Keys and values that `module` stores for ids [B, T], keys of a layer before its values; and what it has besides.

    Raises:
        UnsupportedError: a model without a cache that could be kept in 8 bits, with the reasons.
    """
    if not isinstance(module, PreTrainedModel) or not hasattr(module, "generate"):
        reasons: tuple[str, ...] = (f"{type(module).__name__} is no decoder of transformers, which would have one",)
        raise _unsupported(reasons)
    fit, reasons = fit_layers(module.config)
    if not fit:
        raise _unsupported(reasons)
    noted = _traced(module, ids)
    places: list[CachePlace] = []
    for layer in fit:
        calls = noted.places.get(layer, [])
        if len(calls) != 1 or not calls[0][0]:
            reasons += (
                f"layer {layer}: stored {len(calls)} times in one pass, or by no module that is handed a cache",
            )
            continue
        name, *states = calls[0]
        queries = int(getattr(module.config.get_text_config(), "num_attention_heads", 0))
        for part, x in zip(PARTS, states, strict=True):
            place = CachePlace(module=name, layer=layer, part=part, heads=x.shape[1], width=x.shape[3], queries=queries)
            places.append(place)
    if not places:
        raise _unsupported(reasons)
    return tuple(places), reasons


def _unsupported(reasons: Sequence[str]) -> UnsupportedError:
    return UnsupportedError("this model has no KV cache that can be kept in 8 bits", (*reasons, REMEDY))


@torch.no_grad()
def _traced(module: PreTrainedModel, ids: Tensor) -> _Noted:
    noted, handles = _Noted(module.config), []
    for name, inner in module.named_modules():
        handles.append(inner.register_forward_pre_hook(_enters(noted, name), with_kwargs=True))
        handles.append(inner.register_forward_hook(_leaves(noted), with_kwargs=True))
    try:
        module(input_ids=ids.to(module.device), use_cache=True, **{cache_argument(module): noted})
    finally:
        for handle in handles:
            handle.remove()
    return noted


def _enters(noted: _Noted, name: str) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
    def hook(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        if any(value is noted for value in kwargs.values()):
            noted.inside.append(name)

    return hook


def _leaves(noted: _Noted) -> Callable[[nn.Module, Any, dict[str, Any], Any], None]:
    def hook(_: nn.Module, __: Any, kwargs: dict[str, Any], ___: Any) -> None:
        if any(value is noted for value in kwargs.values()):
            noted.inside.pop()

    return hook


def find_caches(stream: Stream, ids: Tensor, fmt: str) -> Caches:
    """The groups of the model's cache, each to stay as it is or to be kept in `fmt`; scales are still to be found.

    Raises:
        UnsupportedError: a model without a cache that could be kept in `fmt`, with the reasons.
    """
    places, left = find_places(stream.module, ids)
    if CACHE_FORMATS[fmt].largest is None:
        groups = tuple(
            CacheGroup(
                name=place.name,
                role=place.part,
                block=None if stream.whole else stream.block_of(place.module),
                places=(place,),
            )
            for place in places
        )
    elif left:
        raise _unsupported((*left, f"{fmt} is one format for all layers of a model"))
    else:
        groups = (CacheGroup(name=WHOLE, role=WHOLE, block=None, places=places),)
    return Caches(groups=groups, format=fmt, left=left)


def ranges(stream: Stream, groups: Sequence[CacheGroup], batches: Sequence[Any]) -> dict[Place, Tensor]:
    """(module, part) -> absolute maxima over the text, [heads, width].

    Raises:
        ModelError: keys or values that are not finite.
    """
    found: dict[Place, Tensor] = {}

    class Noting:
        def __init__(self, module: str) -> None:
            self.module = module

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            for part, x in zip(PARTS, (key_states, value_states), strict=True):
                largest = x.detach().abs().amax(dim=(0, 2)).float().cpu()
                if not bool(largest.isfinite().all()):
                    raise ModelError(f"the {part} of {self.module} hold NaN or infinite values")
                found[self.module, part] = largest.maximum(found.get((self.module, part), largest))
            return key_states, value_states

    def noting(name: str) -> Callable[[Any], Noting]:
        return lambda _: Noting(name)

    modules = dict.fromkeys(place.module for group in groups for place in group.places)
    handles = [tap_cache(stream.module.get_submodule(name), noting(name)) for name in modules]
    try:
        run_through(stream, batches)
    finally:
        for handle in handles:
            handle.remove()
    return found


def scales_of(found: Mapping[Place, Tensor], fmt: str) -> tuple[tuple[str, CachePart, tuple[float, ...]], ...]:
    """(module, part, scales) of a static format, bfloat16 values as checkpoints store them."""
    cache, smallest = CACHE_FORMATS[fmt], torch.finfo(torch.bfloat16).tiny
    if (largest := cache.largest) is None:
        return ()

    def of(maxima: Tensor) -> tuple[float, ...]:
        wanted = maxima.flatten() if cache.by_channel else maxima.max()[None]
        return tuple(as_bfloat16(wanted.clamp_min(smallest) / largest).clamp_min(smallest).tolist())

    return tuple((module, part, of(maxima)) for (module, part), maxima in found.items())


def cache_bytes(places: Sequence[CachePlace], fmt: str | None, workload: Workload, own_bytes: int) -> float:
    """Bytes of what is stored when the workload's last token is made; `own_bytes` a number where `fmt` is None."""
    tokens = workload.batch * (workload.prompt_tokens + workload.output_tokens)
    each = (
        own_bytes * p.heads * p.width if fmt is None else CACHE_FORMATS[fmt].bytes_per_token(p.heads, p.width)
        for p in places
    )
    return tokens * sum(each)
