"""Levels that change while a model runs: one rung to a pass, no byte, no microseconds to speak of."""

import copy
import inspect
import pickle
import random
import threading
import time
import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lowprec.errors import ConfigError, ModelError
from lowprec.formats.nested import NestedWeight
from lowprec.runtime.convert import linear_layers
from lowprec.runtime.kvcache import cache_argument
from lowprec.runtime.nested import NestedLinear, nest_
from lowprec.runtime.switch import Switch, vectors
from lowprec.solvers.residual import fit_residual
from tests import tiny

THREADS, TEXTS, TOKENS = 8, 8, 8
SWITCHES = 1_000


def planes(layer: nn.Linear, fmt: str = "int4-g32") -> NestedWeight:
    weight = layer.weight.detach()
    return fit_residual(weight.float(), tiny.rounded(weight, fmt), None)


def nested_llama(**options: Any) -> tuple[Any, Switch]:
    model = tiny.decoder("llama-untied")
    layers = {name: planes(m) for name, m in linear_layers(model).items() if isinstance(m, nn.Linear)}
    return model, nest_(model, layers, **options)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Switch]:
    """Four rungs: attention and MLP apart."""
    names = list(linear_layers(tiny.decoder("llama-untied")))
    groups = {
        "attention": [n for n in names if ".self_attn." in n],
        "mlp": [n for n in names if ".mlp." in n],
        "head": ["lm_head"],
    }
    one = {"attention": 4, "mlp": 8, "head": 8}
    return nested_llama(groups=groups, rungs=(4, {"attention": 4, "mlp": 4, "head": 8}, one, 8))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(ids).logits
    return found


def test_each_level_is_what_its_weights_say() -> None:
    for fmt, bias in (("int4-g32", True), ("int4-g64-asym", False)):
        linear = nn.Linear(128, 40, bias=bias)
        weight = planes(linear, fmt)
        switch = Switch(["only"], [[4], [8]])
        layer = NestedLinear(weight, linear.bias, switch, 0)
        x = torch.randn(2, 3, 128)
        for rung, level in enumerate((4, 8)):
            switch.set(rung)
            y = torch.nn.functional.linear(x, weight.dequantize(level), linear.bias)
            torch.testing.assert_close(layer(x), y, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(layer.reference(x, level).float(), y, rtol=1e-4, atol=1e-4)
            assert layer(x.half()).dtype == torch.float16
        assert torch.equal(layer.unpacked_codes(), weight.base.codes)
        assert layer(x[:0]).shape == (0, 3, 40)
        with pytest.raises(ValueError, match="64 features, the layer takes 128"):
            layer(x[..., :64])


def test_a_model_computes_as_with_dense_weights_of_its_level() -> None:
    model, ids = tiny.decoder("llama-untied").float(), tiny.batch()
    layers = {name: planes(m) for name, m in linear_layers(model).items() if isinstance(m, nn.Linear)}
    dense = copy.deepcopy(model)
    switch = nest_(model, layers)
    assert switch.rung == 1, "the highest rung at first"
    for rung, level in enumerate((4, 8)):
        for name, weight in layers.items():
            dense.get_submodule(name).weight = nn.Parameter(weight.dequantize(level))
        switch.set(rung)
        expected = logits(dense, ids)
        assert float((logits(model, ids) - expected).norm() / expected.norm()) < 1e-3


def test_dtypes_and_copies() -> None:
    model, switch = nested_llama()
    ids, layer = tiny.batch(), model.model.layers[0].mlp.up_proj
    before = logits(model, ids)
    twin = copy.deepcopy(model)
    own = twin.model.layers[0].mlp.up_proj.switch
    assert own is not switch
    switch.set(0)
    assert torch.equal(logits(twin, ids), before), "a copy has a switch of its own"
    own.set(0)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    model.float()
    assert (layer.scale.dtype, layer.base.dtype, layer.bias) == (torch.bfloat16, torch.int32, None)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    loaded.model.layers[0].mlp.up_proj.switch.set(1)
    assert not torch.equal(logits(loaded, ids), logits(model, ids)), "so has one that was pickled"
    assert inspect.signature(loaded.forward) == inspect.signature(type(model).forward.__get__(model))
    again = pickle.loads(pickle.dumps(switch))
    assert (again.groups, again.rungs, again.rung) == (switch.groups, switch.rungs, 0)
    assert "base=int4-g32, levels=(4, 8), form=" in repr(layer)


def test_a_pass_keeps_the_rung_that_it_began_with(llama: tuple[Any, Switch]) -> None:
    model, switch = llama
    ids = tiny.batch()
    switch.set(3)
    expected = [logits_at(model, switch, rung, ids) for rung in range(4)]
    assert len({tuple(e.flatten().tolist()) for e in expected}) == 4, "rungs differ"

    def change(*_: Any) -> None:
        switch.set(0)

    handle = model.model.layers[1].register_forward_pre_hook(change)
    try:
        assert torch.equal(logits(model, ids), expected[3])
        assert switch.last_rung == 3
        assert switch.rung == 0
        assert torch.equal(logits(model, ids), expected[0])
    finally:
        handle.remove()


def logits_at(model: Any, switch: Switch, rung: int, ids: Tensor) -> Tensor:
    with switch.pinned(rung):
        return logits(model, ids)


def test_an_error_ends_its_pass(llama: tuple[Any, Switch]) -> None:
    model, switch = llama
    ids = tiny.batch()
    switch.set(3)

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        logits(model, ids)
    handle.remove()
    switch.set(0)
    assert torch.equal(logits(model, ids), logits_at(model, switch, 0, ids))
    assert switch.last_rung == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_a_pass_ends_its_note(llama: tuple[Any, Switch], error: type[BaseException]) -> None:
    """Inside of the pass, or before it began."""
    model, switch = llama
    ids = tiny.batch()
    expected = [logits_at(model, switch, rung, ids) for rung in range(4)]

    def fail(*_: Any) -> None:
        raise error("on purpose")

    for module in (model.model.layers[1], model):
        switch.set(3)
        handle = module.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(error, match="on purpose"):
            logits(model, ids)
        handle.remove()
        switch.set(0)
        with switch.recorded() as rungs:
            assert torch.equal(logits(model, ids), expected[0])
            assert torch.equal(logits_at(model, switch, 2, ids), expected[2])
        assert rungs == [0, 2]


def test_a_pass_within_a_pass_belongs_to_it(llama: tuple[Any, Switch]) -> None:
    model, switch = llama
    ids, inner = tiny.batch(), []
    top = logits_at(model, switch, 3, ids)

    def again(*_: Any) -> None:
        handle.remove()
        switch.set(0)
        inner.append(logits(model, ids))

    handle = model.model.layers[1].register_forward_pre_hook(again)
    switch.set(3)
    with switch.recorded() as rungs:
        assert torch.equal(logits(model, ids), top)
    assert torch.equal(inner[0], top)
    assert rungs == [3]


def test_switches_under_concurrent_generation(llama: tuple[Any, Switch]) -> None:
    """Every pass of every thread gives the logits of the rung that was recorded for it, prompts and cached steps.

    Each pass switches in its middle, for itself and for those that run beside it.
    """
    model, switch = llama
    lock, generator, sets = threading.Lock(), random.Random(0), list[int]()
    seen, wrong, errors = [0] * len(switch.rungs), list[tuple[int, int]](), list[BaseException]()

    def change(*_: Any) -> None:
        with lock:
            sets.append(generator.randrange(len(switch.rungs)))
            switch.set(sets[-1])

    @torch.no_grad()
    def one_pass(ids: Tensor, cache: Any) -> Tensor:
        found: Tensor = model(input_ids=ids, use_cache=True, **{cache_argument(model): cache}).logits
        return found

    def compared(ids: Tensor, cache: Any) -> Tensor:
        before = copy.deepcopy(cache)
        with switch.recorded() as rungs:
            found = one_pass(ids, cache)
        (rung,) = rungs
        with switch.pinned(rung):
            same = torch.equal(found, one_pass(ids, before))
        with lock:
            seen[rung] += 1
            if not same:
                wrong.append((rung, cache.get_seq_length()))
        return found

    def generate(prompt: Tensor) -> None:
        torch.set_num_threads(1)
        try:
            for _ in range(TEXTS):
                ids, cache = prompt, DynamicCache()
                for _ in range(TOKENS):
                    ids = compared(ids, cache)[:, -1:].argmax(-1)
                assert cache.get_seq_length() == prompt.shape[1] + TOKENS - 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=generate, args=(tiny.batch(1, 5, seed=seed),)) for seed in range(THREADS)]
    handle = model.model.layers[1].register_forward_pre_hook(change)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        handle.remove()
    assert not errors
    assert not wrong
    assert len(sets) == 2 * sum(seen) == 2 * THREADS * TEXTS * TOKENS >= SWITCHES
    assert min(seen) >= sum(seen) // 8, f"passes at each rung: {seen}"


def test_tokens_know_their_rungs(llama: tuple[Any, Switch]) -> None:
    model, switch = llama
    switch.set(2)
    made = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    class Downwards:
        """A stopping criterion is called after every token."""

        def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
            switch.set(0 if ids.shape[1] >= 8 else 2)
            return torch.zeros(len(ids), dtype=torch.bool)

    with switch.recorded() as rungs:
        model.generate(tiny.batch(1, 5), stopping_criteria=[Downwards()], **made)
    assert rungs == [2, 2, 2, 0, 0, 0]


def test_a_switch_is_a_store() -> None:
    """A model of 200 layers: at most 10 us, no byte of Python's, no tensor."""
    groups = [f"group {i}" for i in range(200)]
    switch = Switch(groups, [[4] * 200, [8] * 200])
    fastest = min(_timed(switch) for _ in range(20))
    assert fastest <= 10e-6
    with torch.profiler.profile(profile_memory=True) as seen:
        for _ in range(100):
            switch.set(1)
            switch.set(0)
    assert not [event for event in seen.events() if event.name == "[memory]" or event.cpu_memory_usage]
    tracemalloc.start()
    try:
        switch.set(0)
        base = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(100):
            switch.set(1)
            switch.set(0)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The counters are integers themselves, which are seen.
    assert now - base <= 100
    assert peak - base <= 200


def _timed(switch: Switch) -> float:
    start = time.perf_counter()
    for rung in (0, 1) * 500:
        switch.set(rung)
    return (time.perf_counter() - start) / 1000


def test_passes_after_a_switch_allocate_what_they_did_before(llama: tuple[Any, Switch]) -> None:
    """Neither weights nor layouts are made for a level: storages stay where they are."""
    model, switch = llama
    ids = tiny.batch()
    for rung in range(4):
        logits_at(model, switch, rung, ids)
    places = [b.data_ptr() for b in model.buffers()]
    laid_out = [id(m._laid_out) for m in model.modules() if isinstance(m, NestedLinear)]
    for rung in (0, 3, 1, 2):
        switch.set(rung)
        with torch.profiler.profile(profile_memory=True) as seen:
            logits(model, ids)
        grown = sum(event.self_cpu_memory_usage for event in seen.key_averages())
        # What is left at the end is the logits.
        assert grown <= 4 * 2 * 24 * tiny.WORDS + 4096
    assert [b.data_ptr() for b in model.buffers()] == places
    assert [id(m._laid_out) for m in model.modules() if isinstance(m, NestedLinear)] == laid_out


def test_bad_rungs_and_names_are_refused() -> None:
    switch = Switch(["a", "b"], [[4, 4], [8, 8]])
    for bad in (-1, 2, 0.5, float("nan"), "1", None):
        with pytest.raises(ConfigError, match=f"rung {bad!r} does not exist: there are 2, 0 is the cheapest"):
            switch.set(bad)
        with pytest.raises(ConfigError, match=f"rung {bad!r} does not exist"), switch.pinned(bad):
            pass
    assert switch.rung == 1
    with pytest.raises(ConfigError, match="level 5 does not exist: nested weights have the levels 4 and 8"):
        Switch(["a"], [[5]])
    with pytest.raises(ConfigError, match="rung 0 has 1 levels, there are 2 groups"):
        Switch(["a", "b"], [[4]])
    with pytest.raises(ConfigError, match="a switch needs a rung"):
        Switch(["a"], [])
    with pytest.raises(ConfigError, match="rung 0 names 'c', which is no group"):
        vectors(["a", "b"], [{"a": 4, "c": 8}])
    with pytest.raises(ConfigError, match="rung 1 has no level for 'b'"):
        vectors(["a", "b"], [4, {"a": 4}])


def test_models_that_do_not_fit_stay_as_they_are() -> None:
    model = tiny.decoder("llama-untied")
    before = dict(model.named_modules())
    up, down = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")
    layers = {up: planes(model.get_submodule(up)), down: planes(model.get_submodule(down))}
    with pytest.raises(ConfigError, match=r"'model.layers.0.mlp.up' is no linear layer.*did you mean"):
        nest_(model, {"model.layers.0.mlp.up": layers[up]})
    with pytest.raises(ModelError, match=r"down_proj: codes are \(128, 64\), the layer's weight \(64, 128\)"):
        nest_(model, {up: layers[up], down: layers[up]})
    with pytest.raises(ConfigError, match="is in no group"):
        nest_(model, layers, groups={"a": [up]})
    with pytest.raises(ConfigError, match="is in two groups"):
        nest_(model, layers, groups={"a": [up, down], "b": [up]})
    with pytest.raises(ConfigError, match="which has no nested weight"):
        nest_(model, layers, groups={"a": [up, down, "lm_head"]})
    with pytest.raises(ConfigError, match="level 16 does not exist"):
        nest_(model, layers, rungs=(4, 16))
    assert dict(model.named_modules()) == before
    assert "forward" not in vars(model)
