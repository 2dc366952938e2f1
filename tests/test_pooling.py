"""Bounds of mixes by what all of them lost per nat, on simulated text."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest

from lowprec.steps.allocate import Allocation, Option
from lowprec.steps.judge import ratio_bounds
from lowprec.steps.pooling import pooled
from lowprec.steps.scores import PairedScores, UnitSums, unit_sums
from lowprec.steps.verify import Curve, Measured, Round, verify

UNITS, TOKENS, PER_KL, CONFIDENCE = 120, 500.0, 0.4, 0.95


def mix(kl_nats: float, seed: int, units: int = UNITS) -> Measured:
    """A mix as it would be measured: KL varies between units, and each token's loss has the noise of its KL."""
    generator = np.random.default_rng(seed)
    kl = kl_nats * generator.lognormal(-0.08, 0.4, units) * TOKENS
    loss = PER_KL * kl + np.sqrt(2.0 * kl) * generator.standard_normal(units)
    tokens = np.full(units, TOKENS)
    own = ratio_bounds(loss, tokens, CONFIDENCE)
    return Measured(
        loss=own.estimate,
        upper=own.estimate + (own.upper - own.estimate) * math.sqrt(2.0),
        kl_nats=float(kl.sum() / tokens.sum()),
        units=UnitSums(tokens=tuple(tokens.tolist()), loss=tuple(loss.tolist()), kl=tuple(kl.tolist())),
    )


def bounds(mixes: Sequence[Measured], judged: float = 1.0) -> list[Measured]:
    return pooled(mixes, judged, CONFIDENCE)


def test_more_mixes_know_more() -> None:
    mixes = [mix(0.02 + 0.002 * i, seed) for i, seed in enumerate((3, 4, 5))]
    together = bounds(mixes)
    assert [m.loss for m in together] == [m.loss for m in mixes]
    spread = [m.upper - PER_KL * m.kl_nats for m in mixes], [m.upper - PER_KL * m.kl_nats for m in together]
    assert np.std(spread[1]) < 0.3 * np.std(spread[0]), "the noise of each by itself is gone"
    order = sorted(together, key=lambda m: m.upper)
    assert order == sorted(together, key=lambda m: m.kl_nats), "less KL is less loss"


def test_bounds_fail_as_seldom_as_they_should() -> None:
    """The true loss on endless text lies below the bound in at least 95 % of the worlds."""
    worlds, failed, room = 200, 0, []
    for world in range(worlds):
        mixes = [mix(kl, 3 * world + i) for i, kl in enumerate((0.018, 0.02, 0.022))]
        upper = pooled(mixes, 1e9, CONFIDENCE)[1].upper
        failed += upper < PER_KL * 0.02
        room.append((upper - PER_KL * 0.02) / (mixes[1].upper - mixes[1].loss) * math.sqrt(2.0))
    assert failed <= 0.05 * worlds + 2.0 * math.sqrt(0.05 * 0.95 * worlds)
    assert np.mean(room) < 0.85, "and they are narrower than those of one mix"


def test_what_the_judge_will_read_keeps_its_noise() -> None:
    mixes = [mix(0.02, seed) for seed in range(6)]
    few, many = (pooled(mixes, judged, CONFIDENCE)[0].upper for judged in (0.25, 1e9))
    assert few - many > 0.0
    own = [(m.upper - m.loss) / math.sqrt(1.25) for m in mixes]
    assert few - PER_KL * 0.02 < own[0] + 2.0 * (many - PER_KL * 0.02)


def test_mixes_of_another_kl_say_nothing() -> None:
    near, far = [mix(kl, seed) for seed, kl in enumerate((0.02, 0.022))], [mix(kl, 9) for kl in (0.012, 0.05)]
    assert bounds([*near, *far])[:2] == bounds(near)
    assert bounds(far) == [bounds([one])[0] for one in far]


def test_where_one_unit_holds_the_kl_each_mix_keeps_its_own_bound() -> None:
    mixes = [mix(0.02, seed) for seed in (1, 2)]
    for i, one in enumerate(mixes):
        assert one.units is not None
        kl = (1e4, *one.units.kl[1:])
        mixes[i] = dataclasses.replace(one, units=dataclasses.replace(one.units, kl=kl))
    assert bounds(mixes) == mixes


@pytest.mark.parametrize("mixes", [[], [Measured(loss=0.1, upper=0.2, kl_nats=0.3)]])
def test_what_is_no_loss_of_likelihood_stays_as_it_is(mixes: list[Measured]) -> None:
    assert bounds(mixes) == mixes


def test_a_mix_that_changes_nothing_stays_as_it_is() -> None:
    still = Measured(loss=0.0, upper=0.0, kl_nats=0.0, units=UnitSums(tokens=(9.0,), loss=(0.0,), kl=(0.0,)))
    assert bounds([still]) == [still]


def test_windows_of_a_unit_are_summed() -> None:
    scores = PairedScores(
        unit=np.array([7, 2, 7]),
        source=np.zeros(3, np.int64),
        tokens=np.array([10, 20, 30]),
        loss_reference=np.array([1.0, 2.0, 3.0]),
        loss=np.array([1.5, 1.0, 4.0]),
        kl=np.array([0.1, 0.2, 0.3]),
        top1=np.array([9, 18, 27]),
    )
    assert unit_sums(scores) == UnitSums(tokens=(20.0, 40.0), loss=(-1.0, 1.5), kl=(0.2, pytest.approx(0.4)))


def test_verification_takes_the_bounds_of_all_rounds() -> None:
    """A mix that was refused by its own bound is taken once the rounds together say that it may be."""
    groups = [f"g{i}" for i in range(8)]
    options = {
        g: [Option(scheme="bf16", loss=0.0, cost=16.0), Option(scheme="w4a16-g64", loss=0.001 * (i + 1), cost=4.0)]
        for i, g in enumerate(groups)
    }

    def measure(allocation: Allocation) -> Measured:
        return Measured(loss=0.4 * allocation.loss, upper=9.0, kl_nats=allocation.loss)

    def pool(taken: Sequence[Round]) -> list[Round]:
        known = {1: 9.0}.get(len(taken), 0.01)
        return [dataclasses.replace(r, measured=dataclasses.replace(r.measured, upper=known)) for r in taken]

    curve = Curve(scale=0.4, power=1.0)
    alone = verify(groups, options, 0.01, measure, 2, curve)
    together = verify(groups, options, 0.01, measure, 4, curve, pool=pool)
    assert alone.chosen not in alone.rounds
    assert together.chosen == together.rounds[0], "the first was refused, and costs less than the second"
    assert len(together.rounds) == 2, "and uses enough of the budget"
