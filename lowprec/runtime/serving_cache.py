"""A model that is served with the KV cache that it was judged with.

Its own generation makes a `RequestCache`, and passes without one round keys and values on their way to attention
alike. That is why text that is scored in one pass says what generation loses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lowprec.errors import ConfigError
from lowprec.records import CachePart, RoundedPart
from lowprec.runtime.kvcache import PARTS, by_layer, cache_argument, fake_quantize
from lowprec.runtime.request_cache import SERVED, RequestCache, request_cache


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
