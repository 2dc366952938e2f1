"""Money: no window of tokens costs more than the budget, whatever is asked for and in whatever order."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.errors import ConfigError
from lowprec.runtime.spending import NANONATS, Account, Bucket, LossBudget, price_of

BUDGETS = st.builds(
    LossBudget,
    nats_per_token=st.floats(1e-6, 2.0),
    window_tokens=st.integers(1, 300),
    burst_share=st.floats(0.0, 0.99),
)


@settings(deadline=None)
@given(BUDGETS)
def test_rate_and_burst_of_a_window_are_within_its_budget(budget: LossBudget) -> None:
    whole = Fraction(budget.nats_per_token) * budget.window_tokens * NANONATS
    assert budget.rate * budget.window_tokens + budget.burst <= whole
    assert budget.rate >= 0
    assert budget.burst >= 0


@settings(deadline=None)
@given(BUDGETS, st.lists(st.tuples(st.floats(0.0, 4.0), st.integers(1, 40), st.integers(1, 5)), max_size=40))
def test_no_window_exceeds_the_budget(budget: LossBudget, wishes: list[tuple[float, int, int]]) -> None:
    """Passes of any price, any batch and any number in a row; those that cannot be paid are made at what is earned."""
    bucket, losses = Bucket(budget), []
    for nats, tokens, most in wishes:
        price = price_of(nats)
        passes = bucket.passes(price, tokens, most)
        price = price if passes else min(price, bucket.rate)
        count = tokens * max(passes, 1)
        bucket.pay(price, count)
        losses += [price] * count
        assert 0 <= bucket.balance <= bucket.burst
    sums = np.concatenate([[0], np.cumsum(np.array(losses, dtype=np.int64))])
    window = min(budget.window_tokens, len(losses))
    most = int((sums[window:] - sums[: len(sums) - window]).max())
    assert Fraction(most) <= Fraction(budget.nats_per_token) * budget.window_tokens * NANONATS


@settings(deadline=None)
@given(BUDGETS, st.floats(0.0, 4.0), st.integers(1, 40), st.integers(1, 60))
def test_several_passes_at_once_are_as_many_single_ones(
    budget: LossBudget, nats: float, tokens: int, most: int
) -> None:
    price = price_of(nats)
    at_once, one_by_one, paid = Bucket(budget), Bucket(budget), 0
    passes = at_once.passes(price, tokens, most)
    at_once.pay(price, tokens * passes)
    while paid < most and one_by_one.passes(price, tokens, 1):
        one_by_one.pay(price, tokens)
        paid += 1
    assert (paid, one_by_one.balance) == (passes, at_once.balance)


@settings(deadline=None)
@given(BUDGETS, st.floats(0.0, 4.0), st.integers(1, 40), st.integers(1, 60))
def test_an_overdrawn_bucket_pays_for_nothing_that_costs_more_than_it_earns(
    budget: LossBudget, nats: float, tokens: int, most: int
) -> None:
    bucket, price = Bucket(budget), price_of(nats)
    costs = price > bucket.rate
    assert bucket.pay(price, bucket.burst + 1) == costs
    assert bucket.passes(price, tokens, most) == (0 if costs else most)
    assert not bucket.pay(bucket.rate, tokens), "no more than it was"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"nats_per_token": 0.0}, "budget 0.0 nats per token is outside"),
        ({"nats_per_token": -0.1}, "budget -0.1"),
        ({"nats_per_token": float("nan")}, "budget nan"),
        ({"nats_per_token": 1e9}, "budget 1000000000.0"),
        ({"nats_per_token": 0.1, "window_tokens": 0}, "window of 0 tokens"),
        ({"nats_per_token": 0.1, "window_tokens": 10000.5}, "window of 10000.5 tokens: give a whole number"),
        ({"nats_per_token": 0.1, "burst_share": 1.0}, "burst share 1.0"),
        ({"nats_per_token": 0.1, "burst_share": -1.0}, "burst share -1.0"),
    ],
)
def test_budgets_that_cannot_be(fields: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LossBudget(**fields)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=30))
def test_an_account_knows_the_rung_of_every_token(made: list[tuple[int, int]]) -> None:
    account = Account(floor=0, bucket=Bucket(LossBudget(nats_per_token=1.0)))
    for rung, tokens in made:
        account.add(rung, price_of(0.1), tokens)
    expected = [rung for rung, tokens in made for _ in range(tokens)]
    assert account.rungs() == expected
    assert account.made == len(expected)
    assert len(account.runs) == len(list(itertools.groupby(expected)))
