"""Multiple-choice tasks as a metric: `task:FILE`, a local JSONL file or a local lm-eval YAML.

A question's answer is the choice with the highest summed log-likelihood given the context (lm-eval's `acc`). As in
lm-eval (`api/model.py`, `_encode_pair`) the continuation's tokens are those of context + continuation beyond the
context's own, and blanks at the end of the context go to the continuation, where tokenizers expect them.

A task that the reference answers no better than chance cannot show a loss, so it is refused: one-sided binomial test
at 95 % against the mean of 1/choices. The loss is the relative drop of accuracy, paired per question (`steps.judge`).

JSONL: one object a line, {"question" or "context": text, "choices": [text, ...], "answer": index}.
Left out: generation tasks, several right answers, few-shot prompts other than those that the file itself contains.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lowprec.errors import ConfigError, DataError
from lowprec.steps.scores import PairedValues

PREFIX = "task:"
CHANCE_CONFIDENCE = 0.95

Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A context, the continuations to choose from (the blank between them included), and the index of the right one."""

    context: str
    continuations: tuple[str, ...]
    answer: int


def load_task(metric: str) -> tuple[Question, ...]:
    """Reads the questions of a metric `task:FILE` (or of a bare file name).

    Raises:
        ConfigError: a file of another kind, an lm-eval YAML without lm-eval, or a task that is no multiple choice.
        DataError: the file is missing, damaged or empty; names the line.
    """
    path = Path(metric.removeprefix(PREFIX)).expanduser()
    if not path.is_file():
        raise DataError(
            f"there is no task file {path}; give `task:` and the path of a local JSONL or lm-eval YAML file"
        )
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        questions = tuple(_from_lm_eval(path))
    elif suffix in (".jsonl", ".ndjson", ".json"):
        questions = tuple(_from_jsonl(path))
    else:
        raise ConfigError(f"a task is a .jsonl or .yaml file, not {path.name}")
    if not questions:
        raise DataError(f"{path} holds no question")
    return questions


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Token ids of the context, with the tokenizer's own special tokens, and of the continuation after it.

    Raises:
        DataError: the context is empty and the tokenizer puts no token before a text, or the continuation is empty.
    """
    bare = context.rstrip()
    blanks = context[len(bare) :]
    whole = list(tokenizer(bare + blanks + continuation)["input_ids"])
    head = list(tokenizer(bare)["input_ids"])
    tail = getattr(tokenizer, "eos_token_id", None)
    # A tokenizer that ends every text with a token would put it between context and continuation.
    if head and whole and tail is not None and head[-1] == whole[-1] == tail and len(head) > 1:
        head, whole = head[:-1], whole[:-1]
    if not head or len(whole) <= len(head):
        part = "context" if not head else "continuation"
        raise DataError(f"the {part} of a question gives no token ({context[-40:]!r}, {continuation[:40]!r})")
    return tuple(head), tuple(whole[len(head) :])


def check_above_chance(questions: Sequence[Question], right: NDArray[np.float64]) -> None:
    """Refuses a task at chance level.

    Raises:
        ConfigError: the reference's accuracy is not above chance; says both.
    """
    chance = float(np.mean([1.0 / len(question.continuations) for question in questions]))
    count = int(right.sum())
    if stats.binomtest(count, len(right), chance, alternative="greater").pvalue > 1.0 - CHANCE_CONFIDENCE:
        raise ConfigError(
            f"the unquantised model answers {count / len(right):.1%} of the {len(right)} questions right and chance is "
            f"{chance:.1%}: this task cannot show a loss; give an easier or a longer one"
        )


def paired_answers(reference: NDArray[np.float64], candidate: NDArray[np.float64], source: int = 0) -> PairedValues:
    """Right-or-wrong answers of both models, every question a unit of its own."""
    count = len(reference)
    return PairedValues(
        unit=np.arange(count),
        source=np.full(count, source),
        weight=np.ones(count),
        reference=reference,
        candidate=candidate,
        better="higher",
    )


def _from_jsonl(path: Path) -> Iterator[Question]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give a UTF-8 file") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _question(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}, line {number}: {error}; a line is "
                '{"question": "...", "choices": ["...", "..."], "answer": 0}'
            ) from error


def _question(record: Any) -> Question:
    if not isinstance(record, dict):
        raise TypeError("no object")
    context = record.get("question", record.get("context"))
    choices, answer = record.get("choices"), record.get("answer")
    if not isinstance(context, str):
        raise TypeError("no text `question` or `context`")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise TypeError("`choices` is no list of two or more texts")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"`answer` is {answer!r}, no index into {len(choices)} choices")
    return Question(
        context=context,
        continuations=tuple(f" {choice.strip()}" for choice in choices),
        answer=answer,
    )


def _from_lm_eval(path: Path) -> Iterator[Question]:
    """The questions of a local lm-eval task, without a network. A `!function` in the YAML runs that file's code."""
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path} is an lm-eval task: pip install 'lowprec[tasks]'") from error
    with _offline():
        manager = TaskManager(include_path=str(path.parent), include_defaults=False)
        try:
            loaded = manager.load(str(path))["tasks"]
        except Exception as error:  # whatever the reader of a foreign format, and the file's own functions, may raise
            raise DataError(
                f"{path} cannot be read as a local lm-eval task: {type(error).__name__}: {error}"
            ) from error
    tasks = list(loaded.values())
    if len(tasks) != 1 or tasks[0].OUTPUT_TYPE != "multiple_choice":
        raise ConfigError(f"{path} is not one multiple-choice task; tasks of other kinds and groups are not scored")
    task = tasks[0]
    delimiter = task.config.target_delimiter
    for document in task.eval_docs:
        choices, answer = task.doc_to_choice(document), task.doc_to_target(document)
        index = choices.index(answer) if isinstance(answer, str) else int(answer)
        yield Question(
            context=task.doc_to_text(document),
            continuations=tuple(f"{delimiter}{choice}" for choice in choices),
            answer=index,
        )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
