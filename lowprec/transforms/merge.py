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
from lowprec.runtime.convert import weight_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """Where scales can be merged.

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

    def apply(self, module: nn.Module, exponents: Tensor) -> None:
        """Merges the scales 2^exponents [channels, int] into the weights of `module`, in place.

        Raises:
            ModelError: a weight that cannot be scaled exactly (beyond the range of its format).
        """
        source = module.get_submodule(self.source)
        rows = slice(self.offset, self.offset + self.channels)
        for parameter in (source.weight, getattr(source, "bias", None)):
            if isinstance(parameter, Tensor):
                part = (parameter if parameter.ndim == 1 else weight_of(source))[rows]
                _scale(part, -exponents if part.ndim == 1 else -exponents[:, None], self.source)
        for name in self.consumers:
            _scale(weight_of(module.get_submodule(name)), self.spread(exponents), name)


@torch.no_grad()
def _scale(part: Tensor, exponents: Tensor, name: str) -> None:
    scale = torch.exp2(exponents.to(part.device, part.dtype))
    scaled = part * scale
    if not torch.equal(scaled / scale, part):
        raise ModelError(f"{name} cannot be scaled by powers of two exactly in {part.dtype}")
    part.copy_(scaled)


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
