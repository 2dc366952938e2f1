"""The KV cache in 8 bits: a cache of transformers whose layers keep codes and scales and hand out what they stand for.

Each token is rounded once, when it is stored (`lowprec.formats.base.CacheFormat`), and everyone sees what was stored,
the very pass that stored it too: prefill at once, prefill in parts, and decoding token by token see the same numbers,
and so does a pass without a cache in which keys and values are rounded on their way to attention (`round_parts`). That
is why text that is scored in one pass says what generation loses.

    RequestCache    chosen when a request, or a batch of them, is admitted; it is never raised afterwards
    serve_cache     a loaded model with hooks: its own generation makes such a cache, and passes without one round alike

A part that is not rounded is kept as it is. Codes grow by `STEP` tokens at a time, so that most steps copy nothing of
what is stored; they are decoded whole for attention, in its dtype, so the bytes that are saved are those that are kept
between steps, of all layers, while those decoded are of one.

Left out: attention that reads codes (a fused kernel), static caches, offloading. Layers that keep a window, a state, or
keys of other layers stay what transformers makes them.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats import CACHE_FORMATS
from lowprec.records import CachePart, RoundedPart

STEP = 64
PARTS: tuple[CachePart, CachePart] = ("keys", "values")
EIGHT = "kv8-int8"
SERVED = "lowprec_cache"
"""Attribute of a module that says what its cache is kept in (`serve_cache`)."""
Layers = dict[int, dict[CachePart, RoundedPart]]


def cache_argument(model: nn.Module) -> str:
    """What the forward of a causal model, or of an attention layer in it, calls the KV cache that it takes."""
    # transformers 5.24 renamed it.
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def by_layer(parts: Iterable[RoundedPart]) -> Layers:
    """Layer of the cache -> its rounded parts."""
    found: Layers = {}
    for part in parts:
        found.setdefault(part.layer, {})[part.part] = part
    return found


def fake_quantize(x: Tensor, part: RoundedPart) -> Tensor:
    """x [B, H, T, D] -> what a cache would hand out of it, same shape and dtype."""
    fmt = CACHE_FORMATS[part.format]
    codes, scales = fmt.encode(x, part.scale)
    return fmt.decode(codes, part.scale if scales is None else scales, x.dtype)


class _Tokens:
    """Tensors [B, H, T, ...] that grow along T, with room for up to `STEP` - 1 tokens more than they hold."""

    def __init__(self) -> None:
        self.length = 0
        self._held: list[Tensor] = []

    def append(self, added: Sequence[Tensor]) -> None:
        """Adds [B, H, t, ...] of each tensor."""
        start, self.length = self.length, self.length + added[0].shape[2]
        if not self._held or self.length > self._held[0].shape[2]:
            room = -(-self.length // STEP) * STEP
            grown = [x.new_empty(*x.shape[:2], room, *x.shape[3:]) for x in added]
            for new, old in zip(grown, self._held, strict=False):
                new[:, :, :start] = old[:, :, :start]
            self._held = grown
        for held, x in zip(self._held, added, strict=True):
            held[:, :, start : self.length] = x

    def read(self) -> list[Tensor]:
        """What is held of each tensor, [B, H, T, ...], a view."""
        return [held[:, :, : self.length] for held in self._held]

    def over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces each tensor by what `change` makes of it along the batch."""
        self._held = [change(held) for held in self._held]

    @property
    def bytes(self) -> int:
        """Of all that is held, room included."""
        return sum(held.nbytes for held in self._held)


class RoundedLayer(cache_utils.DynamicLayer):  # type: ignore[misc]
    """One layer of a cache, of which keys, values or both are kept in codes.

    Args:
        rounded: its parts that are rounded, in their formats.

    `keys` and `values`, where transformers keeps its own, stay empty tensors of the right dtype.
    """

    def __init__(self, rounded: Mapping[CachePart, RoundedPart]) -> None:
        super().__init__()
        self.rounded = dict(rounded)
        self._tokens = {part: _Tokens() for part in PARTS}
        self._dtypes: dict[CachePart, torch.dtype] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Notes device and dtypes."""
        super().lazy_initialization(key_states, value_states)
        self._dtypes = {"keys": key_states.dtype, "values": value_states.dtype}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores keys and values [B, H, t, D] of t tokens and hands out those of all tokens, [B, H, T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for part, x in zip(PARTS, (key_states, value_states), strict=True):
            self._tokens[part].append(self._encoded(part, x))
        return self._decoded("keys"), self._decoded("values")

    def _encoded(self, part: CachePart, x: Tensor) -> list[Tensor]:
        if (found := self.rounded.get(part)) is None:
            return [x]
        codes, scales = CACHE_FORMATS[found.format].encode(x, found.scale)
        return [codes] if scales is None else [codes, scales]

    def _decoded(self, part: CachePart) -> Tensor:
        held = self._tokens[part].read()
        if (found := self.rounded.get(part)) is None:
            return held[0]
        scales = held[1] if len(held) > 1 else found.scale
        return CACHE_FORMATS[found.format].decode(held[0], scales, self._dtypes[part])

    @property
    def bytes(self) -> int:
        """Of codes and scales, and of what is not rounded; room for tokens to come included."""
        return sum(tokens.bytes for tokens in self._tokens.values())

    @property
    def batch_size(self) -> int:
        """Sequences that are held; transformers asks for it."""
        held = self._tokens["keys"].read()
        return held[0].shape[0] if held else -1

    def get_seq_length(self) -> int:
        """Tokens that are held."""
        return self._tokens["keys"].length

    def reset(self) -> None:
        """Forgets all tokens."""
        self._tokens = {part: _Tokens() for part in PARTS}
        self.is_initialized = False
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -n tokens; transformers before 5.24 asks to keep the first n instead."""
        length = self.get_seq_length()
        kept = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
        for tokens in self._tokens.values():
            tokens.length = min(max(kept, 0), length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was."""
        self._over_batch(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence."""
        self._over_batch(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences that `indices` name."""
        self._over_batch(lambda held: held[indices])

    def _over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for tokens in self._tokens.values():
            tokens.over_batch(change)


class RequestCache(cache_utils.DynamicCache):  # type: ignore[misc]
    """The cache of one request, or of a batch of requests that were admitted together.

    What it keeps in which format is settled when it is made. It may be lowered while it is in use, never raised: what
    was rounded cannot be had back, and a request whose early tokens were kept in fewer bits than its later ones would
    not be what it is accounted as.

    Args:
        config: the model's.
        parts: what is rounded, as an artefact's plan says, or `every_part`; nothing for a cache of 16 bits.

    Raises:
        UnsupportedError: a layer whose cache is none of keys and values of all tokens.
    """

    def __init__(self, config: Any, parts: Iterable[RoundedPart] = ()) -> None:
        super().__init__(config=config)
        self._parts: tuple[RoundedPart, ...] = ()
        self.lower(parts)

    @property
    def parts(self) -> tuple[RoundedPart, ...]:
        """What is rounded."""
        return self._parts

    @property
    def bytes(self) -> int:
        """Bytes that its layers keep."""
        return sum(layer_bytes(layer) for layer in self.layers)

    def lower(self, parts: Iterable[RoundedPart]) -> None:
        """Keeps `parts` rounded from now on, what they hold already included.

        Raises:
            ConfigError: something that is rounded now is not in `parts`: a cache is never raised.
            UnsupportedError: a layer whose cache is none of keys and values of all tokens.
        """
        wanted, now = by_layer(parts), by_layer(self._parts)
        for layer, rounded in now.items():
            for part, found in rounded.items():
                if wanted.get(layer, {}).get(part) != found:
                    raise ConfigError(
                        f"{part} of layer {layer} are kept in {found.format} and cannot be raised: a request keeps the "
                        "precision that it was admitted with, or less; admit another request"
                    )
        if reasons := _reasons(self.layers, wanted):
            raise UnsupportedError("this cache cannot be kept in 8 bits", reasons)
        for layer, rounded in wanted.items():
            if rounded != now.get(layer):
                self.layers[layer] = _lowered(self.layers[layer], rounded)
        self._parts = tuple(found[part] for _, found in sorted(wanted.items()) for part in PARTS if part in found)


def _lowered(layer: Any, rounded: Mapping[CachePart, RoundedPart]) -> RoundedLayer:
    """The layer with these parts rounded, and with the tokens that it holds."""
    made = RoundedLayer(rounded)
    if layer.get_seq_length():
        keys, values = (layer._decoded(p) for p in PARTS) if isinstance(layer, RoundedLayer) else _held(layer)
        made.update(keys, values)
    return made


def _held(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def layer_bytes(layer: Any) -> int:
    """Bytes that a layer of a cache keeps, of ours or of transformers."""
    if isinstance(layer, RoundedLayer):
        return layer.bytes
    held = (getattr(layer, part, None) for part in PARTS)
    return sum(x.nbytes for x in held if isinstance(x, Tensor))


def _unfit(layers: Sequence[Any], index: int) -> str | None:
    """What layer `index` of a cache keeps that cannot be kept in codes, None if it can."""
    if index >= len(layers):
        return f"nothing: the model's cache has {len(layers)} layers"
    kind = type(layers[index])
    if kind in (cache_utils.DynamicLayer, RoundedLayer):
        return None
    if issubclass(kind, cache_utils.LinearAttentionCacheLayerMixin):
        return "a state instead of keys and values (state-space or linear attention)"
    if issubclass(kind, cache_utils.DynamicSlidingWindowLayer):
        return f"a sliding window of {layers[index].sliding_window} tokens"
    return f"a {kind.__name__}, which is not keys and values of all tokens"


def _reasons(layers: Sequence[Any], wanted: Iterable[int]) -> tuple[str, ...]:
    """Why some of the `wanted` layers cannot be kept in codes, those of one reason together."""
    kept: dict[str, list[str]] = {}
    for index in wanted:
        if (kind := _unfit(layers, index)) is not None:
            kept.setdefault(kind, []).append(str(index))
    return tuple(f"what is kept of layers {', '.join(found)} is {kind}" for kind, found in kept.items())


def fit_layers(config: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The layers of a model's cache that can be kept in codes, and why the others cannot.

    Args:
        config: a configuration of transformers.
    """
    try:
        layers = cache_utils.DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return (), (f"transformers makes no cache for {type(config).__name__} ({error})",)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return (), ("it has cross-attention, whose keys and values are of another text",)
    return (
        tuple(index for index in range(len(layers)) if _unfit(layers, index) is None),
        _reasons(layers, range(len(layers))),
    )


def every_part(config: Any, fmt: str = EIGHT) -> tuple[RoundedPart, ...]:
    """Keys and values of all layers that can be kept in the dynamic format `fmt`.

    Raises:
        UnsupportedError: none can, with the reasons.
        ConfigError: `fmt` needs calibrated scales.
    """
    if CACHE_FORMATS[fmt].largest is not None:
        raise ConfigError(f"{fmt} needs calibrated scales: make an artefact with --kv-cache, or give {EIGHT}")
    layers, reasons = fit_layers(config)
    if not layers:
        raise UnsupportedError("no layer of this model keeps a cache that 8 bits can hold", reasons)
    return tuple(RoundedPart(module="", layer=layer, part=part, format=fmt) for layer in layers for part in PARTS)


def request_cache(model: nn.Module, bits: int | None = None) -> RequestCache:
    """An empty cache for a request that is admitted now; give it to `generate`, or to each forward pass.

    Args:
        model: a decoder of transformers.
        bits: None: what the artefact was judged with (16 for a model that is none); 16: nothing is rounded, which
            costs memory and loses nothing; 8: what the artefact was judged with, and where that has no rounded cache,
            INT8 in every layer that can have it, which was not judged.

    Raises:
        ConfigError: other bits, or a model without a configuration.
        UnsupportedError: 8 bits, and no layer can have them.
    """
    if bits not in (None, 8, 16):
        raise ConfigError(f"a cache of {bits} bits: give 8, 16, or None for what the model was judged with")
    config = getattr(model, "config", None)
    if config is None:
        raise ConfigError(f"{type(model).__name__} has no transformers configuration to make a cache from")
    planned: tuple[RoundedPart, ...] = getattr(model, SERVED, ())
    if bits == 16:
        planned = ()
    elif bits == 8 and not planned:
        planned = every_part(config)
    return RequestCache(config, planned)


class _Rounding:
    """Stands in for the cache that an attention layer is given, or for none, and rounds on the way to it."""

    def __init__(self, rounded: Mapping[CachePart, RoundedPart], given: Any) -> None:
        self._rounded, self._given = rounded, given

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Rounded keys and values, of all tokens where there is a cache."""
        keys, values = (
            x if (part := self._rounded.get(name)) is None else _through(x, part)
            for name, x in zip(PARTS, (key_states, value_states), strict=True)
        )
        if self._given is None:
            return keys, values
        found: tuple[Tensor, Tensor] = self._given.update(keys, values, *args, **kwargs)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)


def _through(x: Tensor, part: RoundedPart) -> Tensor:
    """x rounded; where gradients are wanted they pass as if nothing were."""
    rounded = fake_quantize(x.detach(), part)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def round_parts(attention: nn.Module, rounded: Mapping[CachePart, RoundedPart]) -> Any:
    """Lets an attention layer see rounded keys and values; returns the handle of the hook that does it.

    A `RequestCache` is left alone: what it rounds was settled when its request was admitted.
    """
    return tap_cache(attention, _Rounds(dict(rounded)))


@dataclass(frozen=True, slots=True)
class _Rounds:
    """What takes the place of a cache where parts are rounded; a class, so that models that have it can be pickled."""

    rounded: Mapping[CachePart, RoundedPart]

    def __call__(self, given: Any) -> Any:
        return given if isinstance(given, RequestCache) else _Rounding(self.rounded, given)


def tap_cache(attention: nn.Module, wrap: Callable[[Any], Any]) -> Any:
    """Gives an attention layer `wrap(cache)` for the cache that it is called with, None where it has none."""
    return attention.register_forward_pre_hook(_Tap(cache_argument(attention), wrap), with_kwargs=True)


@dataclass(frozen=True, slots=True)
class _Tap:
    name: str
    wrap: Callable[[Any], Any]

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, self.name: self.wrap(kwargs.get(self.name))}


@contextmanager
def serving_cache(model: nn.Module, parts: Sequence[RoundedPart]) -> Iterator[nn.Module]:
    """`serve_cache` while open; a model that is served so already stays so."""
    served = hasattr(model, SERVED)
    serve_cache(model, parts)
    try:
        yield model
    finally:
        if not served:
            leave_cache_(model)


def serve_cache(model: nn.Module, parts: Sequence[RoundedPart]) -> None:
    """Gives a decoder of transformers the cache that it was judged with; nothing where nothing is rounded.

    `generate`, and a forward pass with `use_cache` and no cache, make a `RequestCache`; passes without a cache, or with
    one that is none of ours, see keys and values rounded alike. A `RequestCache` of the caller is taken as it is.

    Raises:
        ConfigError: the model has another cache of ours already.
    """
    before = getattr(model, SERVED, None)
    if not parts or before == tuple(parts):
        return
    if before is not None:
        raise ConfigError("this model is given another KV cache already: load it anew")
    for rounded in by_layer(parts).values():
        round_parts(model.get_submodule(next(iter(rounded.values())).module), rounded)
    model.register_forward_pre_hook(_admits, with_kwargs=True)
    setattr(model, SERVED, tuple(parts))
    if hasattr(model, "_prepare_cache_for_generation"):
        # `generate` makes its cache itself, before any pass; its hook for that is a method.
        model.__dict__["_prepare_cache_for_generation"] = partial(_prepare_cache, model)


def leave_cache_(model: nn.Module) -> bool:
    """Takes off a model what `serve_cache` gave it, in place; whether there was anything."""
    if not hasattr(model, SERVED):
        return False
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _admits or (isinstance(hook, _Tap) and isinstance(hook.wrap, _Rounds)):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    delattr(model, SERVED)
    model.__dict__.pop("_prepare_cache_for_generation", None)
    return True


def _prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    name = cache_argument(model)
    # A cache of another kind, or none at all, is the caller's to ask for.
    usual = generation_config.use_cache is not False and generation_config.cache_implementation is None
    if usual and model_kwargs.get(name) is None:
        model_kwargs[name] = request_cache(model)
    return type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)


def _admits(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A pass that would make a cache of its own is given one of ours."""
    name, config = cache_argument(model), getattr(model, "config", None)
    wanted = kwargs.get("use_cache")
    if wanted is None:
        wanted = getattr(config, "use_cache", False)
    if wanted and kwargs.get(name) is None:
        kwargs = {**kwargs, name: request_cache(model)}
    return args, kwargs
