"""Serving along a ladder: batches are what each sequence alone would be, rungs are recorded, budgets kept."""

import copy
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
from transformers import DynamicCache, Lfm2Config

import lowprec
from lowprec.artifacts.loading import cache_argument
from lowprec.artifacts.nested import level_vectors, load_nested, stored_digest
from lowprec.errors import ArtifactError, ConfigError, UnsupportedError
from lowprec.ladder import Ladder, write_ladder
from lowprec.live import LiveServer, Request
from lowprec.live.slots import Slots
from lowprec.records import RoundedPart
from lowprec.runtime.controller import Controller, Objectives
from lowprec.runtime.demand import Reading
from lowprec.runtime.kvcache import PARTS, RoundedLayer
from lowprec.runtime.request_cache import every_part, request_cache
from lowprec.runtime.serving_cache import serving_cache
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
    model = tiny.decoder(name).float()
    slots = Slots(model.config, (), 4)
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
    model = tiny.decoder("llama").float()
    slots = Slots(model.config, (), 1)
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
    # [S, H, C, D] keys and values of each layer, float32.
    config = model.config
    assert slots.bytes == 2 * 4 * 512 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
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


# --- what fails


def never(row: Tensor) -> int:
    raise ValueError("on purpose")


def at_once(count: int, *, then: BaseException | int) -> Any:
    """A pick that fails, or gives no token, in its `count`-th call."""
    calls = [0]

    def pick(row: Tensor) -> int:
        calls[0] += 1
        if calls[0] == count:
            if isinstance(then, BaseException):
                raise then
            return then
        return int(row.argmax())

    return pick


@pytest.mark.parametrize("then", [ValueError("on purpose"), tiny.WORDS, -1])
@pytest.mark.parametrize("count", [1, 3])
def test_a_request_that_fails_fails_alone(llama: tuple[Any, Switch], count: int, then: Any) -> None:
    """With its first token, or in the middle: the answers of the others are what they are without it."""
    texts = [prompt(5, n) for n in range(SLOTS + 2)]
    one = server(llama, watched(ttft_s=1000.0))
    expected = [one.generate(ids, 8, "high", stop=()).tokens for ids in texts]
    live = server(llama, watched(ttft_s=1000.0))
    requests = [
        live.submit(ids, 8, "high", stop=(), **({"pick": at_once(count, then=then)} if n == 1 else {}))
        for n, ids in enumerate(texts)
    ]
    while live.step():
        pass
    for n, request in enumerate(requests):
        assert request.done
        if n == 1:
            assert len(request.tokens) == count - 1
            with pytest.raises(ValueError, match=r"on purpose|which is no token of a vocabulary of 300"):
                live.answer(request)
        else:
            assert live.answer(request).tokens == expected[n]
    assert (live.waiting, live.running) == (0, 0)
    with pytest.raises(ValueError, match="on purpose"):
        live.generate(texts[0], 4, pick=never)


def test_a_pass_that_fails_fails_its_requests_and_no_others(llama: tuple[Any, Switch]) -> None:
    model, _ = llama
    live = server(llama, watched(ttft_s=1000.0))
    expected = live.generate(prompt(5), 6, "high", stop=()).tokens
    running = [live.submit(prompt(4, n), 6, "high", stop=()) for n in range(2)]
    live.step()
    failing = [True]

    def fail(_: Any, args: Any, kwargs: Any) -> None:
        # The decoding pass of both: one token of each, while a prompt is read beside it.
        if failing[0] and kwargs["input_ids"].shape == (2, 1):
            raise RuntimeError("out of memory")

    handle = model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        third = live.submit(prompt(5), 6, "high", stop=())
        while live.step():
            pass
    finally:
        handle.remove()
    for request in running:
        with pytest.raises(RuntimeError, match="out of memory"):
            live.answer(request)
    assert live.answer(third).tokens == expected
    assert (live.waiting, live.running) == (0, 0)


def test_ctrl_c_reaches_its_thread_and_leaves_a_server_that_serves(llama: tuple[Any, Switch]) -> None:
    live = server(llama, watched(ttft_s=1000.0))
    expected = live.generate(prompt(5), 4, "high", stop=()).tokens
    for count in (1, 3):
        other = live.submit(prompt(5), 4, "high", stop=())
        with pytest.raises(KeyboardInterrupt):
            live.generate(prompt(6), 8, "high", stop=(), pick=at_once(count, then=KeyboardInterrupt()))
        while live.step():
            pass
        if other.error is None:
            assert live.answer(other).tokens == expected
        else:
            with pytest.raises(RuntimeError, match="was ended by KeyboardInterrupt"):
                live.answer(other)
        assert (live.waiting, live.running) == (0, 0)
        assert live.generate(prompt(5), 4, "high", stop=()).tokens == expected


def test_who_is_given_up_is_neither_waited_for_nor_decoded(llama: tuple[Any, Switch]) -> None:
    policy = watched()
    live = server(llama, policy)
    taken = [live.submit(prompt(5, n), 12, "high", stop=()) for n in range(SLOTS)]
    left, stays = (live.submit(prompt(5, n), 2, "high", stop=()) for n in (7, 8))
    live.step()
    assert policy.readings[-1].queue_length == 2
    for request in (left, taken[1]):
        request.fail(KeyboardInterrupt(), live.clock())
    made = len(taken[1].tokens)
    live.step()
    assert live.waiting == policy.readings[-1].queue_length == 0, "a slot is free for who still waits"
    while live.step():
        pass
    assert len(taken[1].tokens) == made
    assert len(live.answer(stays).tokens) == 2
    assert all(len(live.answer(request).tokens) == 12 for request in (taken[0], *taken[2:]))


def test_a_policy_that_fails_loses_no_request(llama: tuple[Any, Switch]) -> None:
    class Broken(Watched):
        def decide(self, reading: Reading) -> int:
            if not self.readings:
                self.readings.append(reading)
                raise ValueError("nobody knows")
            return super().decide(reading)

    policy = Broken(ladder(RUNGS), Objectives(ttft_s=1.0, tpot_s=1.0), LossBudget(nats_per_token=0.5), slots=SLOTS)
    live = server(llama, policy.watch())
    first, second = (live.submit(prompt(5, n), 3, "high", stop=()) for n in range(2))
    with pytest.raises(ValueError, match="nobody knows"):
        live.step()
    while live.step():
        pass
    assert len(live.answer(first).tokens) == len(live.answer(second).tokens) == 3


def test_a_request_that_is_lost_is_not_waited_for(llama: tuple[Any, Switch]) -> None:
    live = server(llama, watched())

    def lose(row: Tensor) -> int:
        live._reading.clear()
        return 5

    with pytest.raises(RuntimeError, match="nothing to do, and this request is not done"):
        live.generate(prompt(3), 4, pick=lose, stop=())


def test_entering_a_request_waits_for_no_step(llama: tuple[Any, Switch]) -> None:
    """It is entered while a step runs, in another thread, and the next reading counts it."""
    policy = watched(ttft_s=1000.0)
    live, entered = server(llama, policy), list[Request]()

    def pick(row: Tensor) -> int:
        if not entered:
            thread = threading.Thread(
                target=lambda: entered.extend(live.submit(prompt(5, n), 2, "high", stop=()) for n in range(SLOTS + 1))
            )
            thread.start()
            thread.join(30)
            assert len(entered) == live.waiting == SLOTS + 1
        return int(row.argmax())

    assert len(live.generate(prompt(3), 3, "high", stop=(), pick=pick).tokens) == 3
    first, second = policy.readings[:2]
    assert (first.queue_length, second.queue_length, second.admitted) == (0, 2, SLOTS - 1)
    while live.step():
        pass
    assert all(len(live.answer(request).tokens) == 2 for request in entered)


def test_nan_in_a_slot_does_not_reach_who_stands_there_next() -> None:
    model = tiny.decoder("llama").float()
    slots, caches = Slots(model.config, (), 2), []
    with torch.inference_mode():
        for ids in (prompt(20, 1), prompt(9, 2), prompt(4, 3)):
            caches.append(request_cache(model, 16))
            logits = model(input_ids=torch.tensor([ids]), use_cache=True, **{cache_argument(model): caches[-1]}).logits
        spoilt = copy.deepcopy(caches[0])
        for layer in spoilt.layers:
            layer.values.fill_(torch.nan)
        for cache, length in ((caches[0], 20), (spoilt, 20)):
            slots.add(cache, length)
        slots.remove(1)
        slots.add(caches[2], 4)
        token = logits[:, -1:].argmax(-1)
        given = {cache_argument(model): slots, **slots.begin(torch.float32)}
        found = model(input_ids=token.expand(2, 1), use_cache=True, **given).logits[1, -1]
        expected = model(torch.tensor([[*prompt(4, 3), int(token)]])).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# --- caches of 8 bits


def generated(llama: tuple[Any, Switch], ids: Sequence[int], bits: int | None, tokens: int = 12) -> tuple[int, ...]:
    """What transformers' own loop gives for a prompt alone, at the top rung."""
    model, switch = llama
    with switch.pinned(RUNGS - 1):
        found = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), max_new_tokens=tokens,
            do_sample=False, pad_token_id=0, eos_token_id=None,
            **{cache_argument(model): request_cache(model, bits)},
        )  # fmt: skip
    return tuple(found[0, len(ids) :].tolist())


def parts_of(model: Any) -> list[RoundedPart]:
    """All keys and values but the first layer's keys."""
    modules = [name for name, _ in model.named_modules() if name.endswith("self_attn")]
    return [dataclasses.replace(p, module=modules[p.layer]) for p in every_part(model.config)[1:]]


@pytest.mark.parametrize("judged", [False, True])
def test_a_request_keeps_its_cache_in_the_bits_it_was_admitted_with(llama: tuple[Any, Switch], judged: bool) -> None:
    model, _ = llama
    with serving_cache(model, parts_of(model) if judged else []):
        bits = (16, 8, None, 8, 16, None)
        texts = [prompt(6 + 3 * n, n) for n in range(len(bits))]
        expected = [generated(llama, ids, b) for ids, b in zip(texts, bits, strict=True)]
        live = server(llama, watched(ttft_s=1000.0), chunk=16)
        asked = [live.submit(ids, 12, "high", stop=(), cache_bits=b) for ids, b in zip(texts, bits, strict=True)]
        most = 0
        while live.step():
            most = max(most, live.running)
        assert most <= SLOTS
        assert [live.answer(request).tokens for request in asked] == expected
        alone = server(llama, watched(ttft_s=1000.0))
        assert alone.generate(texts[1], 12, "high", stop=(), cache_bits=8).tokens == expected[1]
    assert len(live._batches) == 2


def test_codes_of_slots_are_those_of_the_request_and_take_fewer_bytes() -> None:
    model = tiny.decoder("llama").float()
    held = {bits: Slots(model.config, request_cache(model, bits).parts, 2) for bits in (8, 16)}
    for bits, slots in held.items():
        for number, length in enumerate((30, 12)):
            cache = request_cache(model, bits)
            with torch.inference_mode():
                given = {cache_argument(model): cache}
                model(input_ids=torch.tensor([prompt(length, number)]), use_cache=True, **given)
            slots.add(cache, length)
        slots.remove(0)
        slots._places.shown = 12
        for mine, layer in zip(slots.layers, cache.layers, strict=True):
            for part in PARTS:
                expected = layer._decoded(part) if isinstance(layer, RoundedLayer) else getattr(layer, part)
                assert torch.equal(mine._decoded(part), expected)
    # Codes of a byte and a scale of two for each head's 16 values of 4 bytes.
    width = model.config.head_dim
    assert held[8].bytes / held[16].bytes == (width + 2) / (4 * width)


def test_caches_that_cannot_be_are_refused(llama: tuple[Any, Switch]) -> None:
    live = server(llama, watched())
    with pytest.raises(ConfigError, match="a cache of 4 bits: give 8, 16, or None"):
        live.submit(prompt(3), 4, cache_bits=4)
    assert not live.step()
    with pytest.raises(UnsupportedError, match=r"cannot be decoded together.*\n.*LinearAttention"):
        Slots(Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), (), 2)


def test_bad_requests_are_refused_before_they_are_served(llama: tuple[Any, Switch]) -> None:
    live = server(llama, watched())
    for asked, words in (
        (([], 4), "a prompt of 0 tokens"),
        ((prompt(3), 0), "an answer of 0"),
        ((prompt(3), 4096), "more than the 2048 that this model attends to"),
        (([1, tiny.WORDS], 4), "outside the vocabulary of 300"),
        ((prompt(3), 2.5), "2.5 is no whole number: give one for tokens of an answer"),
        ((prompt(3), None), "None is no whole number"),
        (([1, 2.5], 4), "2.5 is no whole number: give one for the number of a token"),
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
