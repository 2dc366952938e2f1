"""What a model computes with instead of its own weights, and how that is put in the place of them.

An overlay names layers and attention modules; `lowprec.steps.stream` lays it over the part of a model that it runs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.formats import ACTIVATION_FORMATS, ActivationFormat
from lowprec.records import CachePart, RoundedPart
from lowprec.steps.linear import stored_weight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Override:
    """What one linear layer computes with instead of its own weight, or what one attention layer sees of its cache.

    Attributes:
        weight: makes the [N, K] float32 weight when the block is materialised; None keeps the layer's own.
        activation: name of the format that its input is rounded to, None for none.
        activation_scale: scalar, for static activation formats.
        activation_exponents: [K], the input is divided by these powers of two while it is rounded; None for nothing.
        cache: of an attention layer: which of its keys and values are rounded on their way to the cache, and how.
    """

    weight: Callable[[], Tensor] | None
    activation: str | None = None
    activation_scale: Tensor | None = None
    activation_exponents: Tensor | None = None
    cache: Mapping[CachePart, RoundedPart] = field(default_factory=dict)


Overlay = Mapping[str, Override]
NOTHING: Overlay = {}


Place = tuple[dict[str, Any], str, Any]
"""A module's table of tensors, the name of one, and what stands in its place."""
Hooked = Callable[[], Any]
"""Registers a hook, and returns its handle."""


class Swap(contextlib.AbstractContextManager[None]):
    """Other tensors, and hooks, in a part of a model while open.

    They are made when it is first opened, and kept for the next time.
    """

    def __init__(self, make: Callable[[], tuple[list[Place], list[Hooked]]]) -> None:
        self._make = make
        self._made: tuple[list[Place], list[Hooked]] | None = None
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> None:
        if self._made is None:
            self._made = self._make()
        places, hooks = self._made
        with contextlib.ExitStack() as opened:
            for table, name, new in places:
                opened.callback(table.__setitem__, name, table[name])
                table[name] = new
            for hook in hooks:
                opened.callback(hook().remove)
            self._opened = opened.pop_all()

    def __exit__(self, *_: object) -> None:
        self._opened.close()


@contextlib.contextmanager
def weighing(root: nn.Module, overlay: Overlay) -> Iterator[None]:
    """Each layer of `root` has the overlay's weight while it runs, one layer at a time."""
    handles = []
    for name, override in overlay.items():
        if override.weight is not None:
            module = root.get_submodule(name)
            fill, empty = _weight_hooks(module, override.weight)
            handles += [
                module.register_forward_pre_hook(fill),
                module.register_forward_hook(empty, always_call=True),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weight_hooks(module: nn.Module, make: Callable[[], Tensor]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Before and after a call: puts the made weight in the place of the module's own, and that back."""
    own: Any = module.weight

    def fill(*_: Any) -> None:
        module._parameters["weight"] = nn.Parameter(stored_weight(module, make()).to(own), requires_grad=False)

    def empty(*_: Any) -> None:
        module._parameters["weight"] = own

    return fill, empty


def rounds_input(override: Override) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook before a layer that rounds its input as `override` says."""
    assert override.activation is not None
    fmt = ACTIVATION_FORMATS[override.activation]

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        rounded = rounded_input(x.detach(), fmt, override.activation_scale, override.activation_exponents)
        # Where gradients are wanted they pass as if nothing were rounded; elsewhere the rounded values are untouched.
        return (x + (rounded - x).detach() if x.requires_grad else rounded, *args[1:])

    return hook


def rounded_input(x: Tensor, fmt: ActivationFormat, scale: Tensor | None, exponents: Tensor | None) -> Tensor:
    """x [..., K] rounded to `fmt`, divided by 2^exponents [K] meanwhile."""
    if exponents is None:
        return fmt.fake_quantize(x, scale)
    factor = torch.exp2(exponents.to(x.device, x.dtype))
    return fmt.fake_quantize(x / factor, scale) * factor
