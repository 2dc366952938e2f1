"""Multiple choice: which letter a rounded model answers a question with, and whether the reference agrees.

The questions are MMLU's development questions (package `lm-eval`), without examples; the letter of the largest logit
among A, B, C and D after "The answer is (" is the model's answer. How often it is right says little of rounding, since
questions that flip either way cancel; how often it differs from the reference's says more.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from texts import questions
from torch import Tensor

from lowprec.steps.data import encoder_of
from lowprec.steps.measure import run_through
from lowprec.steps.stream import NOTHING, Overlay, Stream
from lowprec.steps.tokens import TokenSet

LETTERS = "ABCD"
WORKED = re.compile(rf"^(.*?\nA: ).*(The answer is \()([{LETTERS}])\)", re.DOTALL)
BATCH_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How often the letter is right, and how often it is the reference's, of `questions`."""

    questions: int
    right: float
    as_reference: float


class Exam:
    """The questions, and the reference's answers once it has run."""

    def __init__(self, stream: Stream, tokenizer: Any, packages: Path) -> None:
        found = list(_asked(tokenizer, packages))
        self._stream = stream
        self._right = torch.tensor([letter for _, letter, _ in found])
        self._letters = torch.tensor([letters for _, _, letters in found])
        count = len(found)
        self._batches = TokenSet(
            ids=tuple(ids for ids, _, _ in found),
            units=tuple(range(count)),
            sources=(0,) * count,
            documents=tuple(map(str, range(count))),
            source_names=("exam",),
        ).batches(BATCH_TOKENS)
        self._reference: Tensor | None = None

    def choices(self, stream: Stream, overlay: Overlay) -> Choices:
        """What a model answers under `overlay`; one that was turned has a stream of its own."""
        if self._reference is None:
            self._reference = self._answers(self._stream, NOTHING)
        answers = self._answers(stream, overlay)
        return Choices(
            questions=len(answers),
            right=float((answers == self._right).double().mean()),
            as_reference=float((answers == self._reference).double().mean()),
        )

    @torch.no_grad()
    def _answers(self, stream: Stream, overlay: Overlay) -> Tensor:
        """[questions] index of the letter."""
        answers = torch.empty(len(self._right), dtype=torch.int64)
        done = run_through(stream, self._batches, overlay)
        with stream.outer(overlay):
            for batch, hidden in zip(self._batches, done.hidden, strict=True):
                logits = stream.leave(hidden, batch)
                last = logits[torch.arange(len(batch.ids)), batch.lengths - 1]
                index = torch.tensor(batch.index)
                answers[index] = last.gather(1, self._letters[index]).argmax(1)
        return answers


def _asked(tokenizer: Any, packages: Path) -> Iterator[tuple[Tensor, int, list[int]]]:
    """(ids up to the letter, the right letter, the four letters' tokens), where each letter is one token there."""
    encoder = encoder_of(tokenizer)
    for _, text in questions(packages):
        if not (match := WORKED.match(text)):
            continue
        question, begun, letter = match.groups()
        ids, *complete = (encoder.encode([question + begun + more])[0] for more in ("", *LETTERS))
        if all(len(c) == len(ids) + 1 and list(c[:-1]) == list(ids) for c in complete):
            yield torch.tensor([*encoder.prefix, *ids]), LETTERS.index(letter), [int(c[-1]) for c in complete]
