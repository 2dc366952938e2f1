"""The KV cache of a request: what it keeps in which format is settled when the request is admitted.

Layers that keep a window, a state, or keys of other layers stay what transformers makes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import cache_utils

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats import CACHE_FORMATS
from lowprec.records import CachePart, RoundedPart
from lowprec.runtime.kvcache import PARTS, RoundedLayer, by_layer, layer_bytes

EIGHT = "kv8-int8"
SERVED = "lowprec_cache"
"""Attribute of a module that says what its cache is kept in (`lowprec.runtime.serving_cache.serve_cache`)."""


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
