"""Learned rounding: codes and scales of a block, moved together so that the block's output comes back.

    minimise over v, u   mean over tokens of |f(x; q) - y|^2 / |y|^2,
    q = s exp(u) round(latent + v),  |v| <= 1/2

x is what the block is given in the rounded model, y what the reference makes of its own input, f the block with rounded
weights and, where the scheme rounds them, rounded activations. A block is judged token by token relative to its output,
because the next block's norm divides by that: otherwise the few tokens of massive activations would be all that counts.

Steps go by the sign of the gradient's running mean, the gradient passing the rounding as if it were not there, with a
rate that falls to zero: SignRound (arXiv 2309.05516, equations 3-5), started from the codes of an error-compensating
solver instead of from rounding to nearest. What makes that start work is the latent (`lowprec.solvers.latent`): the
offset v = 0 is the solver's code, and the first weights to change are those between two codes that cost the same.
INT8 and FP8 weights of the block stay; so does all that is not rounded.

Windows are held back from the steps; they are looked at before and every few steps, the best iterate is kept, and the
search ends where it does not help for long. So on them a block is never worse than it was.

Tried on the first blocks of SmolLM2-135M (INT4 g64, compensated), error on held-back windows relative to the start:
offsets taken from W / s clipped to half a step no gain at small rates, 2 and more at large ones; by the latent and the
sign without running mean at rate 0.01 0.94 in one block and 1.5 in the next; with it, rates 0.005 and 5e-4, 0.88, 0.92,
0.93; twice these rates 0.92, 0.91, 1.27; scales alone 0.94, 0.97; steps in proportion to the gradient 2 and more.

What it is worth, from a prototype over all 30 blocks (40 steps each; mean of the blocks' errors 0.978: the later a
block, the more of its error comes from its input), on 5 k tokens each of (technical, literature, code, exam questions):
KL over all 0.1104 to 0.1085 nats, perplexity +4.3 % +14.8 % +4.8 % +6.8 % to +2.9 % +13.9 % +4.0 % +5.2 %. Healing wins
about as much (`bench/README.md`) with a fifth of the work or less, and what the two win together has not been measured:
no effort includes learning yet.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.steps.backward import gathered
from lowprec.steps.stream import Call, Overlay, Stream

STEP_TOKENS = 4096
HELD_BACK = 8
LOOK_EVERY, PATIENCE = 10, 3
RUNNING_MEAN = 0.9
TINY = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passage:
    """What a block is given and what it should make of it, batch by batch.

    Attributes:
        inputs: hidden states of the rounded model.
        outputs: what the reference makes of its own.
        calls: the block's other arguments.
        positions: real tokens, [B, T] bool; None where all are.
    """

    inputs: Sequence[Any]
    outputs: Sequence[Tensor]
    calls: Sequence[Call]
    positions: Sequence[Tensor | None]


class _Layer:
    """One layer's codes and scales on their way."""

    def __init__(self, start: QuantizedWeight, latent: Tensor) -> None:
        self._start, self._latent = start, latent
        self._offset, self._slope = torch.zeros_like(latent), torch.zeros_like(latent)
        self._shift, self._tilt = torch.zeros_like(start.scale), torch.zeros_like(start.scale)
        fmt = WEIGHT_FORMATS[start.format]
        slabs = start.codes.view(*start.scale.shape, -1).float()
        self._lowest = None if fmt.symmetric else slabs.amin(-1, keepdim=True).clamp_max(0.0)
        self._one = torch.ones(1)

    @property
    def weight(self) -> QuantizedWeight:
        """As it would be stored now."""
        fmt, shape = WEIGHT_FORMATS[self._start.format], self._start.scale.shape
        codes = fmt.round((self._latent + self._offset).view(*shape, -1), self._one, self._lowest)
        scale = fmt.store_scales(self._start.scale * self._shift.exp())
        return replace(self._start, codes=codes.view_as(self._latent).to(fmt.code_dtype), scale=scale)

    def dequantize(self) -> Tensor:
        """[N, K] float32."""
        return self.weight.dequantize()

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """Takes the gradient of the dense weight [N, K], and goes a step by its running mean's sign."""
        gradient = gradient.cpu().float()
        grid = self.weight.with_scale(torch.ones_like(self._shift))
        slope = (grid.view(*self._shift.shape, -1) * gradient.view(*self._shift.shape, -1)).sum(-1)
        self._slope.lerp_(gradient, 1.0 - RUNNING_MEAN)
        self._tilt.lerp_(slope, 1.0 - RUNNING_MEAN)
        self._offset.sub_(self._slope.sign(), alpha=rate).clamp_(-0.5, 0.5)
        self._shift.sub_(self._tilt.sign(), alpha=scale_rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """How long and how fast; `run` learns one block.

    Attributes:
        steps: at most, of STEP_TOKENS tokens each.
        rate: of the offsets, in steps of the grid.
        scale_rate: of the logarithm of the scales.
    """

    steps: int = 40
    rate: float = 5e-3
    scale_rate: float = 5e-4
    seed: int = 0

    def run(
        self,
        stream: Stream,
        index: int,
        solved: Mapping[str, QuantizedWeight],
        latents: Mapping[str, Tensor],
        overlay_of: Callable[[Mapping[str, Callable[[], Tensor]]], Overlay],
        passage: Passage,
    ) -> dict[str, QuantizedWeight]:
        """Learns block `index`.

        Args:
            solved: the layers as they are.
            latents: what the codes of the layers to be learned were rounded from.
            overlay_of: what the block computes with when these layers make their dense weights so.
            passage: of one batch at least two.

        Returns:
            The learned layers; on the windows held back never worse than `solved`.
        """
        layers = {name: _Layer(solved[name], latent) for name, latent in latents.items()}
        overlay = overlay_of({name: layer.dequantize for name, layer in layers.items()})
        best = {name: solved[name] for name in layers}
        count = len(passage.inputs)
        if count < 2 or not layers:
            return best
        held = range(count - max(1, count // HELD_BACK), count)
        batches = self._batches(passage, held.start)
        least, unhelped = _loss(stream, index, overlay, passage, held), 0
        for number in range(1, self.steps + 1):
            left = 1.0 - (number - 1) / self.steps
            self._step(stream, index, layers, overlay, passage, next(batches), left)
            if number % LOOK_EVERY == 0 or number == self.steps:
                loss = _loss(stream, index, overlay, passage, held)
                unhelped = 0 if loss < least else unhelped + 1
                if loss < least:
                    least, best = loss, {name: layer.weight for name, layer in layers.items()}
                if unhelped == PATIENCE:
                    break
        return best

    def _batches(self, passage: Passage, count: int) -> "itertools.chain[list[int]]":
        """Numbers of the batches of each step, over and over in a seeded order; those from `count` on are held back."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens = max(1, passage.outputs[0].shape[:-1].numel())
        size = min(count, max(1, STEP_TOKENS // tokens))

        def rounds() -> list[list[int]]:
            order = torch.randperm(count, generator=generator).tolist()
            return [order[start : start + size] for start in range(0, count, size)]

        return itertools.chain.from_iterable(rounds() for _ in itertools.count())

    def _step(
        self,
        stream: Stream,
        index: int,
        layers: Mapping[str, _Layer],
        overlay: Overlay,
        passage: Passage,
        numbers: Sequence[int],
        left: float,
    ) -> None:
        gradients: dict[str, Tensor] = {}
        with torch.enable_grad(), stream.block(index, overlay), gathered(stream, layers, gradients.__setitem__):
            for number in numbers:
                torch.autograd.backward(_error(stream, index, passage, number) / len(numbers))
        for name, gradient in gradients.items():
            layers[name].step(gradient, self.rate * left, self.scale_rate * left)


def _loss(stream: Stream, index: int, overlay: Overlay, passage: Passage, numbers: Sequence[int]) -> float:
    with torch.no_grad(), stream.block(index, overlay):
        return sum(float(_error(stream, index, passage, number)) for number in numbers)


def _error(stream: Stream, index: int, passage: Passage, number: int) -> Tensor:
    """Mean over a batch's tokens of the squared error relative to the output."""
    found = stream.run(index, passage.inputs[number], passage.calls[number]).float()
    expected = passage.outputs[number].to(found.device).float()
    error: Tensor = (found - expected).square().sum(-1) / (expected.square().sum(-1) + TINY)
    where = passage.positions[number]
    if where is None or where.shape != error.shape:
        return error.mean()
    real = where.to(error)
    return (error * real).sum() / real.sum().clamp_min(1.0)
