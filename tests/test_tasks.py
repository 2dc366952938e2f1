"""Multiple-choice tasks: reading, scoring, refusal at chance level."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowprec.errors import ConfigError, DataError
from lowprec.records import Budget
from lowprec.steps.judge import judge
from lowprec.steps.tasks import (
    Question,
    check_above_chance,
    encode_pair,
    load_task,
    paired_answers,
)


class Characters:
    """One token per character, BOS in front."""

    eos_token_id = None

    def __init__(self, bos: bool = True, eos: bool = False) -> None:
        self.bos, self.eos = bos, eos
        self.eos_token_id = 2 if eos else None

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": [1] * self.bos + [ord(c) for c in text] + [2] * self.eos}


def question(choices: tuple[str, ...], answer: int) -> Question:
    return Question(context="Q:", continuations=tuple(f" {c}" for c in choices), answer=answer)


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_jsonl_and_its_two_names_for_the_context(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        [
            {"question": "2+2?", "choices": ["3", "4"], "answer": 1},
            {"context": "Sky", "choices": ["a", "b"], "answer": 0},
        ],
    )
    first, second = load_task(f"task:{path}")
    assert first == Question(context="2+2?", continuations=(" 3", " 4"), answer=1)
    assert second.context == "Sky"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "no text `question`"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "two or more"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "no index into 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "no index into 2"),
        ([1], "no object"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, record: Any, message: str) -> None:
    good = {"question": "q", "choices": ["a", "b"], "answer": 0}
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        load_task(str(write(tmp_path / "t.jsonl", [good, record])))


def test_files_that_are_no_task(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no task file"):
        load_task("task:nowhere.jsonl")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"\.jsonl or \.yaml"):
        load_task(f"task:{tmp_path / 'a.txt'}")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no question"):
        load_task(f"task:{tmp_path / 'a.jsonl'}")
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(DataError, match="line 1"):
        load_task(f"task:{tmp_path / 'a.jsonl'}")


def test_the_extra_for_lm_eval_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "a.yaml").write_text("task: a")
    with pytest.raises(ConfigError, match=r"pip install 'lowprec\[tasks\]'"):
        load_task(f"task:{tmp_path / 'a.yaml'}")


# lm-eval and what it brings warn on import.
@pytest.mark.filterwarnings("default")
def test_local_lm_eval_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    data = write(tmp_path / "d.jsonl", [{"q": f"Number {i}?", "c": ["no", "yes"], "a": i % 2} for i in range(4)])
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}} Answer:'\ndoc_to_choice: '{{c}}'\ndoc_to_target: a\n"
    )
    questions = load_task(f"task:{tmp_path / 'own.yaml'}")
    assert [q.answer for q in questions] == [0, 1, 0, 1]
    assert questions[0].context == "Number 0? Answer:"
    assert questions[0].continuations == (" no", " yes")
    data.unlink()
    with pytest.raises(DataError, match=r"own\.yaml cannot be read as a local lm-eval task"):
        load_task(f"task:{tmp_path / 'own.yaml'}")


def test_the_continuation_is_what_lies_beyond_the_context() -> None:
    context, continuation = encode_pair(Characters(), "ab ", "cd")
    assert context == (1, ord("a"), ord("b"))
    assert continuation == tuple(map(ord, " cd"))
    assert encode_pair(Characters(eos=True), "ab", " c") == ((1, ord("a"), ord("b")), (ord(" "), ord("c")))
    with pytest.raises(DataError, match="context of a question gives no token"):
        encode_pair(Characters(bos=False), "", "x")


def test_a_task_at_chance_level_is_refused_with_both_numbers() -> None:
    questions = [question(("a", "b", "c", "d"), 0)] * 100
    with pytest.raises(ConfigError, match=r"28\.0% of the 100 questions right and chance is 25\.0%"):
        check_above_chance(questions, (np.arange(100) < 28).astype(float))
    check_above_chance(questions, (np.arange(100) < 40).astype(float))


def test_the_drop_of_accuracy_is_relative_and_paired() -> None:
    reference = (np.arange(3000) < 2000).astype(float)
    candidate = (np.arange(3000) < 1980).astype(float)
    found = judge([paired_answers(reference, candidate)], Budget(metric="task:t.jsonl", limit=0.05), ("t.jsonl",))
    assert found.loss.relative == pytest.approx(0.01)
    assert found.verdict == "within"
    worse = judge([paired_answers(reference, candidate * (np.arange(3000) > 400))], Budget(metric="t"), ("t",))
    assert worse.verdict == "over"
