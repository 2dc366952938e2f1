"""Serving along a ladder: batches are what each sequence alone would be, rungs are recorded, budgets kept."""

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import lowprec
from lowprec.artifacts.loading import cache_argument
from lowprec.artifacts.nested import level_vectors, load_nested, stored_digest
from lowprec.errors import ArtifactError, ConfigError
from lowprec.ladder import Ladder, write_ladder
from lowprec.live import LiveServer, Request
from lowprec.live.slots import Slots
from lowprec.runtime.controller import Controller, Objectives
from lowprec.runtime.demand import Reading
from lowprec.runtime.spending import LossBudget
from lowprec.runtime.switch import Switch
from lowprec.simulate.measure import worst_window
from lowprec.simulate.policies import Static
from tests import tiny
from tests.ladders import ladder
from tests.test_nested import write
from tests.test_switch import nested_llama

SLOTS, RUNGS = 4, 3
MIDDLE = {"attention": 4, "mlp": 8, "head": 8}


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Switch]:
    """Three rungs, in float32, so that batches of other sizes differ by rounding alone."""
    names = [name for name, m in tiny.decoder("llama-untied").named_modules() if isinstance(m, torch.nn.Linear)]
    groups = {
        "attention": [n for n in names if ".self_attn." in n],
        "mlp": [n for n in names if ".mlp." in n],
        "head": ["lm_head"],
    }
    model, switch = nested_llama(groups=groups, rungs=(4, MIDDLE, 8))
    return model.float(), switch


class Clock:
    """A clock that goes on by a step at every look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Watched(Controller):
    """Keeps the stretches of tokens, and what the scheduler said."""

    def watch(self) -> "Watched":
        """Begins to."""
        self.stretches: list[tuple[int, int]] = []
        self.readings: list[Reading] = []
        return self

    def decide(self, reading: Reading) -> int:
        """As it does."""
        self.readings.append(reading)
        return super().decide(reading)

    def count(self, phase: Any, rung: int, made: int, tokens: int, seconds: float, passes: int = 1) -> None:
        """As it does."""
        if made:
            self.stretches.append((rung, made))
        super().count(phase, rung, made, tokens, seconds, passes)


def watched(budget: float = 0.5, ttft_s: float = 1.0) -> Watched:
    objectives = Objectives(ttft_s=ttft_s, tpot_s=1.0)
    return Watched(ladder(RUNGS), objectives, LossBudget(nats_per_token=budget), slots=SLOTS).watch()


def server(llama: tuple[Any, Switch], policy: Any, step: float = 0.02, **given: Any) -> LiveServer:
    model, switch = llama
    return LiveServer(model, tiny.tokenizer(), switch, policy, slots=SLOTS, clock=Clock(step), **given)


def prompt(length: int, seed: int = 0) -> list[int]:
    found: list[int] = tiny.batch(1, length, seed)[0].tolist()
    return found


@torch.no_grad()
def alone(llama: tuple[Any, Switch], ids: Sequence[int], rungs: Sequence[int], made: Sequence[int]) -> list[Tensor]:
    """Logits of each pass when a sequence runs by itself, each of its passes pinned to the rung that is given."""
    model, switch = llama
    cache, found, given = DynamicCache(), [], list(ids)
    for rung, token in zip(rungs, made, strict=True):
        with switch.pinned(rung):
            output = model(input_ids=torch.tensor([given]), use_cache=True, **{cache_argument(model): cache})
        found.append(output.logits[0, -1])
        given = [token]
    return found


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), data=st.data())
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2"])
def test_slots_hold_what_caches_of_single_sequences_do(name: str, lengths: list[int], data: st.DataObject) -> None:
    model, slots = tiny.decoder(name).float(), Slots(4)
    argument = cache_argument(model)
    texts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    with torch.inference_mode():
        for ids in texts:
            cache = DynamicCache()
            model(input_ids=torch.tensor([ids]), use_cache=True, **{argument: cache})
            slots.add(cache, len(ids))
        for step in range(4):
            for ids in texts:
                ids.append((7 * step + len(ids)) % tiny.WORDS)
            given = torch.tensor([[ids[-1]] for ids in texts])
            found = model(input_ids=given, use_cache=True, **{argument: slots}, **slots.begin(torch.float32)).logits
            slots.end()
            for ids, logits in zip(texts, found, strict=True):
                torch.testing.assert_close(logits[-1], model(torch.tensor([ids])).logits[0, -1], rtol=1e-3, atol=1e-3)
            if len(texts) > 1 and data.draw(st.booleans()):
                row = data.draw(st.integers(0, len(texts) - 1))
                slots.remove(row)
                texts[row] = texts[-1]
                texts.pop()
    assert slots.lengths == [len(ids) for ids in texts]


def test_slots_grow_and_are_limited() -> None:
    model, slots = tiny.decoder("llama").float(), Slots(1)
    cache, ids = DynamicCache(), prompt(255)
    argument = cache_argument(model)
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]), use_cache=True, **{argument: cache})
        slots.add(cache, 255)
        for token in (1, 2, 3):
            ids.append(token)
            given = {argument: slots, **slots.begin(torch.float32)}
            found = model(input_ids=torch.tensor([[token]]), use_cache=True, **given).logits[0, -1]
            slots.end()
        expected = model(torch.tensor([ids])).logits[0, -1]
    assert slots.keys[0].shape[2] == 512
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        slots.add(cache, 255)


def test_every_recorded_rung_gave_the_logits(llama: tuple[Any, Switch]) -> None:
    """Requests of several lengths and efforts in one server whose controller moves."""
    policy = watched(ttft_s=1.5)
    live, logits = server(llama, policy), dict[int, list[Tensor]]()
    requests: list[Request] = []
    # A batch runs at its highest floor, so those of one kind stand together.
    efforts = ["low"] * 10 + ["medium"] * 6 + ["high"] * 4 + ["low"] * 4
    for number in range(24):
        logits[number] = []

        def pick(row: Tensor, into: list[Tensor] = logits[number]) -> int:
            into.append(row)
            return int(row.argmax())

        requests.append(live.submit(prompt(3 + number, number), 12, efforts[number], stop=(), pick=pick))
    while live.step():
        pass
    floors = {"low": 0, "medium": 1, "high": 2}
    for number, request in enumerate(requests):
        answer = live.answer(request)
        expected = alone(llama, request.prompt, answer.rungs, answer.tokens)
        for found, wanted in zip(logits[number], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-3)
        assert len(answer.rungs) == len(answer.tokens) == 12
        assert min(answer.rungs) >= floors[efforts[number]]
        assert 0 <= answer.waited_s < answer.first_s < answer.seconds
    seen = {rung for request in requests for rung in request.account.rungs()}
    assert seen == {0, 1, 2}, "it moved"
    low = next(r for r in requests if 0 in r.account.rungs())
    at = low.account.rungs().index(0)
    other = [2] * 12
    wrong = alone(llama, low.prompt, other, low.tokens)
    assert float((wrong[at] - logits[requests.index(low)][at]).abs().max()) > 0.02, "another rung has other logits"


def test_the_scheduler_says_what_it_does(llama: tuple[Any, Switch]) -> None:
    policy = watched()
    live = server(llama, policy, chunk=16)
    for number, length in enumerate((10, 20, 3, 2, 5, 4)):
        live.submit(prompt(length, number), 2 + number, "high", stop=())
    while live.step():
        pass
    first, second = policy.readings[:2]
    # Ten tokens and the first six of twenty; four requests wait.
    assert (first.prefill_tokens, first.decode_tokens, first.queue_length, first.admitted) == (16, 0, 4, 2)
    # The other fourteen and two of three, while the first decodes.
    assert (second.prefill_tokens, second.decode_tokens, second.queue_length, second.admitted) == (16, 1, 3, 1)
    assert sum(r.admitted for r in policy.readings) == 6
    assert sum(r.prefill_tokens for r in policy.readings) == 44
    assert max(r.decode_tokens for r in policy.readings) <= SLOTS
    assert all(r.is_sane() for r in policy.readings)
    assert sum(made for _, made in policy.stretches) == sum(range(2, 8))
    assert (live.waiting, live.running) == (0, 0)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budget=st.floats(0.012, 0.12), seed=st.integers(0, 99), window=st.integers(50, 400))
def test_no_window_loses_more_than_the_budget(llama: tuple[Any, Switch], budget: float, seed: int, window: int) -> None:
    """However long the queue, and by the prices that the tokens' own rungs have."""
    spent = LossBudget(nats_per_token=budget, window_tokens=window)
    policy = Watched(ladder(RUNGS), Objectives(ttft_s=1.0, tpot_s=1.0), spent, slots=SLOTS).watch()
    live = server(llama, policy, step=0.05)
    requests = [live.submit(prompt(4, seed + n), 24, "low", stop=()) for n in range(20)]
    while live.step():
        pass
    losses = [rung.loss_upper for rung in policy.ladder.rungs]
    assert worst_window(policy.stretches, losses, window) <= budget * (1 + 1e-9)
    answers = [live.answer(request) for request in requests]
    mean = sum(a.loss_nats for a in answers) / len(answers)
    made = [sum(n for rung, n in policy.stretches if rung == r) for r in range(RUNGS)]
    assert mean == pytest.approx(sum(n * loss for n, loss in zip(made, losses, strict=True)) / sum(made), rel=1e-6)


def test_chunks_threads_and_batches_do_not_change_answers(llama: tuple[Any, Switch]) -> None:
    texts = [prompt(5 + 9 * n, n) for n in range(6)]
    one = server(llama, watched(ttft_s=1000.0))
    expected = [one.generate(ids, 10, "high", stop=()).tokens for ids in texts]
    for chunk in (4, 512):
        live, found = server(llama, watched(ttft_s=1000.0), chunk=chunk), dict[int, tuple[int, ...]]()

        def ask(number: int, live: LiveServer = live, found: dict[int, tuple[int, ...]] = found) -> None:
            torch.set_num_threads(1)
            found[number] = live.generate(texts[number], 10, "high", stop=()).tokens

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[n] for n in range(6)] == expected


def test_an_answer_ends_where_it_should(llama: tuple[Any, Switch]) -> None:
    live = server(llama, Static(ladder(RUNGS), 1, prompts=2))
    free = live.generate("w1 w2 w3", 8, stop=())
    assert len(free.tokens) == 8
    assert free.rungs == (2, *[1] * 7)
    assert free.text == tiny.tokenizer().decode(list(free.tokens))
    first = free.tokens.index(free.tokens[2])
    assert live.generate("w1 w2 w3", 8, stop=[free.tokens[2]]).tokens == free.tokens[: first + 1]
    assert live.generate(prompt(3), 1).rungs == (2,), "the pass over the prompt makes one"
    assert live.generate(prompt(3), 3, pick=lambda row: 5, stop=()).tokens == (5, 5, 5)
    assert not live.step()


def test_bad_requests_are_refused_before_they_are_served(llama: tuple[Any, Switch]) -> None:
    live = server(llama, watched())
    for asked, words in (
        (([], 4), "a prompt of 0 tokens"),
        ((prompt(3), 0), "an answer of 0"),
        ((prompt(3), 4096), "more than the 2048 that this model attends to"),
        (([1, tiny.WORDS], 4), "outside the vocabulary of 300"),
        ((prompt(3), 4, "hgih"), "unknown effort 'hgih': did you mean 'high'"),
    ):
        with pytest.raises(ConfigError, match=words):
            live.submit(*asked)
    assert not live.step()
    model, switch = llama
    with pytest.raises(ConfigError, match="without a tokenizer"):
        LiveServer(model, None, switch, watched(), slots=SLOTS).submit("w1")
    two = Controller(ladder(2), Objectives(ttft_s=1.0, tpot_s=1.0), LossBudget(nats_per_token=0.5), slots=SLOTS)
    with pytest.raises(ConfigError, match="the model has 3 rungs and the policy 2"):
        LiveServer(model, None, switch, two, slots=SLOTS)


# --- from a run's folder


def of_run(path: Path) -> Ladder:
    """Writes a nested artefact and a ladder for it, as a run does."""
    _, _, nested = write(path / "nested")
    blocks = {f"blocks.{i}": tuple(n for n in nested if f".layers.{i}." in n) for i in range(3)}
    made = ladder(RUNGS)
    rungs = [
        dataclasses.replace(rung, levels=tuple((g, "int4" if i >= index else "int8") for i, g in enumerate(blocks)))
        for index, rung in zip((0, 2, 3), made.rungs, strict=True)
    ]
    found = dataclasses.replace(
        made, model_digest=stored_digest(path / "nested"), rungs=tuple(rungs), layers=tuple(blocks.items())
    )
    write_ladder(found, path / "ladder.json")
    return found


ASKED: dict[str, Any] = {"ttft_s": 1.0, "tpot_s": 0.1, "nats_per_token": 0.2, "slots": SLOTS}


def test_a_run_is_served(tmp_path: Path) -> None:
    made = of_run(tmp_path)
    live = lowprec.serve(tmp_path, **ASKED)
    assert [len(set(rung)) for rung in live.switch.rungs] == [1, 2, 1]
    assert level_vectors(made)[1] == {"blocks.0": 8, "blocks.1": 8, "blocks.2": 4}
    answer = live.generate(prompt(5), 6, "high", stop=())
    assert answer.rungs == (2,) * 6
    assert answer.text is None


def test_what_is_no_run_to_serve(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no ladder.json: make it by lowprec calibrate --ladder"):
        lowprec.serve(tmp_path, **ASKED)
    made = of_run(tmp_path)
    for changed, words in (
        ({"nats_per_token": -0.1}, "budget -0.1 nats per token is outside"),
        ({"nats_per_token": 0.001}, "but the top rung 'r2' loses up to 0.0055"),
        ({"request_budget": LossBudget(nats_per_token=0.001)}, "budget of a request of 0.001 nats per token"),
        ({"ttft_s": float("nan")}, "time to first token of nan s"),
    ):
        with pytest.raises(ConfigError, match=words):
            lowprec.serve(tmp_path, **ASKED | changed)
    write_ladder(dataclasses.replace(made, model_digest="0" * 16), tmp_path / "ladder.json")
    with pytest.raises(ConfigError, match="with digest 0000000000000000, this model's is"):
        lowprec.serve(tmp_path, **ASKED)
    with pytest.raises(ConfigError, match="does not say which layers its groups have"):
        load_nested(tmp_path / "nested", ladder=dataclasses.replace(made, layers=()))
    with pytest.raises(ArtifactError, match="is no folder of an artefact"):
        load_nested(tmp_path / "elsewhere", ladder=made)
    (tmp_path / "nested" / "residual.safetensors").unlink()
    write_ladder(made, tmp_path / "ladder.json")
    with pytest.raises(ArtifactError, match="has one plane, so level 4 alone"):
        lowprec.serve(tmp_path, **ASKED)
