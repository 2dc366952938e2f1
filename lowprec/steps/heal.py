"""Healing: the scales of a rounded model, tuned end to end so that its outputs come back to the reference's.

    minimise over s   mean over positions of KL(reference || model(codes, s))

    s[n, g] = s_0[n, g] exp(a[n] + b[g])

Codes stay as the solver left them, and so do the scales but for a gain of each row and one of each group of columns of
a layer: rounding errors that no layer can mend by itself are mended by others (EfficientQAT, arXiv 2407.11062, section
3.2, there every scale by itself and with the loss of the labels). So few numbers can be learned from little text:
scales by themselves, 1.7 million in a model of 135 million, first lose by the gradients' noise what they win later.
Gradients: with w = s c, dL/d log s[n, g] = s sum over the group of c dL/dw, so one dense gradient of the layer serves
all formats. Adam (arXiv 1412.6980) on a and b, so that all gains move by like shares; a cosine schedule with a short
warm-up. What is to be mended is as large as the errors, whose square the KL is: so the rate is in proportion to the
root of the KL that the first step finds. What a layer computes with is always the scale rounded to bfloat16, as it will
be stored; rounded activations let gradients pass as if they were not rounded (straight-through). A table that an
embedding shares with a head keeps its scales.

The model is materialised block by block, forwards and then backwards with each block run again from its kept input, so
that memory is the codes, two blocks and a step's hidden states. Like all statistics it is computed in `fast_dtype`.
The amount of work is fixed in tokens, not in seconds: the same run gives the same scales on a slower machine.

Tried on SmolLM2-135M in groups of 64, turned, compensated with both sides' Hessians, 16 k tokens of technical text
(half of the calibration text) in four steps; KL in nats over 9 k tokens of four unlike texts, and perplexity:

    INT3   not healed 0.338, +35.2 %; gains at a rate of 3e-3 0.328, +31.5 %; 1e-2 0.317, +29.5 %; 2e-2 0.328, +30.2 %;
           all of the text at 1e-2 0.315, +27.5 %
    INT4   not healed 0.084, +7.6 %; gains at 3e-3 0.084, +6.7 %; 1e-2 0.087, +6.7 %

and every scale by itself, over 73 k tokens of them, INT3: not healed 0.341, +32.6 %; half of the text at 3e-3 0.388,
+34.3 %; all of it 0.322, +26.7 %. Left out because it did not pay: two passes, the norms' weights as parameters, and
the codes by straight-through estimation (sixteen steps of Adam or of signs: 0.4 nats and worse; it takes more steps
than there is text).
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.records import Group, Scheme
from lowprec.steps.backward import backward, gathered
from lowprec.steps.calibrate import Calibration, Progress
from lowprec.steps.measure import run_through
from lowprec.steps.memory import trim
from lowprec.steps.outcome import Outcome
from lowprec.steps.solve import overrides
from lowprec.steps.stream import Call, Overlay, Override, Stream, fast_dtype
from lowprec.steps.tokens import rows_of_batch, windows_of

RATE = 0.022
# A little above what INT3 of the demo heals best at. Without probabilities the divergence has a unit, and may be huge.
LARGEST_RATE = 0.015
STEP_TOKENS = 4096
WARM_UP_STEPS = 4
NO_CALL: Call = ((), {})
DECAY_MEAN, DECAY_SQUARE, TINY = 0.9, 0.95, 1e-12


class _Gains:
    """Logarithms of gains, [N, 1] of rows or [1, groups] of groups of columns, with gradient and Adam's moments."""

    def __init__(self, rows: int, groups: int) -> None:
        self.log = torch.zeros(rows, groups)
        self._gradient = torch.zeros_like(self.log)
        self._mean, self._square = torch.zeros_like(self.log), torch.zeros_like(self.log)

    def add(self, gradient: Tensor) -> None:
        """Takes the gradient of the logarithms of all scales, [N, groups]."""
        self._gradient += gradient.sum_to_size(self.log.shape)

    def step(self, number: int, rate: float) -> None:
        """Adam's step `number`, counted from 1, by what was added since the last."""
        self._mean.lerp_(self._gradient, 1.0 - DECAY_MEAN)
        self._square.lerp_(self._gradient.square(), 1.0 - DECAY_SQUARE)
        self._gradient.zero_()
        mean, square = self._mean / (1.0 - DECAY_MEAN**number), self._square / (1.0 - DECAY_SQUARE**number)
        self.log -= rate * mean / (square.sqrt() + TINY)


class _Scales:
    """One layer's codes, and its scales on their way."""

    def __init__(self, weight: QuantizedWeight) -> None:
        n, groups = weight.scale.shape
        self._start, self._format = weight, WEIGHT_FORMATS[weight.format]
        self._rows, self._columns = _Gains(n, 1), _Gains(1, groups)

    @property
    def _gain(self) -> Tensor:
        return (self._rows.log + self._columns.log).exp()

    @property
    def weight(self) -> QuantizedWeight:
        """The codes with the scales as they would be stored now."""
        return replace(self._start, scale=self._format.store_scales(self._start.scale * self._gain))

    def dequantize(self) -> Tensor:
        """[N, K] float32."""
        return self.weight.dequantize()

    def add(self, gradient: Tensor) -> None:
        """Takes the gradient of the dense weight [N, K], and makes it one of log s [N, groups]."""
        n, groups = self._start.scale.shape
        grid = self._start.with_scale(torch.ones_like(self._start.scale))
        products = (grid.view(n, groups, -1) * gradient.cpu().float().view(n, groups, -1)).sum(-1)
        gradient_of_log = products * self._start.scale * self._gain
        for gains in (self._rows, self._columns):
            gains.add(gradient_of_log)

    def step(self, number: int, rate: float) -> None:
        """Adam's step `number`, counted from 1."""
        for gains in (self._rows, self._columns):
            gains.step(number, rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Healing:
    """A healing of one mix; `run` makes it.

    Attributes:
        schemes: group -> scheme.
        batches: calibration text.
        passes: how often it is gone through; 0.5 goes through half of it.
        rate: largest change of log s in a step, as a multiple of the root of the first step's KL in nats.
    """

    stream: Stream
    groups: Sequence[Group]
    schemes: Mapping[str, Scheme]
    batches: Sequence[Any]
    outcome: Outcome
    calibration: Calibration
    passes: float
    seed: int = 0
    rate: float = RATE

    def run(
        self, solved: Mapping[str, QuantizedWeight], progress: Progress = lambda done, total: None
    ) -> dict[str, QuantizedWeight]:
        """The same codes with healed scales, layer by layer."""
        fixed = {layer: solved[layer] for g in self.groups if g.tables for layer in g.layers if layer in solved}
        scales = {layer: _Scales(weight) for layer, weight in solved.items() if layer not in fixed}
        with self.stream.computing(fast_dtype(self.stream)):
            steps = self._steps()
            used = sorted({position for step in steps for position in step})
            found = run_through(self.stream, [self.batches[position] for position in used])
            reference = dict(zip(used, found.hidden, strict=True))
            rate = 0.0
            for number, positions in enumerate(steps, start=1):
                kl_nats = self._gather(scales, self._overlay(scales, fixed), reference, positions)
                rate = rate or min(self.rate * math.sqrt(max(kl_nats, 0.0)), LARGEST_RATE)
                for layer in scales.values():
                    layer.step(number, rate * _schedule(number, len(steps)))
                trim()
                progress(number, len(steps))
        return fixed | {name: layer.weight for name, layer in scales.items()}

    def _steps(self) -> list[list[int]]:
        """Which batches each step goes through: every batch once a pass, in a seeded order."""
        generator = torch.Generator().manual_seed(self.seed)
        steps: list[list[int]] = []
        wanted = math.ceil(self.passes * len(self.batches))
        for before in range(0, wanted, len(self.batches)):
            steps.append([])
            held = 0
            for position in torch.randperm(len(self.batches), generator=generator).tolist()[: wanted - before]:
                if held >= STEP_TOKENS:
                    steps.append([])
                    held = 0
                steps[-1].append(position)
                held += _size(self.batches[position])
        return steps

    def _overlay(self, scales: Mapping[str, _Scales], fixed: Mapping[str, QuantizedWeight]) -> Overlay:
        made: dict[str, Override] = {}
        for group in self.groups:
            scheme = self.schemes[group.name]
            if scheme.weight is not None:
                makers = {layer: (scales.get(layer) or fixed[layer]).dequantize for layer in group.layers}
                made |= overrides(group, scheme, self.calibration, makers)
        return made

    def _gather(
        self, scales: Mapping[str, _Scales], overlay: Overlay, reference: Mapping[int, Any], positions: Sequence[int]
    ) -> float:
        """Forwards and backwards over some batches; adds up the scales' gradients and returns the KL in nats."""
        stream, kl_nats = self.stream, 0.0
        batches = [self.batches[p] for p in positions]
        known = [reference[p] for p in positions]

        def behind(hidden: Sequence[Any]) -> list[Tensor]:
            nonlocal kl_nats
            gradients, kl_nats = self._behind(scales, overlay, batches, known, hidden)
            return gradients

        def opened(index: int) -> AbstractContextManager[object]:
            return self._weights(scales, [name for name in scales if stream.block_of(name) == index])

        backward(stream, batches, overlay, behind, opened)
        return kl_nats

    def _behind(
        self,
        scales: Mapping[str, _Scales],
        overlay: Overlay,
        batches: Sequence[Any],
        known: Sequence[Any],
        hidden: Sequence[Any],
    ) -> tuple[list[Tensor], float]:
        """From the divergence of the outputs to what comes out of the last block (to the input, without a cut); and the
        divergence for each event.
        """
        stream = self.stream

        def opened(overlay: Overlay) -> AbstractContextManager[object]:
            return stream.block(0, overlay) if stream.whole else stream.outer(overlay)

        events = float(
            sum(int(self.outcome.events(b, rows_of_batch(h, b)).sum()) for b, h in zip(batches, hidden, strict=True))
        )
        gradients: list[Tensor] = []
        total = 0.0
        layers = [name for name in scales if stream.whole or stream.block_of(name) is None]
        for batch, reference, given in zip(batches, known, hidden, strict=True):
            leaf = given.detach().to(stream.device).requires_grad_() if isinstance(given, Tensor) else given
            for rows, window in [(slice(None), batch)] if stream.whole else windows_of(batch):
                # Opened for each window: logits of more than one are never held.
                with torch.no_grad(), opened({}):
                    expected = stream.leave(reference if stream.whole else reference[rows], window)
                with opened(overlay), self._weights(scales, layers):
                    output = stream.run(0, batch, NO_CALL) if stream.whole else stream.leave(leaf[rows], window)
                    divergence = self.outcome.divergence(expected, output, window) / events
                    torch.autograd.backward(divergence)
                    total += float(divergence.detach())
                del expected, output, divergence
            if isinstance(leaf, Tensor) and leaf.grad is not None:
                gradients.append(leaf.grad)
            trim()
        return gradients, total

    def _weights(self, scales: Mapping[str, _Scales], layers: Sequence[str]) -> AbstractContextManager[None]:
        """Lets the materialised weights of `layers` gather gradients while open, and hands these on."""
        return gathered(self.stream, layers, lambda name, gradient: scales[name].add(gradient))


def _schedule(number: int, steps: int) -> float:
    """Share of the rate in step `number` of `steps`: a warm-up, then half a cosine."""
    return min(1.0, number / WARM_UP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * (number - 1) / steps))


def _size(batch: Any) -> int:
    ids = getattr(batch, "ids", None)
    return int(ids.numel()) if isinstance(ids, Tensor) else STEP_TOKENS
