"""Scores and the verdict. The simulation at the end is the bar that the verdict is held to."""

import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lowprec.errors import ConfigError, ModelError
from lowprec.records import Budget, from_json, to_json
from lowprec.results import LossResult
from lowprec.steps import judge as judge_module
from lowprec.steps.judge import Judgement, judge, proportion_bounds, ratio_bounds
from lowprec.steps.measure import compare_tokens, paired
from lowprec.steps.scores import (
    PairedScores,
    PairedValues,
    concatenate,
    mean_kl,
    perplexity_increase,
    token_scores,
    top1_agreement,
)
from lowprec.steps.tokens import TokenSet

Floats = NDArray[np.float64]
BUDGET = Budget(limit=0.05)
TRUE_NATS = math.log(1.05)


def scores(
    mean: float, units: int = 60, per_window: int = 250, windows: int = 4, spread: float = 0.02, first_unit: int = 0
) -> PairedScores:
    """Windows of units whose losses lie around `mean` nats per token."""
    generator = np.random.default_rng([units, first_unit])
    count = units * windows
    unit = first_unit + np.repeat(np.arange(units), windows)
    delta = mean + np.repeat(generator.normal(0, spread, units), windows) + generator.normal(0, 0.02, count)
    tokens = np.full(count, per_window)
    return PairedScores(
        unit=unit,
        source=unit % 2,
        tokens=tokens,
        loss_reference=3.0 * tokens,
        loss=(3.0 + delta) * tokens,
        kl=0.06 * tokens,
        top1=(0.8 * tokens).astype(np.int64),
    )


def verdict(*looks: PairedScores, planned: int = 2, budget: Budget = BUDGET) -> Judgement:
    return judge(looks, budget, ("prose", "code"), planned_looks=planned, resamples=1000)


def test_token_scores_against_float64() -> None:
    torch.manual_seed(0)
    reference = torch.randn(150, 300) * 8
    quantised = reference + 0.01 * torch.randn(150, 300)
    labels = torch.randint(300, (150,))
    loss_reference, loss, kl, top1 = token_scores(reference, quantised, labels, chunk=64)
    p, q = (torch.log_softmax(x.double(), -1) for x in (reference, quantised))
    assert torch.allclose(loss_reference.double(), -p.gather(1, labels[:, None])[:, 0], atol=2e-5)
    assert torch.allclose(loss.double(), -q.gather(1, labels[:, None])[:, 0], atol=2e-5)
    exact = (p.exp() * (p - q)).sum(-1)
    assert exact.mean() < 1e-4
    assert float(kl.double().mean()) == pytest.approx(float(exact.mean()), rel=0.02)
    assert torch.equal(top1, p.argmax(-1) == q.argmax(-1))


def test_tokens_that_the_reference_rules_out_add_nothing() -> None:
    reference = torch.tensor([[0.0, 1.0, -torch.inf]])
    _, _, kl, _ = token_scores(reference, torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([1]))
    assert kl.tolist() == [0.0]
    assert token_scores(reference, torch.tensor([[0.0, 1.0, -90.0]]), torch.tensor([1]))[2].tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_scored_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 1000).to(dtype)
    labels = torch.tensor([0, 1, 2])
    loss = token_scores(logits, logits, labels)[1]
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none"), atol=1e-5)


def test_padding_is_in_no_sum() -> None:
    ids = tuple(torch.arange(n) % 7 for n in (5, 9))
    windows = TokenSet(ids=ids, units=(3, 8), sources=(0, 1), documents=("a", "b"), source_names=("x", "y"))
    (batch,) = windows.batches(100)
    torch.manual_seed(1)
    reference, quantised = torch.randn(2, 9, 7), torch.randn(2, 9, 7)
    found = paired(compare_tokens(reference, quantised, batch), windows, [batch])
    assert found.tokens.tolist() == [4, 8]
    assert found.unit.tolist() == [3, 8]
    poisoned = reference.clone(), quantised.clone()
    for logits in poisoned:
        logits[0, 4:] = torch.nan
        logits[1, 8:] = torch.nan
    again = paired(compare_tokens(*poisoned, batch), windows, [batch])
    assert np.array_equal(found.loss, again.loss)
    expected = torch.nn.functional.cross_entropy(quantised[0, :4], ids[0][1:], reduction="sum")
    assert found.loss[0] == pytest.approx(float(expected), rel=1e-6)


def test_nan_is_an_error_not_a_verdict() -> None:
    bad = scores(0.0)
    values = {name: getattr(bad, name) for name in PairedScores.__dataclass_fields__}
    values["loss"] = values["loss"].copy()
    values["loss"][3] = np.nan
    with pytest.raises(ModelError, match="loss of window 3 is nan"):
        PairedScores(**values)


def test_sums() -> None:
    both = concatenate([scores(0.01), scores(0.03, first_unit=100)])
    assert perplexity_increase(both) == pytest.approx(math.expm1(0.02), abs=0.01)
    assert mean_kl(both) == pytest.approx(0.06)
    assert top1_agreement(both) == pytest.approx(0.8)


def test_verdicts_and_their_numbers() -> None:
    good, bad, close = (verdict(scores(nats)) for nats in (0.02, 0.1, TRUE_NATS))
    assert (good.verdict, bad.verdict, close.verdict) == ("within", "over", "inconclusive")
    assert (good.look_again, bad.look_again, close.look_again) == (False, False, True)
    assert good.loss.lower < good.loss.relative < good.loss.upper <= 0.05 < bad.loss.lower
    assert good.loss.relative == pytest.approx(perplexity_increase(scores(0.02)))
    assert good.loss.perplexity_after == pytest.approx((1 + good.loss.relative) * math.exp(3))
    assert good.loss.confidence == pytest.approx(0.975)
    assert [row.source for row in good.loss.per_source] == ["prose", "code"]
    assert sum(row.units for row in good.loss.per_source) == good.loss.units == 60
    assert "upper bound" in good.reason
    assert "97.5%" in good.reason
    assert from_json(LossResult, to_json(good.loss)) == good.loss


def test_too_few_units_or_tokens_are_inconclusive_however_good() -> None:
    few = verdict(scores(0.0, units=29, windows=8))
    assert few.verdict == "inconclusive"
    assert few.look_again
    assert few.reason.startswith("29 independent units are fewer than the 30")
    small = verdict(scores(0.0, units=60, windows=1))
    assert small.verdict == "inconclusive"
    assert "15000 held-out tokens" in small.reason
    assert (
        verdict(scores(0.0, units=29, windows=8), scores(0.0, units=29, windows=8, first_unit=50)).verdict == "within"
    )


def test_the_second_look_pools_and_a_first_verdict_stands() -> None:
    close, more = scores(0.044, units=40, spread=0.03), scores(0.02, units=200, spread=0.03, first_unit=500)
    first = verdict(close)
    both = verdict(close, more)
    assert (first.verdict, both.verdict) == ("inconclusive", "within")
    assert (both.loss.looks, both.loss.units) == (2, 240)
    stands = verdict(scores(0.1), scores(0.0, units=200, first_unit=500))
    assert (stands.verdict, stands.loss.looks) == ("over", 1)
    with pytest.raises(ValueError, match="share units"):
        verdict(close, scores(0.02))
    with pytest.raises(ValueError, match="planned"):
        verdict(close, more, planned=1)


def test_one_planned_look_has_the_whole_confidence() -> None:
    once, twice = verdict(scores(0.04), planned=1), verdict(scores(0.04))
    assert once.loss.confidence == pytest.approx(0.95)
    assert once.loss.upper < twice.loss.upper


@pytest.mark.parametrize("metric", ["kl", "top1"])
def test_kl_and_top1_take_absolute_budgets(metric: str) -> None:
    result = verdict(scores(0.02), budget=Budget(metric=metric, limit=0.21, kind="absolute"))
    assert result.verdict == "within"
    assert result.loss.relative == pytest.approx(0.06 if metric == "kl" else 0.2)
    with pytest.raises(ConfigError, match="give an absolute budget"):
        verdict(scores(0.02), budget=Budget(metric=metric))


def test_budgets_that_fit_no_metric() -> None:
    with pytest.raises(ConfigError, match="relative budget"):
        verdict(scores(0.02), budget=Budget(kind="absolute"))
    with pytest.raises(ConfigError, match="known: perplexity, kl, top1"):
        verdict(scores(0.02), budget=Budget(metric="bleu"))


def values(candidate: Floats, reference: Floats, better: Literal["higher", "lower"] = "lower") -> PairedValues:
    count = len(reference)
    return PairedValues(
        unit=np.arange(count),
        source=np.zeros(count, np.int64),
        weight=np.ones(count),
        reference=reference,
        candidate=candidate,
        better=better,
    )


def test_values_of_a_callable() -> None:
    reference = np.random.default_rng(0).uniform(1, 2, 100)
    relative = judge([values(1.01 * reference, reference)], Budget(metric="own", limit=0.02), ("all",))
    assert relative.verdict == "within"
    assert relative.loss.relative == pytest.approx(0.01)
    assert relative.loss.kl_nats is None
    absolute = judge([values(reference + 0.5, reference)], Budget(metric="own", limit=0.1, kind="absolute"), ("all",))
    assert absolute.verdict == "over"
    assert absolute.loss.relative == pytest.approx(0.5)
    higher = judge([values(0.9 * reference, reference, "higher")], Budget(metric="own"), ("all",))
    assert higher.verdict == "over"
    with pytest.raises(ConfigError, match="absolute budget"):
        judge([values(reference, np.zeros(100))], Budget(metric="own"), ("all",))


def test_no_difference_in_few_questions_is_no_certainty() -> None:
    right = (np.arange(40) % 2).astype(float)
    few = judge([values(right, right, "higher")], Budget(metric="task:a.jsonl"), ("task",))
    assert few.verdict == "inconclusive"
    assert few.loss.relative == 0.0
    right = (np.arange(4000) % 2).astype(float)
    assert judge([values(right, right, "higher")], Budget(metric="task:a.jsonl"), ("task",)).verdict == "within"


def test_identical_models_have_no_width_and_one_unit_knows_nothing() -> None:
    size = np.arange(1.0, 41.0)
    same = ratio_bounds(0.0 * size, size, 0.975)
    assert (same.lower, same.estimate, same.upper) == (0.0, 0.0, 0.0)
    alone = ratio_bounds(np.array([0.1]), np.array([10.0]), 0.975)
    assert alone.lower == -alone.upper == -judge_module.LARGEST_NATS
    assert math.isfinite(math.expm1(alone.upper))


@settings(max_examples=50, deadline=None)
@given(units=st.integers(2, 60), seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), shift=st.floats(-1, 1))
def test_bounds_enclose_and_move_with_the_data(units: int, seed: int, scale: float, shift: float) -> None:
    generator = np.random.default_rng(seed)
    size = generator.lognormal(0, 1, units)
    loss = size * generator.normal(0, 0.1, units)
    plain = ratio_bounds(loss, size, 0.975, resamples=200)
    assert plain.lower <= plain.estimate <= plain.upper
    moved = ratio_bounds(scale * (loss + shift * size), scale * size, 0.975, resamples=200)
    limit = judge_module.LARGEST_NATS
    assert moved.upper == pytest.approx(min(plain.upper + shift, limit), rel=1e-6, abs=1e-6) or plain.upper == limit
    looser = ratio_bounds(loss, size, 0.9, resamples=200)
    assert looser.upper <= plain.upper
    assert looser.lower >= plain.lower


def test_resampling_in_blocks_is_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    size = generator.lognormal(0, 1, 100)
    loss = size * generator.normal(0.04, 0.1, 100)
    whole = ratio_bounds(loss, size, 0.975)
    monkeypatch.setattr(judge_module, "BLOCK_COUNTS", 5_000)
    blocks = ratio_bounds(loss, size, 0.975)
    assert blocks.upper == pytest.approx(whole.upper, rel=0.05)


RUNS = 2_000


def false_within(planned_looks: int, units: int, median: float, tail: float, spread: float, seed: int) -> float:
    """How often a loss that equals the budget is called `within` by a procedure of so many looks.

    Units have lognormal sizes (sigma 1), an effect of their own (lognormal with sigma `tail`, centred, standard
    deviation `spread` nats: all tokens of a unit share it) and Student-t noise of 0.43 nats per token, as measured on a
    small language model with INT4 weights in a third of its blocks.
    """
    generator = np.random.default_rng(seed)
    shape = (RUNS, planned_looks, units)
    size = np.exp(generator.normal(np.log(median), 1.0, shape)).clip(64, 40 * median).round()
    effect = (np.exp(tail * generator.normal(size=shape)) - np.exp(tail**2 / 2)) / np.sqrt(
        (np.exp(tail**2) - 1) * np.exp(tail**2)
    )
    noise = 0.43 * generator.standard_t(4, shape) / np.sqrt(2)
    loss = size * (TRUE_NATS + spread * effect) + np.sqrt(size) * noise
    wrong = 0
    for run in range(RUNS):
        looks = [
            PairedScores(
                unit=look * units + np.arange(units),
                source=np.zeros(units, np.int64),
                tokens=size[run, look].astype(np.int64),
                loss_reference=np.zeros(units),
                loss=loss[run, look],
                kl=np.zeros(units),
                top1=np.zeros(units, np.int64),
            )
            for look in range(planned_looks)
        ]
        found = judge(looks, BUDGET, ("text",), planned_looks=planned_looks, resamples=500)
        wrong += found.verdict == "within"
    return wrong / RUNS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("looks", "units", "median", "tail", "spread"),
    [
        (2, 40, 1200, 0.5, 0.03),
        (2, 100, 400, 0.5, 0.05),
        (2, 200, 250, 0.5, 0.05),
        (1, 100, 400, 0.25, 0.03),
    ],
)
def test_a_loss_equal_to_the_budget_is_rarely_called_within(
    looks: int, units: int, median: float, tail: float, spread: float
) -> None:
    rate = false_within(looks, units, median, tail, spread, seed=7)
    assert rate <= 0.05
    assert rate > 0.002  # a judge that never says within would pass every such test


@pytest.mark.slow
def test_proportion_bounds_cover() -> None:
    generator = np.random.default_rng(3)
    runs, count, base, drop = 2_000, 150, 0.6, 0.05
    missed = 0
    for _ in range(runs):
        reference = generator.random(count) < base
        lost = generator.random(count) < np.where(reference, 0.08, 0.03 * base / (1 - base))
        difference = np.where(reference, lost, 0.0) - np.where(reference, 0.0, lost)
        missed += proportion_bounds(reference.astype(float), difference, 0.95, relative=True).upper <= drop
    assert 0.01 < missed / runs <= 0.05
