"""Healing: the scales of a rounded model, tuned end to end so that its outputs come back to the reference's.

    minimise over s   mean over positions of KL(reference || model(codes, s))

Codes stay as the solver left them; each scale is a parameter, which is a gain for every group of weights: rounding
errors that no layer can mend by itself are mended by others (EfficientQAT, arXiv 2407.11062, section 3.2, there with
the loss of the labels). Gradients: with w = s c, dL/ds = sum over the group of c dL/dw, so one dense gradient of the
layer serves all formats. Adam (arXiv 1412.6980) on log s, so that all scales move by like shares; a cosine schedule
with a short warm-up. What a layer computes with is always the scale rounded to bfloat16, as it will be stored; rounded
activations let gradients pass as if they were not rounded (straight-through). A table that an embedding shares with a
head keeps its scales.

The model is materialised block by block, forwards and then backwards with each block run again from its kept input, so
that memory is the codes, two blocks and a step's hidden states. Like all statistics it is computed in `fast_dtype`.
The amount of work is fixed in tokens, not in seconds: the same run gives the same scales on a slower machine.

Tried in a prototype (`bench/README.md` has what is built) on SmolLM2-135M, uniform INT4 g64, 32 k tokens, compensated
with token-weighted Hessians; KL in nats and perplexity over 5 k tokens each of four unlike texts: not healed 0.103,
+7.4 %; one pass at rates 1e-3, 2e-3, 4e-3 0.102, 0.100, 0.100 and +6.5, +5.5, +5.5 %; two passes at 4e-3 0.100, +5.5 %.
Left out because it did not pay: the norms' weights as parameters (0.103 at 1e-3), and the codes by straight-through
estimation (sixteen steps of Adam or of signs: 0.4 nats and worse; it takes more steps than there is text).
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

RATE = 3e-3
STEP_TOKENS = 4096
WARM_UP_STEPS = 4
NO_CALL: Call = ((), {})
DECAY_MEAN, DECAY_SQUARE, TINY = 0.9, 0.95, 1e-12


class _Scales:
    """One layer's codes, and its scales on their way."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self._start, self._format = weight, WEIGHT_FORMATS[weight.format]
        self._shift = torch.zeros_like(weight.scale)
        self._mean, self._square = torch.zeros_like(weight.scale), torch.zeros_like(weight.scale)
        self._gradient = torch.zeros_like(weight.scale)

    @property
    def weight(self) -> QuantizedWeight:
        """The codes with the scales as they would be stored now."""
        return replace(self._start, scale=self._format.store_scales(self._start.scale * self._shift.exp()))

    def dequantize(self) -> Tensor:
        """[N, K] float32."""
        return self.weight.dequantize()

    def add(self, gradient: Tensor) -> None:
        """Takes the gradient of the dense weight [N, K], and makes it one of log s [N, groups]."""
        n, groups = self._start.scale.shape
        grid = self._start.with_scale(torch.ones_like(self._start.scale))
        products = (grid.view(n, groups, -1) * gradient.cpu().float().view(n, groups, -1)).sum(-1)
        self._gradient += products * self._start.scale * self._shift.exp()

    def step(self, number: int, rate: float) -> None:
        """Adam's step `number`, counted from 1."""
        gradient, self._gradient = self._gradient, torch.zeros_like(self._gradient)
        self._mean.lerp_(gradient, 1.0 - DECAY_MEAN)
        self._square.lerp_(gradient.square(), 1.0 - DECAY_SQUARE)
        mean, square = self._mean / (1.0 - DECAY_MEAN**number), self._square / (1.0 - DECAY_SQUARE**number)
        self._shift -= rate * mean / (square.sqrt() + TINY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Healing:
    """A healing of one mix; `run` makes it.

    Attributes:
        schemes: group -> scheme.
        batches: calibration text.
        passes: how often it is gone through; 0.5 goes through half of it.
        rate: largest change of log s in a step.
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
            for number, positions in enumerate(steps, start=1):
                self._gather(scales, self._overlay(scales, fixed), reference, positions)
                for layer in scales.values():
                    layer.step(number, self.rate * _schedule(number, len(steps)))
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
    ) -> None:
        """Forwards and backwards over some batches; adds up the scales' gradients."""
        stream = self.stream
        batches = [self.batches[p] for p in positions]
        known = [reference[p] for p in positions]

        def behind(hidden: Sequence[Any]) -> list[Tensor]:
            return self._behind(scales, overlay, batches, known, hidden)

        def opened(index: int) -> AbstractContextManager[object]:
            return self._weights(scales, [name for name in scales if stream.block_of(name) == index])

        backward(stream, batches, overlay, behind, opened)

    def _behind(
        self,
        scales: Mapping[str, _Scales],
        overlay: Overlay,
        batches: Sequence[Any],
        known: Sequence[Any],
        hidden: Sequence[Any],
    ) -> list[Tensor]:
        """From the divergence of the outputs to what comes out of the last block (to the input, without a cut)."""
        stream = self.stream

        def opened(overlay: Overlay) -> AbstractContextManager[object]:
            return stream.block(0, overlay) if stream.whole else stream.outer(overlay)

        events = float(
            sum(int(self.outcome.events(b, rows_of_batch(h, b)).sum()) for b, h in zip(batches, hidden, strict=True))
        )
        gradients: list[Tensor] = []
        layers = [name for name in scales if stream.whole or stream.block_of(name) is None]
        for batch, reference, given in zip(batches, known, hidden, strict=True):
            with torch.no_grad(), opened({}):
                expected = stream.leave(reference, batch)
            leaf = given.detach().to(stream.device).requires_grad_() if isinstance(given, Tensor) else given
            with opened(overlay), self._weights(scales, layers):
                for rows, window in [(slice(None), batch)] if stream.whole else windows_of(batch):
                    output = stream.run(0, batch, NO_CALL) if stream.whole else stream.leave(leaf[rows], window)
                    torch.autograd.backward(self.outcome.divergence(expected[rows], output, window) / events)
            if isinstance(leaf, Tensor) and leaf.grad is not None:
                gradients.append(leaf.grad)
        return gradients

    def _weights(self, scales: Mapping[str, _Scales], layers: Sequence[str]) -> AbstractContextManager[None]:
        """Lets the materialised weights of `layers` gather gradients while open, and hands these on."""
        return gathered(self.stream, layers, lambda name, gradient: scales[name].add(gradient))


def _schedule(number: int, steps: int) -> float:
    """Share of the rate in step `number` of `steps`: a warm-up, then half a cosine."""
    return min(1.0, number / WARM_UP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * (number - 1) / steps))


def _size(batch: Any) -> int:
    ids = getattr(batch, "ids", None)
    return int(ids.numel()) if isinstance(ids, Tensor) else STEP_TOKENS
