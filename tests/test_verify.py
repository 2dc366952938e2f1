"""Verification rounds and costs, on made-up numbers."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowprec.errors import ConfigError
from lowprec.formats import scheme_named
from lowprec.records import Budget, CostSample, Group, Origin, Scheme, Workload
from lowprec.settings import effort_named, parse_budget
from lowprec.steps.allocate import Allocation, Option, allocate
from lowprec.steps.correction import Correction
from lowprec.steps.cost import candidates, group_costs, rows_of, stored_bytes, time_shapes
from lowprec.steps.metrics import metric_of, text_growth, tuning_loss
from lowprec.steps.tokens import TokenSet
from lowprec.steps.verify import Curve, Measured, verify

LINEAR = Curve(scale=0.8, power=1.0)
GROUPS = [f"g{i}" for i in range(12)]
OPTIONS = {
    g: [Option(scheme="bf16", loss=0.0, cost=16.0), Option(scheme="w4a16-g64", loss=0.001 * (i + 1), cost=4.0)]
    for i, g in enumerate(GROUPS)
}


def measures(ratio: float, width: float = 0.0) -> object:
    """A world in which the loss is `ratio` times the predicted KL, known to within `width`."""

    def measure(allocation: Allocation) -> Measured:
        loss = ratio * allocation.loss
        return Measured(loss=loss, upper=loss + width, kl_nats=allocation.loss)

    return measure


@pytest.mark.parametrize("ratio", [0.3, 0.8, 1.5, 3.0])
@pytest.mark.parametrize("width", [0.0, 0.004])
def test_the_mix_is_within_and_uses_the_budget(ratio: float, width: float) -> None:
    found = verify(GROUPS, OPTIONS, 0.03, measures(ratio, width), rounds=5, curve=LINEAR)
    assert found.accepted
    assert found.chosen.measured.upper <= 0.03
    # The true optimum under the true ratio, for comparison.
    best = (
        verify(GROUPS, OPTIONS, 0.03, measures(0.8), rounds=1, curve=LINEAR).chosen
        if ratio == 0.8 and not width
        else None
    )
    assert found.chosen.allocation.cost <= (best.allocation.cost if best else 16.0 * len(GROUPS))
    assert found.chosen.allocation.cost < 16.0 * len(GROUPS)


def test_when_no_mix_is_accepted_the_model_stays_as_it_is() -> None:
    found = verify(GROUPS, OPTIONS, 0.001, measures(0.8, width=0.01), rounds=5, curve=LINEAR)
    assert found.accepted
    assert found.chosen.allocation.loss == 0.0
    assert found.chosen not in found.rounds
    assert found.closest.measured.upper == min(r.measured.upper for r in found.rounds)


def test_where_the_reference_is_no_option_the_closest_mix_is_chosen() -> None:
    only = {g: options[1:] for g, options in OPTIONS.items()}
    found = verify(GROUPS, only, 0.001, measures(0.8), rounds=5, curve=LINEAR)
    assert not found.accepted
    assert found.chosen == found.closest


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_a_loss_that_does_not_rise_with_kl_in_proportion(power: float, scale: float) -> None:
    def measure(allocation: Allocation) -> Measured:
        loss = scale * 0.03 * (allocation.loss / 0.03) ** power
        return Measured(loss=loss, upper=1.1 * loss, kl_nats=allocation.loss)

    found = verify(GROUPS, OPTIONS, 0.02, measure, rounds=5, curve=LINEAR)
    assert found.accepted
    # What the budget allows by the true curve, and the cheapest mix for that.
    allowed = 0.03 * (0.02 / 1.1 / (scale * 0.03)) ** (1 / power)
    best = allocate(GROUPS, OPTIONS, allowed).cost
    dearest = 16.0 * len(GROUPS)
    assert dearest - found.chosen.allocation.cost >= 0.7 * (dearest - best)


def test_a_curve_that_is_known_needs_one_round_and_is_what_is_reported() -> None:
    root = Curve(scale=0.5, power=0.5)

    def measure(allocation: Allocation) -> Measured:
        loss = root.loss(allocation.loss)
        return Measured(loss=loss, upper=1.1 * loss, kl_nats=allocation.loss)

    found = verify(GROUPS, OPTIONS, 0.08, measure, rounds=1, curve=root)
    assert found.accepted
    assert found.chosen in found.rounds
    assert found.chosen.predicted == pytest.approx(found.chosen.measured.loss)
    assert found.curve.scale == pytest.approx(0.5)
    assert found.curve.kl_nats(found.curve.loss(0.01)) == pytest.approx(0.01)


def test_an_unbinding_budget_needs_one_round() -> None:
    found = verify(GROUPS, OPTIONS, 1.0, measures(0.8), rounds=5, curve=LINEAR)
    assert len(found.rounds) == 1
    assert found.chosen.allocation.cost == 4.0 * len(GROUPS)


def test_two_measurements_that_contradict_each_other_do_not_throw_the_budget_away() -> None:
    """As seen at a budget of 1 %: the second mix had three quarters of the first one's KL, and lost more."""
    noise = iter([1.0, 1.7, 1.0, 1.0])

    def measure(allocation: Allocation) -> Measured:
        loss = 1.2 * allocation.loss * next(noise)
        return Measured(loss=loss, upper=loss, kl_nats=allocation.loss)

    found = verify(GROUPS, OPTIONS, 0.03, measure, rounds=4, curve=LINEAR)
    losses = [r.allocation.loss for r in found.rounds]
    assert losses[2] > 0.4 * losses[1]
    assert found.accepted
    assert found.chosen.measured.upper > 0.5 * 0.03


def test_no_mix_is_measured_twice() -> None:
    seen = []

    def measure(allocation: Allocation) -> Measured:
        seen.append(allocation.schemes)
        return Measured(loss=0.02, upper=0.04, kl_nats=0.02)

    verify(GROUPS, OPTIONS, 0.03, measure, rounds=5, curve=LINEAR)
    assert len(seen) == len(set(seen))


class Priced:
    """A target whose times say which matmul they are of."""

    name, device = "priced", "none"
    origin: Origin = "modelled"

    def supports(self, scheme: Scheme, n: int, k: int) -> str | None:
        return "no such kernel" if scheme.name == "w8a8-fp8" else None

    def products(self, scheme: Scheme, widths: tuple[int, ...]) -> tuple[int, ...]:
        return widths

    def time(self, shapes, schemes, ms, progress=None):  # type: ignore[no-untyped-def]
        return [
            CostSample(
                op="linear", m=m, n=n, k=k, scheme=s.name, kernel="x", p20_us=0, p50_us=n + m, p80_us=0, bytes=0,
                origin="modelled",
            )
            for n, k in shapes for s in schemes for m in ms
        ]  # fmt: skip


QKV = Group(name="qkv", layers=("q", "k", "v"), role="qkv", block=0, n=96, k=64, parameters=96 * 64)
HEAD = Group(name="head", layers=("h",), role="lm_head", block=None, n=300, k=64, parameters=300 * 64)
WIDTHS = {"qkv": (64, 16, 16), "head": (300,)}


def test_candidates_are_struck_out_with_the_reason() -> None:
    schemes = [scheme_named("w8a8-fp8"), scheme_named("w4a16"), scheme_named("w4a16-g128")]
    allowed, struck = candidates([QKV], WIDTHS, schemes, Priced())
    assert [s.name for s in allowed["qkv"]] == ["bf16", "w4a16-g64"]
    assert {s.scheme: s.reason for s in struck}["w8a8-fp8"] == "no such kernel"
    assert "128" in {s.scheme: s.reason for s in struck}["w4a16-g128"]


def test_one_of_two_names_for_the_same_numbers_stands() -> None:
    schemes = [scheme_named(name) for name in ("w4a8-block", "w8a16", "w4a8-block64", "w4a8-block-g64")]
    allowed, _ = candidates([QKV], WIDTHS, schemes, Priced())
    assert [s.name for s in allowed["qkv"]] == ["bf16", "w4a8-block-g64", "w8a16"]


def test_the_head_computes_one_position_in_prefill() -> None:
    work = Workload(batch=2, prompt_tokens=100, output_tokens=10)
    assert rows_of(QKV, work) == (200, 2)
    assert rows_of(HEAD, work) == (2, 2)


def test_group_cost_sums_layers_and_weighs_the_phases() -> None:
    work = Workload(batch=2, prompt_tokens=100, output_tokens=10)
    allowed = {"qkv": [scheme_named("bf16"), scheme_named("w8a16")], "head": [scheme_named("bf16")]}
    samples = time_shapes([QKV, HEAD], WIDTHS, allowed, work, Priced())
    assert len(samples) == len({(s.scheme, s.n, s.m) for s in samples}), "every matmul is timed once"
    costs = group_costs([QKV, HEAD], WIDTHS, allowed, work, samples, tied=["head"])
    assert costs["qkv", "bf16"].us == sum((n + 200) + 10 * (n + 2) for n in (64, 16, 16))
    assert costs["head", "bf16"].bytes == 0.0, "a tied head has no bytes of its own"
    assert costs["qkv", "w8a16"].bytes == 96 * 64 + 96 * 2


def test_stored_bytes_count_scales() -> None:
    assert stored_bytes(QKV, scheme_named("w4a16-g64")) == 96 * (32 + 2)
    assert stored_bytes(QKV, scheme_named("bf16")) == 2 * 96 * 64


@pytest.mark.parametrize("text", ["0", "0%", "300%", "-5%", "five", "", "5 %x", "nan"])
def test_senseless_budgets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="budget"):
        parse_budget(text)


def test_budgets_are_read_as_people_write_them() -> None:
    assert parse_budget("5%").limit == parse_budget("0.05").limit == parse_budget(0.05).limit == 0.05
    assert parse_budget("0.05 abs").kind == "absolute"
    assert math.isclose(parse_budget("0.5%").limit, 0.005)


def test_unknown_effort_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'balanced'"):
        effort_named("balance")


# What rounding a whole mix wins


def halves(group: str, scheme: str) -> bool:
    return scheme == "w4a16-g64" and group != "g11"


def world(factor: float) -> object:
    """A world in which rounding a mix leaves `factor` of what the improved groups were predicted to lose."""
    predicted = {(g, o.scheme): o.loss for g, found in OPTIONS.items() for o in found}

    def measure(allocation: Allocation) -> Measured:
        kl = sum(predicted[c] * (factor if halves(*c) else 1.0) for c in allocation.schemes)
        return Measured(loss=0.4 * kl, upper=0.4 * kl, kl_nats=kl)

    return measure


@pytest.mark.parametrize("factor", [0.3, 0.7])
def test_the_correction_is_what_the_mixes_say(factor: float) -> None:
    correction = Correction(improved=halves, prior=0.5)
    found = verify(
        GROUPS, OPTIONS, 0.006, world(factor), rounds=4, curve=Curve(scale=0.4, power=1.0), correct=correction
    )
    assert correction.factor(OPTIONS, ()) == 0.5
    assert correction.factor(OPTIONS, found.rounds) == pytest.approx(factor)
    for one in found.rounds:
        assert one.allocation.loss == pytest.approx(one.measured.kl_nats), "earlier rounds are corrected as well"
    first = found.rounds[0]
    assert first.predicted_kl_nats < first.measured.kl_nats * (1.0 if factor > 0.5 else 2.0)
    assert first.predicted_kl_nats != pytest.approx(first.measured.kl_nats), "what was foreseen stays what it was"
    best = allocate(GROUPS, found.options, 0.006 / 0.4).cost
    assert found.accepted
    assert found.chosen.allocation.cost <= best + 0.1 * (16.0 * len(GROUPS) - best)


def test_a_correction_stays_within_reason() -> None:
    correction = Correction(improved=halves, prior=0.5)
    for factor, held in ((0.0, 0.1), (3.0, 1.0)):
        found = verify(GROUPS, OPTIONS, 0.006, world(factor), rounds=1, curve=LINEAR, correct=correction)
        assert correction.factor(OPTIONS, found.rounds) == held


def test_nothing_is_corrected_where_nothing_is_improved() -> None:
    never = Correction(improved=lambda *_: False, prior=0.5)
    assert never(OPTIONS, ()) == OPTIONS


def test_the_tuning_bound_leaves_room_for_the_noise_of_what_the_judge_will_read() -> None:
    model: Any = SimpleNamespace(kind="decoder", metric=None, tokenizer=None)
    metric = metric_of(Budget(), model, 0)
    count = 40
    data = TokenSet(
        ids=tuple(torch.zeros(20, dtype=torch.long) for _ in range(count)),
        units=tuple(range(count)),
        sources=(0,) * count,
        documents=("d",) * count,
        source_names=("s",),
    )
    before = torch.full((count,), 60.0)
    change = torch.randn(count, generator=torch.Generator().manual_seed(0)) + 1.0
    table = torch.stack([torch.full((count,), 19.0), before, before + change, before, change.abs()], 1)
    alike, endless = (tuning_loss(metric, table, data, data.batches(), n, 0) for n in (data.tokens, 10**12))
    assert alike.loss == endless.loss
    assert alike.upper - alike.loss == pytest.approx(math.sqrt(2.0) * (endless.upper - endless.loss), rel=1e-3)


@pytest.mark.parametrize(
    ("metric", "limit", "growth"),
    [
        ("perplexity", 0.05, 1.0),
        ("perplexity", 0.2, 1.0),
        ("perplexity", 0.025, 2.0),
        ("perplexity", 0.001, 3.0),
        ("top1", 0.001, 1.0),
    ],
)
def test_small_budgets_of_perplexity_take_more_text(metric: str, limit: float, growth: float) -> None:
    assert text_growth(Budget(metric=metric, limit=limit)) == pytest.approx(growth)


def test_a_budget_in_a_unit_of_its_own_takes_the_usual_text() -> None:
    assert text_growth(Budget(metric="perplexity", limit=0.001, kind="absolute")) == 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"two_sided": True, "compensated": False}, "parts of compensated"),
        ({"healing_passes": -0.5}, "-0.5 passes of healing: give 0 or more"),
        ({"weighted": True, "compensated": False}, "parts of compensated"),
        ({"learning_steps": 5, "compensated": False}, "parts of compensated"),
    ],
)
def test_efforts_whose_parts_would_do_nothing_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(effort_named("fast"), **wrong)
