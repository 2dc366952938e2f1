"""What a model's output means: how a small change of it is weighed, and which positions count.

The sensitivity needs log p(y | input) with y sampled from the model itself; its gradient is the score function, whose
square averages to the Fisher information, the second derivative of KL(reference || changed).

- `Tokens`: logits over a vocabulary at every position. y is one sampled next token per position.
- `Vector`: an output o without probabilities (an embedding) is taken as the mean of a Gaussian of unit variance. Then
  the score of y = o + r is r, and KL = |o' - o|^2 / 2: half the squared output error, which for normalised sentence
  embeddings is exactly their cosine loss 1 - cos.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

# Rows of logits that are held in float32 at a time.
ROWS_AT_ONCE = 64


class Outcome(Protocol):
    """How an output is weighed."""

    def positions(self, batch: Any) -> Tensor | None:
        """[B, T] bool, True where the batch holds something real; None when everything is."""

    def events(self, batch: Any, output: Tensor) -> Tensor:
        """[B] how many predictions each row makes: KL is reported per event."""

    def sampled_log_likelihood(self, output: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
        """Scalar: the log-likelihood of labels sampled from `output`, summed over the batch."""

    def divergence(self, reference: Tensor, output: Tensor, batch: Any) -> Tensor:
        """Scalar: KL(reference || output) in nats, summed over the batch."""


def _positions(batch: Any) -> Tensor | None:
    if hasattr(batch, "lengths"):
        lengths: Tensor = batch.lengths
        return torch.arange(batch.ids.shape[1], device=lengths.device)[None] < lengths[:, None]
    if isinstance(batch, Mapping) and "attention_mask" in batch:
        mask: Tensor = batch["attention_mask"]
        return mask.bool()
    return None


def _at(output: Tensor, where: Tensor | None) -> Tensor:
    """[B, T, V] -> [R, V] at the positions that count; no copy where all do."""
    return output.flatten(0, 1) if where is None or bool(where.all()) else output[where.to(output.device)]


class Tokens:
    """Logits [B, T, V] over the next token."""

    def positions(self, batch: Any) -> Tensor | None:
        """Real tokens of right-padded windows."""
        return _positions(batch)

    def events(self, batch: Any, output: Tensor) -> Tensor:
        """Real tokens per row."""
        where = self.positions(batch)
        return torch.full((output.shape[0],), output.shape[1]) if where is None else where.sum(1)

    def sampled_log_likelihood(self, output: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
        """Sum over real positions of log p(y), y ~ p."""
        flat = _at(output, self.positions(batch))
        with torch.no_grad():
            labels = _sample(flat, generator)

        def score(rows: slice, found: Tensor) -> tuple[Tensor, Tensor]:
            label = labels[rows, None]
            likelihood = found.gather(1, label)
            return likelihood.sum(), found.exp_().neg_().scatter_add_(1, label, torch.ones_like(likelihood))

        return _summed(flat, score)

    def divergence(self, reference: Tensor, output: Tensor, batch: Any) -> Tensor:
        """Sum over real positions of KL over the vocabulary."""
        expected, logits = (_at(x, self.positions(batch)) for x in (reference, output))

        def score(rows: slice, found: Tensor) -> tuple[Tensor, Tensor]:
            wanted = expected[rows].log_softmax(-1, dtype=found.dtype)
            likely = wanted.exp()
            return (likely * (wanted - found)).sum(), found.exp_().sub_(likely)

        return _summed(logits, score)


Score = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""Rows and their log-probabilities [R, V] -> a scalar, and its gradient by the rows' logits."""


class _Summed(torch.autograd.Function):
    """Sum of a score over logits [R, V], a few rows at a time, whose gradient is known at once.

    So no copy of the logits is held but that gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, score: Score) -> Tensor:
        gradient, total = torch.empty_like(logits), torch.zeros((), device=logits.device)
        for start in range(0, len(logits), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            wide = torch.promote_types(logits.dtype, torch.float32)
            value, gradient[rows] = score(rows, logits[rows].log_softmax(-1, dtype=wide))
            total += value
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        # In place: it is as large as the logits. A second pass backwards would be refused.
        return gradient.mul_(outer[0].to(gradient)), None


def _summed(logits: Tensor, score: Score) -> Tensor:
    total: Tensor = _Summed.apply(logits, score)  # type: ignore[no-untyped-call]
    return total


class Vector:
    """An output [B, ...] without probabilities."""

    def positions(self, batch: Any) -> Tensor | None:
        """Whatever the batch's attention mask says."""
        return _positions(batch)

    def events(self, batch: Any, output: Tensor) -> Tensor:
        """One per row."""
        return torch.ones(output.shape[0], dtype=torch.long)

    def sampled_log_likelihood(self, output: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
        """<r, o> with r ~ N(0, I): its gradient is the score of a sample of the unit Gaussian around o."""
        noise = torch.randn(output.shape, generator=generator).to(output)
        return (noise * output).sum()

    def divergence(self, reference: Tensor, output: Tensor, batch: Any) -> Tensor:
        """Half the squared error."""
        return 0.5 * (output - reference).float().square().sum()


def _sample(logits: Tensor, generator: torch.Generator, chunk: int = ROWS_AT_ONCE) -> Tensor:
    """One category per row of `logits` [R, V], by inverting the distribution function; chunked to stay small.

    The random numbers come from the CPU's generator, so that every device samples the same labels.
    """
    drawn = torch.rand(logits.shape[0], 1, generator=generator).to(logits.device)
    labels = torch.empty(logits.shape[0], dtype=torch.long, device=logits.device)
    for start in range(0, logits.shape[0], chunk):
        rows = slice(start, start + chunk)
        cumulative = logits[rows].float().softmax(-1).cumsum(-1)
        labels[rows] = torch.searchsorted(cumulative, drawn[rows] * cumulative[:, -1:]).squeeze(-1)
    return labels.clamp_max(logits.shape[1] - 1)
