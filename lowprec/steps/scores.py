"""What a quantised model loses per window of text, beside its reference: the judge's raw material.

Per predicted token, with p = softmax(reference logits), q = softmax(logits) and label y, all in float32:
    loss_reference = -log p_y,  loss = -log q_y,  kl = sum_v p_v (log p_v - log q_v),  top1 = [argmax p = argmax q].
A window keeps the sums over its tokens, in nats. Perplexity is exp(sum loss / tokens), so its relative increase is
exp(sum (loss - loss_reference) / tokens) - 1: a function of one ratio of sums, which is what the judge resamples.

`PairedValues` is the same for other metrics: a value per example before and after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lowprec.errors import ConfigError, ModelError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
CHUNK_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairedScores:
    """One entry per window, [W] each: losses and KL are sums in nats, `top1` counts tokens with equal first choices."""

    unit: Ints
    source: Ints
    tokens: Ints
    loss_reference: Floats
    loss: Floats
    kl: Floats
    top1: Ints

    def __post_init__(self) -> None:
        _check(self, ("unit", "source", "tokens", "loss_reference", "loss", "kl", "top1"))

    def __len__(self) -> int:
        return len(self.unit)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairedValues:
    """One entry per example, [E] each: the metric's value for the reference and for the quantised model.

    Args:
        weight: how much an example counts (1 for a question).
        better: whether a higher or a lower value is the better one; a change for the worse is positive.
    """

    unit: Ints
    source: Ints
    weight: Floats
    reference: Floats
    candidate: Floats
    better: Literal["higher", "lower"] = "lower"

    def __post_init__(self) -> None:
        _check(self, ("unit", "source", "weight", "reference", "candidate"))

    def __len__(self) -> int:
        return len(self.unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSums:
    """Sums over each independent unit of a text, [U] each: tokens, what was lost to the reference and KL, in nats."""

    tokens: tuple[float, ...]
    loss: tuple[float, ...]
    kl: tuple[float, ...]


def unit_sums(scores: PairedScores) -> UnitSums:
    """The windows of each unit as one."""
    _, place = np.unique(scores.unit, return_inverse=True)
    columns = {"tokens": scores.tokens, "loss": scores.loss - scores.loss_reference, "kl": scores.kl}
    return UnitSums(**{name: tuple(np.bincount(place, column).tolist()) for name, column in columns.items()})


def _check(record: Any, names: Sequence[str]) -> None:
    arrays = {name: getattr(record, name) for name in names}
    if len({array.shape for array in arrays.values()}) != 1 or arrays[names[0]].ndim != 1:
        raise ValueError(f"arrays of different shapes: { {name: array.shape for name, array in arrays.items()} }")
    for name, array in arrays.items():
        bad = np.flatnonzero(~np.isfinite(array))
        if len(bad):
            raise ModelError(f"{name} of window {bad[0]} is {array[bad[0]]}: the model gives NaN or infinite logits")


def concatenate(parts: Sequence[PairedScores]) -> PairedScores:
    """All windows of `parts`, in order."""
    names = PairedScores.__dataclass_fields__
    return PairedScores(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def concatenate_values(parts: Sequence[PairedValues]) -> PairedValues:
    """All examples of `parts`, in order; they must agree on which values are better."""
    if len({part.better for part in parts}) != 1:
        raise ValueError("parts disagree on which values are better")
    names = ("unit", "source", "weight", "reference", "candidate")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return PairedValues(**arrays, better=parts[0].better)


def perplexity_increase(scores: PairedScores) -> float:
    """Relative increase of the perplexity over all tokens; 0.05 is 5 %."""
    return float(np.expm1((scores.loss - scores.loss_reference).sum() / scores.tokens.sum()))


def perplexities(scores: PairedScores) -> tuple[float, float]:
    """Perplexity of the reference and of the quantised model."""
    tokens = scores.tokens.sum()
    return float(np.exp(scores.loss_reference.sum() / tokens)), float(np.exp(scores.loss.sum() / tokens))


def mean_kl(scores: PairedScores) -> float:
    """KL(reference || quantised) in nats per token."""
    return float(scores.kl.sum() / scores.tokens.sum())


def top1_agreement(scores: PairedScores) -> float:
    """Share of tokens at which both models have the same first choice."""
    return float(scores.top1.sum() / scores.tokens.sum())


def token_scores(
    logits_reference: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, chunk: int = CHUNK_TOKENS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of each token, in float32 whatever the logits' dtype.

    Args:
        logits_reference, logits: [T, V]; labels: [T] int64; chunk: rows that are worked on at once.

    Returns:
        loss_reference, loss, kl: [T] float32 in nats; top1: [T] bool. Two buffers of [chunk, V] float32 are alive at a
        time: taking the log-probabilities apart first keeps a KL of 1e-4 nats from drowning in logits of size 30.
    """
    if logits_reference.shape != logits.shape or labels.shape != logits.shape[:1]:
        raise ValueError(f"shapes {tuple(logits_reference.shape)}, {tuple(logits.shape)}, {tuple(labels.shape)}")
    loss_reference, loss, kl = (torch.empty(len(labels), device=logits.device) for _ in range(3))
    top1 = torch.empty(len(labels), dtype=torch.bool, device=logits.device)
    for start in range(0, len(labels), chunk):
        rows = slice(start, start + chunk)
        label = labels[rows, None]
        log_p = torch.log_softmax(logits_reference[rows], -1, dtype=torch.float32)
        log_q = torch.log_softmax(logits[rows], -1, dtype=torch.float32)
        loss_reference[rows] = -log_p.gather(1, label)[:, 0]
        loss[rows] = -log_q.gather(1, label)[:, 0]
        top1[rows] = log_p.argmax(-1) == log_q.argmax(-1)
        difference = torch.sub(log_p, log_q, out=log_q)
        # A token that the reference rules out has p = 0 and log p = -inf; it adds nothing.
        difference.masked_fill_(log_p == -torch.inf, 0.0)
        kl[rows] = torch.einsum("tv,tv->t", log_p.exp_(), difference)
    return loss_reference, loss, kl, top1


def change(values: PairedValues, kind: Literal["relative", "absolute"]) -> tuple[Floats, Floats]:
    """Numerator and denominator [E] whose ratio of sums is the change for the worse.

    Raises:
        ConfigError: a relative change against a reference whose sum is not positive.
    """
    sign = 1.0 if values.better == "lower" else -1.0
    worse = sign * values.weight * (values.candidate - values.reference)
    if kind == "absolute":
        return worse, values.weight
    base = values.weight * values.reference
    if base.sum() <= 0:
        raise ConfigError(
            f"the reference's metric sums to {base.sum():g}, so no relative change exists: give an absolute budget"
        )
    return worse, base
