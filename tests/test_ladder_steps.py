"""How rungs are found: monotone mixes on the front, names, and which of them are steps."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats.nested import NestedWeight
from lowprec.ladder import Ladder
from lowprec.records import Group
from lowprec.solvers.residual import fit_residual
from lowprec.steps.allocate import Allocation, Option
from lowprec.steps.ladder import climb, level_options, names, steps_only
from tests import tiny
from tests.ladders import GROUPS, ladder, pass_time

ORDER = ("int4", "int8")


def options_of(values: list[tuple[float, float, float, float]]) -> dict[str, list[Option]]:
    """(nats in INT4, nats more than in INT8, us in INT8, us less in INT4) for each group."""
    return {
        f"g{i}": [
            Option(scheme="int4", loss=rest + saved, cost=dear - cheaper),
            Option(scheme="int8", loss=rest, cost=dear),
        ]
        for i, (rest, saved, dear, cheaper) in enumerate(values)
    }


def totals(options: dict[str, list[Option]], mix: Allocation) -> tuple[float, float]:
    """Nats and microseconds."""
    picks = [next(o for o in options[group] if o.scheme == level) for group, level in mix.schemes]
    return sum(o.loss for o in picks), sum(o.cost for o in picks)


positive = st.floats(1e-4, 1.0)
groups = st.lists(st.tuples(positive, positive, st.floats(10.0, 100.0), st.floats(-5.0, 9.0)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(values=groups, rungs=st.integers(2, 8))
def test_mixes_climb_and_no_group_falls(values: list[tuple[float, float, float, float]], rungs: int) -> None:
    options = options_of(values)
    faster = {f"g{i}" for i, value in enumerate(values) if value[2] - value[3] < value[2]}
    if not faster:
        with pytest.raises(UnsupportedError, match="nothing to switch to"):
            climb(list(options), options, rungs)
        return
    mixes = climb(list(options), options, rungs)
    assert 2 <= len(mixes) <= rungs
    assert {group for group, level in mixes[0].schemes if level == "int4"} == faster, "the rest never gains by INT4"
    assert {level for _, level in mixes[-1].schemes} == {"int8"}
    for mix in mixes:
        assert (mix.loss, mix.cost) == pytest.approx(totals(options, mix))
    for lower, upper in itertools.pairwise(mixes):
        assert lower.schemes != upper.schemes
        assert upper.loss <= lower.loss
        assert upper.cost >= lower.cost
        for (_, below), (_, above) in zip(lower.schemes, upper.schemes, strict=True):
            assert ORDER.index(below) <= ORDER.index(above)


@settings(max_examples=40, deadline=None)
@given(values=groups)
def test_the_first_step_up_is_the_best_there_is_for_its_time(values: list[tuple[float, float, float, float]]) -> None:
    options = options_of([(a, b, c, abs(d) + 0.5) for a, b, c, d in values])
    mixes = climb(list(options), options, 3)
    bottom, top = mixes[0], mixes[-1]
    limit = (bottom.cost + top.cost) / 2
    every = [
        totals(options, Allocation(schemes=tuple(zip(options, vector, strict=True)), loss=0.0, cost=0.0))
        for vector in itertools.product(ORDER, repeat=len(options))
    ]
    best = min(loss for loss, cost in every if cost <= limit * (1 + 1e-9))
    assert (mixes[1] if len(mixes) == 3 else bottom).loss <= best * (1 + 1e-6)


def test_a_ladder_has_two_rungs_or_more() -> None:
    with pytest.raises(ConfigError, match="a ladder of 1 rungs"):
        climb(["g0"], options_of([(0.1, 0.1, 10.0, 5.0)]), 1)


def test_the_higher_level_loses_as_its_error_says() -> None:
    layers, nested, dense = ("a", "b"), dict[str, NestedWeight](), dict[str, torch.Tensor]()
    for seed, layer in enumerate(layers):
        dense[layer] = torch.randn(24, 128, generator=torch.Generator().manual_seed(seed))
        nested[layer] = fit_residual(dense[layer], tiny.rounded(dense[layer], "int4-g64"), None)
    group = Group(name="g", layers=layers, role="qkv", block=0, n=48, k=128, parameters=48 * 128)
    us = {("g", 4): 1.0, ("g", 8): 2.0}
    (low, high) = level_options([group], {"g": 0.5}, dense.__getitem__, nested, us)["g"]
    assert (low.scheme, low.loss, low.cost) == ("int4", 0.5, 1.0)
    assert (high.scheme, high.cost) == ("int8", 2.0)
    errors = [sum(float((nested[x].dequantize(level) - dense[x]).square().sum()) for x in layers) for level in (4, 8)]
    assert high.loss == pytest.approx(0.5 * errors[1] / errors[0], rel=1e-4)
    assert high.loss < 0.02


def test_rungs_are_called_by_what_is_low() -> None:
    def mix(*levels: str) -> Allocation:
        return Allocation(schemes=tuple(zip(GROUPS, levels, strict=True)), loss=0.0, cost=0.0)

    mixes = [mix("int4", "int4", "int4"), mix("int8", "int4", "int4"), mix("int8", "int8", "int4"), mix(*["int8"] * 3)]
    sizes = dict(zip(GROUPS, (20, 1, 1000), strict=True))
    assert names(mixes, sizes) == ["INT4", "98% INT4 (2 groups)", "98% INT4 (1 group)", "INT8"]


@pytest.mark.parametrize(
    ("spoilt", "loss", "kept"),
    [
        # A little more than the bottom: the bottom is faster and better.
        (1, 0.10001, ["r0", "r2", "r3", "r4"]),
        # One bad measurement near the top leaves the others alone.
        (3, 0.099, ["r0", "r1", "r2", "r4"]),
        # As the top measures, better than what stands above it: both of those go, not the bottom.
        (0, 0.01, ["r0", "r4"]),
        (2, 0.04, ["r0", "r1", "r2", "r3", "r4"]),
    ],
)
def test_noise_in_a_loss_never_drops_the_better_rung(spoilt: int, loss: float, kept: list[str]) -> None:
    rungs = list(ladder().rungs)
    rungs[spoilt] = dataclasses.replace(rungs[spoilt], loss_nats=loss, loss_lower=0.0, loss_upper=0.2)
    found, left = steps_only(rungs)
    assert [rung.name for rung in found] == kept
    assert [name for name, _ in left] == [rung.name for rung in reversed(rungs) if rung.name not in kept]
    dataclasses.replace(ladder(), rungs=tuple(found))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.001, 0.2), st.floats(0.5, 1.5), st.floats(0.5, 1.5)), min_size=4, max_size=4),
)
def test_what_is_kept_is_a_ladder_that_nothing_left_out_beats(noise: list[tuple[float, float, float]]) -> None:
    *below, top = ladder().rungs
    spoilt = [
        dataclasses.replace(
            rung, loss_nats=loss, loss_lower=0.0, loss_upper=0.3,
            decode=tuple(pass_time(t.tokens, t.p50_us * (one if t.tokens == 1 else many)) for t in rung.decode),
        )
        for rung, (loss, one, many) in zip(below, noise, strict=True)
    ]  # fmt: skip
    kept, left = steps_only([*spoilt, top])
    assert kept[-1] == top
    assert sorted([rung.name for rung in kept] + [name for name, _ in left]) == ["r0", "r1", "r2", "r3", "r4"]
    if len(kept) > 1:
        dataclasses.replace(ladder(), rungs=tuple(kept))
    for better, worse in itertools.permutations(spoilt, 2):
        beaten = better.loss_nats <= worse.loss_nats and all(
            a.p50_us <= b.p50_us for a, b in zip(better.decode, worse.decode, strict=True)
        )
        assert not (beaten and worse in kept and better.loss_nats >= top.loss_nats)


def test_of_two_equal_rungs_one_stays() -> None:
    low, high = ladder().rungs[0], ladder().rungs[-1]
    kept, left = steps_only([low, dataclasses.replace(low, name="twin"), high])
    assert [rung.name for rung in kept] == ["twin", "r4"]
    assert [name for name, _ in left] == ["r0"]


def test_only_steps_are_kept() -> None:
    whole = ladder()
    slow = dataclasses.replace(whole.rungs[1], decode=tuple(pass_time(n, 1e6) for n in (1, 4, 16)))
    lossy = dataclasses.replace(whole.rungs[3], loss_nats=0.001, loss_lower=0.0, loss_upper=0.002)
    kept, left = steps_only([whole.rungs[0], slow, whole.rungs[2], lossy, whole.rungs[4]])
    assert [rung.name for rung in kept] == ["r0", "r2", "r4"]
    assert [name for name, _ in left] == ["r3", "r1"]
    assert "no pass takes longer" in left[1][1]
    assert "loss rises from 0.001 to 0.005" in left[0][1]
    assert isinstance(dataclasses.replace(whole, rungs=tuple(kept)), Ladder)
