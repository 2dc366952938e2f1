"""The allocation against brute force and dynamic programming, and what the planner promises about it."""

import itertools
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.errors import BudgetError, ConfigError
from lowprec.steps.allocate import Allocation, Option, allocate, frontier, least_loss

Choices = dict[str, list[Option]]


def brute_force(options: Choices, limit: float) -> tuple[float, float] | None:
    """Least (cost, loss) over all mixes within the limit."""
    sums = [
        (math.fsum(o.cost for o in mix), math.fsum(o.loss for o in mix)) for mix in itertools.product(*options.values())
    ]
    return min((pair for pair in sums if pair[1] <= limit), default=None)


def by_integer_losses(options: Choices, limit: int) -> tuple[float, int]:
    """Least cost, and least loss at that cost, by dynamic programming over integer losses."""
    best = np.full(limit + 1, np.inf)
    best[0] = 0.0
    for choices in options.values():
        after = np.full(limit + 1, np.inf)
        for option in choices:
            loss = int(option.loss)
            if loss <= limit:
                after[loss:] = np.minimum(after[loss:], best[: limit + 1 - loss] + option.cost)
        best = after
    return float(best.min()), int(np.argmin(best))


def realistic(groups: int, seed: int, schemes: int = 9) -> Choices:
    """Groups of unlike sizes and sensitivities; losses fall fourfold with each bit, the first scheme loses nothing."""
    rng = random.Random(seed)
    bits = [16.0, 8.0, 8.2, 8.1, 7.0, 4.0, 4.2, 4.3, 4.5][:schemes]
    options = {}
    for i in range(groups):
        size, sensitivity = rng.choice([1e5, 3e5, 9e5, 9e5, 2.8e7]), 10 ** rng.uniform(-4, -2)
        options[f"group{i}"] = [
            Option(
                scheme=f"scheme{j}",
                loss=0.0 if j == 0 else sensitivity * 4 ** (4 - b) * rng.uniform(0.7, 1.4),
                cost=size * b / 8 * rng.uniform(0.9, 1.1),
            )
            for j, b in enumerate(bits)
        ]
    return options


@st.composite
def small_problems(draw: st.DrawFn) -> tuple[Choices, float]:
    """Up to four groups of up to four schemes, losses over seven and costs over nine decades, ties among them."""
    loss = st.one_of(st.sampled_from([0.0, 0.25, 0.5]), st.floats(-7, 0).map(lambda e: 10**e))
    # Thousandths: two costs are equal or differ by more than the rounding of a sum.
    cost = st.one_of(st.sampled_from([1.0, 2.0, 3.0]), st.floats(0, 9).map(lambda e: round(10**e, 3)))
    options = {
        f"g{i}": [
            Option(scheme=f"s{j}", loss=draw(loss), cost=draw(cost)) for j in range(draw(st.integers(1, 4), label="n"))
        ]
        for i in range(draw(st.integers(1, 4)))
    }
    return options, draw(st.floats(-6, 0.5).map(lambda e: 10**e))


@settings(max_examples=150, deadline=None)
@given(small_problems())
def test_equals_brute_force(problem: tuple[Choices, float]) -> None:
    options, limit = problem
    expected = brute_force(options, limit)
    if expected is None:
        with pytest.raises(BudgetError, match="the least is"):
            allocate(list(options), options, limit)
        return
    found = allocate(list(options), options, limit)
    cost, loss = expected
    assert found.loss <= limit
    # HiGHS closes the gap to 1e-12 of the largest cost; at equal cost the least loss counts, to its row tolerance.
    assert found.cost == pytest.approx(cost, rel=1e-9)
    if found.cost == cost:
        assert found.loss == pytest.approx(loss, rel=1e-5, abs=1e-6 * limit)


@pytest.mark.parametrize(("groups", "seed", "share"), [(40, 0, 0.1), (40, 1, 0.02), (150, 2, 0.2), (150, 3, 0.4)])
def test_equals_dynamic_programming(groups: int, seed: int, share: float) -> None:
    options = {
        name: [Option(scheme=o.scheme, loss=float(round(o.loss * 1e4)), cost=float(round(o.cost))) for o in choices]
        for name, choices in realistic(groups, seed).items()
    }
    limit = int(share * sum(max(o.loss for o in choices) for choices in options.values()))
    found = allocate(list(options), options, float(limit))
    assert (found.cost, found.loss) == by_integer_losses(options, limit)


def test_sums_and_order_are_those_of_the_result() -> None:
    options = realistic(20, 5)
    names = sorted(options, reverse=True)
    found = allocate(names, options, 0.01)
    assert [group for group, _ in found.schemes] == names
    picked = [next(o for o in options[group] if o.scheme == scheme) for group, scheme in found.schemes]
    assert found.loss == math.fsum(o.loss for o in picked) <= 0.01
    assert found.cost == math.fsum(o.cost for o in picked)
    assert found.scheme_of() == dict(found.schemes)


def test_input_order_is_without_effect() -> None:
    options = realistic(25, 6)
    # Twins in loss and cost, so that there are ties to break.
    options |= {f"twin{i}": [Option(scheme=s, loss=1e-3 * (s < "b"), cost=2.0) for s in "abc"] for i in range(3)}
    options |= {
        f"equal{i}": [Option(scheme="a", loss=0, cost=2), Option(scheme="b", loss=1e-3, cost=1)] for i in range(6)
    }
    expected = allocate(list(options), options, 0.01).scheme_of()
    rng = random.Random(0)
    for _ in range(3):
        names = rng.sample(list(options), len(options))
        shuffled = {name: rng.sample(options[name], len(options[name])) for name in names}
        assert allocate(names, shuffled, 0.01).scheme_of() == expected
    assert {expected[f"twin{i}"] for i in range(3)} == {"b"}


def test_never_worse_than_uniform() -> None:
    options = realistic(60, 7)
    for limit in (0.001, 0.02, 0.3):
        found = allocate(list(options), options, limit)
        for j in range(9):
            uniform = [choices[j] for choices in options.values()]
            if math.fsum(o.loss for o in uniform) <= limit:
                assert found.cost <= math.fsum(o.cost for o in uniform)


def test_frontier_falls_and_leaves_out_what_cannot_be() -> None:
    options = {name: choices[1:] for name, choices in realistic(40, 8).items()}
    least = least_loss(list(options), options).loss
    limits = [least / 2, least, 2 * least, 5 * least, 0.05, 0.2, 10.0]
    points = frontier(list(options), options, limits)
    assert len(points) == len(limits) - 1
    assert all(a.cost >= b.cost for a, b in itertools.pairwise(points))
    assert all(point.loss <= limit for point, limit in zip(points, limits[1:], strict=True))
    assert allocate(list(options), options, math.inf) == points[-1]
    assert points[-1].cost == math.fsum(min(o.cost for o in choices) for choices in options.values())


def test_limit_that_only_the_safest_mix_meets() -> None:
    options = realistic(10, 9)
    found = allocate(list(options), options, 0.0)
    assert set(found.scheme_of().values()) == {"scheme0"}


def test_alike_groups_at_the_limit() -> None:
    # Three tenths sum to more than 0.3, so no mix with three cheap groups is within; 120 of them look as if.
    options = {
        f"g{i}": [Option(scheme="dear", loss=0.0, cost=2.0), Option(scheme="cheap", loss=0.1, cost=1.0)]
        for i in range(10)
    }
    assert math.fsum([0.1] * 3) > 0.3
    found = allocate(list(options), options, 0.3)
    assert list(found.scheme_of().values()).count("cheap") == 2


def test_infeasible_names_the_least_loss_and_its_mix() -> None:
    options = {"a": [Option(scheme="x", loss=0.2, cost=1.0), Option(scheme="y", loss=0.1, cost=2.0)]}
    options["b"] = [Option(scheme="y", loss=0.3, cost=1.0)]
    with pytest.raises(
        BudgetError, match=r"within a predicted loss of 0\.35 .* least is 0\.4, with 2 groups in y"
    ) as info:
        allocate(["a", "b"], options, 0.35)
    assert info.value.report == Allocation(schemes=(("a", "y"), ("b", "y")), loss=0.4, cost=3.0)


def test_running_out_of_time_says_so() -> None:
    options = realistic(150, 10)
    with pytest.raises(BudgetError, match="ran out of its 0 s"):
        allocate(list(options), options, 0.02, time_limit_s=0.0)


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([], {}, "no group"),
        (["a", "a"], {"a": [Option(scheme="x", loss=0, cost=1)]}, "given twice"),
        (["a"], {}, "no scheme to choose"),
        (["a"], {"a": [Option(scheme="x", loss=math.nan, cost=1)]}, "loss nan"),
        (["a"], {"a": [Option(scheme="x", loss=0, cost=math.inf)]}, "cost inf"),
        (["a"], {"a": [Option(scheme="x", loss=0, cost=1)] * 2}, "scheme twice"),
    ],
)
def test_bad_input(groups: Sequence[str], options: Choices, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        allocate(groups, options, 1.0)


def test_bad_limit() -> None:
    with pytest.raises(ConfigError, match="not a number"):
        allocate(["a"], {"a": [Option(scheme="x", loss=0, cost=1)]}, math.nan)


def test_nothing_is_printed() -> None:
    # On these problems HiGHS 1.12 writes a debug line to the process's standard output, past Python.
    code = (
        "from tests.test_allocate import realistic\n"
        "from lowprec.steps.allocate import allocate\n"
        "for seed in (3, 14, 22):\n"
        "    options = realistic(60, seed)\n"
        "    allocate(list(options), options, 0.02)\n"
        "print('done')\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=root
    )
    assert done.stdout == "done\n"
