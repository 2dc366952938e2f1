"""Sentence encoders, judged by the distance of their embeddings from the reference's, and by nearest neighbours.

    loss             1 - cos of the reference's and the method's embedding of a window, mean over windows
    same neighbour   share of the exam's questions whose nearest neighbour among the others is the reference's

The first says how far embeddings move, the second whether a search would notice. Everything is computed in float32.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judging import (
    BATCH_TOKENS,
    CONFIDENCE,
    EVERYTHING,
    Bench,
    Cost,
    Method,
    bounds_over_units,
    cost_of,
    masks,
    pairs,
    remembered,
)
from scipy.stats import binomtest
from texts import questions
from torch import Tensor

from lowprec.steps.data import encoder_of
from lowprec.steps.load import Model
from lowprec.steps.measure import compare_vectors, run_through
from lowprec.steps.stream import NOTHING, Overlay, Stream
from lowprec.steps.tokens import TokenSet

WINDOW = 256
LOSSES, NEIGHBOURS = "losses.json", "neighbours.json"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """1 - cos on one text, mean over its windows, with its interval."""

    text: str
    windows: int
    loss: float
    lower: float
    upper: float


@dataclass(frozen=True, kw_only=True)
class Losses:
    """1 - cos of every window, in the order of the batches, and the digest of the text that they are of."""

    text: str
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """How many of `questions` have the reference's nearest neighbour: a share, with Wilson's interval."""

    questions: int
    as_reference: float
    lower: float
    upper: float


@dataclass(frozen=True, kw_only=True)
class Result(Cost):
    """One method's losses, time and memory."""

    scores: tuple[Loss, ...]
    neighbours: Neighbours


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Our loss less a peer's of the like grid, over all texts, paired window by window."""

    method: str
    peer: str
    difference: float
    lower: float
    upper: float


class Encoders(Bench):
    """Judges sentence embeddings."""

    title = "1 - cos [95 %]; nearest neighbours"
    window = WINDOW
    columns = ("same neighbour",)

    def __init__(self, model: Model, judged: TokenSet, packages: Path) -> None:
        super().__init__(model, judged)
        self._questions = Questions(model.tokenizer, packages)
        order = [window for batch in self.batches for window in batch.index]
        self._unit, self._source = (np.array(of)[order] for of in (judged.units, judged.sources))

    def result(self, method: Method, folder: Path, measured: Mapping[str, Any]) -> Result:
        """A method's line; losses are read back where they were found on this text before, neighbours where sought."""
        losses = np.array(self._losses(method, folder).values)
        return Result(
            **cost_of(method, measured),
            scores=tuple(self._loss(name, losses, mask) for name, mask in masks(self._source)),
            neighbours=remembered(Neighbours, folder / NEIGHBOURS, lambda: self._neighbours(method, folder)),
        )

    def row(self, result: Result) -> list[str]:
        """What the table shows behind time and memory."""
        cells = [f"{s.loss:.5f} [{s.lower:.5f}, {s.upper:.5f}]" for s in result.scores]
        return [*cells, f"{result.neighbours.as_reference:.1%}"]

    def differences(self, methods: Iterable[Method], folders: Mapping[str, Path]) -> list[Difference]:
        """Ours beside each peer that rounds to the like."""
        return [
            self._difference(*((m.name, np.array(self._losses(m, folders[m.name]).values)) for m in pair))
            for pair in pairs(methods)
        ]

    def _losses(self, method: Method, folder: Path) -> Losses:
        text = self.judged.digest

        def find() -> Losses:
            table = self.compared(folder, method.activation, compare_vectors(self.model.metric))
            return Losses(text=text, values=tuple(table[:, 1].tolist()))

        return remembered(Losses, folder / LOSSES, find, lambda known: known.text == text)

    def _loss(self, text: str, losses: Any, mask: Any) -> Loss:
        bounds = bounds_over_units(losses[mask], np.ones(mask.sum()), self._unit[mask])
        return Loss(text=text, windows=int(mask.sum()), loss=bounds.estimate, lower=bounds.lower, upper=bounds.upper)

    def _difference(self, ours: tuple[str, Any], peer: tuple[str, Any]) -> Difference:
        found = self._loss(EVERYTHING, ours[1] - peer[1], self._source >= 0)
        return Difference(method=ours[0], peer=peer[0], difference=found.loss, lower=found.lower, upper=found.upper)

    @cached_property
    def _expected(self) -> Tensor:
        return self._questions.nearest(self.stream, NOTHING)

    def _neighbours(self, method: Method, folder: Path) -> Neighbours:
        same = self._questions.nearest(*self.candidate(folder, method.activation)) == self._expected
        count, total = int(same.sum()), len(same)
        bounds = binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
        return Neighbours(questions=total, as_reference=count / total, lower=bounds.low, upper=bounds.high)


class Questions:
    """The exam's questions with their choices, without the answers: the texts to search among."""

    def __init__(self, tokenizer: Any, packages: Path) -> None:
        encoder = encoder_of(tokenizer)
        body = WINDOW - len(encoder.prefix) - len(encoder.suffix)
        found = encoder.encode([text.partition("\nA: ")[0] for _, text in questions(packages)])
        count = len(found)
        self._batches = TokenSet(
            ids=tuple(torch.tensor([*encoder.prefix, *ids[:body], *encoder.suffix]) for ids in found),
            units=tuple(range(count)),
            sources=(0,) * count,
            documents=tuple(map(str, range(count))),
            source_names=("exam",),
        ).batches(BATCH_TOKENS)

    @torch.no_grad()
    def nearest(self, stream: Stream, overlay: Overlay) -> Tensor:
        """[questions] index of the other question with the most similar embedding."""
        done = run_through(stream, self._batches, overlay)
        with stream.outer(overlay):
            rows = [stream.leave(hidden, batch) for batch, hidden in zip(self._batches, done.hidden, strict=True)]
        embeddings = torch.cat(rows)
        # In the order of the batches, which is the same for all.
        return (embeddings @ embeddings.T).fill_diagonal_(-torch.inf).argmax(1)
