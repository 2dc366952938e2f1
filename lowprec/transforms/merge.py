"""Scales between two layers, merged into both: what one gives is divided by them, what the others read multiplied.

    consumer(x) = W x = (W diag(s)) (diag(1/s) x),    x = source(...), linear in the source's own scale

The scales are powers of two: dividing and multiplying by them changes exponents alone, so the model computes the very
same numbers in every floating-point format, the merged weights need no rounding, and undoing it brings back every bit.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowprec.errors import ModelError
from lowprec.records import Scheme
from lowprec.runtime.convert import weight_of

SMOOTHED_ACTIVATION = "int8-token"
MARK = "~"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """Where scales can be merged, or a rotation of each head.

    Attributes:
        source: name of the module that gives x: a norm, whose weight is one number a channel, or a linear layer.
        consumers: names of all linear layers that read x.
        offset: of a linear source, the row from which on it gives x.
        channels: scales that can be chosen; x has `repeat` times as many channels.
        head: channels of a head, of which each is read `repeat` times (grouped-query attention).
    """

    source: str
    consumers: tuple[str, ...]
    channels: int
    offset: int = 0
    head: int = 0
    repeat: int = 1

    def spread(self, per_channel: Tensor) -> Tensor:
        """[channels] -> [channels repeat]: a value for each channel of x."""
        if self.repeat == 1:
            return per_channel
        return per_channel.view(-1, self.head).repeat_interleave(self.repeat, 0).flatten()

    @torch.no_grad()
    def apply(self, module: nn.Module, exponents: Tensor) -> None:
        """Merges the scales 2^exponents [channels, int] into the weights of `module`, in place.

        Raises:
            ModelError: a weight that cannot be scaled exactly (beyond the range of its format).
        """
        scaled: list[tuple[Tensor, Tensor]] = []
        source = module.get_submodule(self.source)
        rows = slice(self.offset, self.offset + self.channels)
        for parameter in (source.weight, getattr(source, "bias", None)):
            if isinstance(parameter, Tensor):
                part = (parameter if parameter.ndim == 1 else weight_of(source))[rows]
                scaled.append(_scaled(part, -exponents if part.ndim == 1 else -exponents[:, None], self.source))
        spread = self.spread(exponents)
        scaled += [_scaled(weight_of(module.get_submodule(name)), spread, name) for name in self.consumers]
        # Nothing is changed before all of it can be.
        for part, value in scaled:
            part.copy_(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothed:
    """A merge for one group when its inputs are rounded and its weights have the format `weight`.

    `exponents` are those of the scales, [channels], separated by commas.
    """

    group: str
    weight: str
    merge: Merge
    exponents: str

    @property
    def values(self) -> Tensor:
        """[channels] int64."""
        return torch.tensor([int(value) for value in self.exponents.split(",")])

    @property
    def spread(self) -> Tensor:
        """[K] int8, for each channel of x."""
        return self.merge.spread(self.values).to(torch.int8)


def smoothed_of(smoothed: Sequence[Smoothed], group: str, scheme: Scheme) -> Smoothed | None:
    """The group's merge in `scheme`; where inputs are not rounded to INT8 by token there is none."""
    if scheme.activation != SMOOTHED_ACTIVATION:
        return None
    return next((s for s in smoothed if s.group == group and s.weight == scheme.weight), None)


def keys_of(smoothed: Sequence[Smoothed], group: str, scheme: Scheme) -> tuple[str | None, str | None]:
    """What tells the group's rounded weights and inputs in `scheme` from others: the formats, marked where smoothed."""
    if smoothed_of(smoothed, group, scheme) is None:
        return scheme.weight, scheme.activation
    return f"{scheme.weight}{MARK}", f"{scheme.activation}{MARK}{scheme.weight}"


def _scaled(part: Tensor, exponents: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The part and what it becomes; ModelError where that is not exact."""
    scale = torch.exp2(exponents.to(part.device, part.dtype))
    scaled = part * scale
    if not torch.equal(scaled / scale, part):
        raise ModelError(f"{name} cannot be scaled by powers of two exactly in {part.dtype}")
    return part, scaled


@contextlib.contextmanager
def merged(module: nn.Module, merges: Sequence[tuple[Merge, Tensor]]) -> Iterator[None]:
    """Merges scales while open, and undoes it, bit for bit."""
    done: list[tuple[Merge, Tensor]] = []
    try:
        for merge, exponents in merges:
            merge.apply(module, exponents)
            done.append((merge, exponents))
        yield
    finally:
        for merge, exponents in reversed(done):
            merge.apply(module, -exponents)
