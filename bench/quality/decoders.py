"""Decoders, judged by perplexity and by the letters of a multiple choice."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exam import Choices, Exam
from judging import Bench, Cost, Method, bounds_over_units, cost_of, masks, remembered
from texts import WINDOW

from lowprec.steps.load import Model
from lowprec.steps.measure import compare_tokens, paired
from lowprec.steps.scores import PairedScores
from lowprec.steps.stream import Stream, fast_dtype
from lowprec.steps.tokens import TokenSet

SCORES, CHOICES = "scores.json", "choices.json"


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a method loses on one text: perplexity increase with its interval, and KL."""

    text: str
    tokens: int
    perplexity_increase: float
    lower: float
    upper: float
    kl_nats: float


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Scores that were found before, and the digest of the text that they are of."""

    text: str
    scores: tuple[Score, ...]


@dataclass(frozen=True, kw_only=True)
class Result(Cost):
    """One method's scores, time and memory."""

    scores: tuple[Score, ...]
    choices: Choices


class Decoders(Bench):
    """Judges in bfloat16 where that is fast; its own noise, 0.001 nats, is in all rows."""

    title = "perplexity increase [95 %]; multiple choice"
    window = WINDOW
    columns = ("KL", "right", "same letter")

    def __init__(self, model: Model, judged: TokenSet, packages: Path) -> None:
        super().__init__(model, judged)
        self._exam = Exam(self.stream, model.tokenizer, packages)

    def dtype_of(self, stream: Stream) -> torch.dtype:
        """What all is computed in."""
        return fast_dtype(stream)

    def result(self, method: Method, folder: Path, measured: Mapping[str, Any]) -> Result:
        """A method's line; scores are read back where they were found on this text before, answers where asked."""
        activation = method.activation
        text = self.judged.digest
        judged = remembered(
            Judged,
            folder / SCORES,
            lambda: Judged(text=text, scores=self._scores(folder, activation)),
            lambda known: known.text == text,
        )
        choices = remembered(Choices, folder / CHOICES, lambda: self._choices(folder, activation))
        return Result(
            **cost_of(method, measured),
            scores=judged.scores,
            choices=choices,
        )

    def row(self, result: Result) -> list[str]:
        """What the table shows behind time and memory."""
        cells = [f"{s.perplexity_increase:+.2%} [{s.lower:.2%}, {s.upper:.2%}]" for s in result.scores]
        choices = (f"{result.choices.right:.1%}", f"{result.choices.as_reference:.1%}")
        return [*cells, f"{result.scores[-1].kl_nats:.4f}", *choices]

    def _scores(self, folder: Path, activation: str | None) -> tuple[Score, ...]:
        """Per text, and over all of them."""
        found = paired(self.compared(folder, activation, compare_tokens), self.judged, self.batches)
        return tuple(_score(name, found, mask) for name, mask in masks(found.source))

    def _choices(self, folder: Path, activation: str | None) -> Choices:
        stream, overlay = self.candidate(folder, activation)
        with self.stream.computing(self.dtype), stream.computing(self.dtype):
            return self._exam.choices(stream, overlay)


def _score(text: str, found: PairedScores, mask: Any) -> Score:
    tokens = found.tokens[mask].sum()
    bounds = bounds_over_units((found.loss - found.loss_reference)[mask], found.tokens[mask], found.unit[mask])
    return Score(
        text=text,
        tokens=int(tokens),
        perplexity_increase=float(np.expm1(bounds.estimate)),
        lower=float(np.expm1(bounds.lower)),
        upper=float(np.expm1(bounds.upper)),
        kl_nats=float(found.kl[mask].sum() / tokens),
    )
