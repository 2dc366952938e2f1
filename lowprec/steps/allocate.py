"""The cheapest mix within a loss limit: an exact multiple-choice knapsack.

One scheme is chosen for each group. With x[g, o] = 1 where group g takes option o:

    minimise    sum x[g, o] cost[g, o]
    subject to  sum x[g, o] loss[g, o] <= limit,    sum over o of x[g, o] = 1 for each g,    x binary

(the multiple-choice knapsack problem; Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11), solved
to a gap of zero by HiGHS (`scipy.optimize.milp`). Layers that a runtime fuses are one group, so that they share a
scheme needs no constraint.

HiGHS works with absolute tolerances (1e-6 on rows and on the gap), while losses run from 1e-7 to 1 nats and costs
from 1 to 1e9. Each group's least loss and least cost are therefore subtracted (a constant, since one option is
taken), and what remains is scaled: rows so that their bound is 1, the objective so that the gap is 1e-12 of its largest
coefficient. What comes back is summed exactly (`math.fsum`); a mix that breaks a bound by less than HiGHS can see
is cut off by name and the search goes on. After MAX_CUTS such mixes (which takes many alike groups whose sums differ
from the limit by rounding alone) the limit is lowered by 2e-6 of the room above the least possible loss.

Ties: options and groups are sorted by name first, so the input's order is without effect; among the mixes of least cost
a second solve takes the one of least loss; of two options alike in loss and cost the first name stays.

Left out: costs shared between groups, and interactions between the losses (the verification rounds tighten the limit).
"""

import ctypes
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from lowprec.errors import BudgetError, ConfigError

GOAL_SCALE = 1e6
MAX_CUTS = 10
# Twice the violation of a row that HiGHS accepts, on rows whose bound is 1.
CLEARANCE = 2e-6
TIME_LIMIT_SECONDS = 60.0
# The tie-break's own limit: counted in nodes, not seconds, so that a busy machine does not change the plan.
TIE_BREAK_NODES = 10_000
# `scipy.optimize.milp` has this status at a time or node limit.
OUT_OF_TIME = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What one group would lose (nats) and cost (the objective's unit) in `scheme`."""

    scheme: str
    loss: float
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """A mix: (group, scheme) in the order that the groups were given in, with the sums of its losses and costs."""

    schemes: tuple[tuple[str, str], ...]
    loss: float
    cost: float

    def scheme_of(self) -> dict[str, str]:
        """Group name -> scheme name."""
        return dict(self.schemes)


Choices = Mapping[str, Sequence[Option]]
Kept = Mapping[str, list[Option]]
Picks = dict[str, Option]


def allocate(
    groups: Sequence[str], options: Choices, limit: float, *, time_limit_s: float = TIME_LIMIT_SECONDS
) -> Allocation:
    """The mix of least total cost whose total predicted loss is at most `limit`.

    Args:
        groups: the groups' names, in the order of the result.
        options: for each group the schemes to choose from.
        limit: largest sum of predicted losses, in nats.
        time_limit_s: how long the search may take.

    Raises:
        ConfigError: no groups, a group without options, one given twice, or numbers that are not finite.
        BudgetError: no mix is within the limit (`report` is the Allocation of least loss), or the search ran out of
            time (`report` is the best Allocation found, or None).
    """
    least = least_loss(groups, options)
    if math.isnan(limit):
        raise ConfigError("the loss limit is not a number")
    if least.loss > limit:
        counts = Counter(scheme for _, scheme in least.schemes)
        mix = ", ".join(f"{count} groups in {scheme}" for scheme, count in sorted(counts.items()))
        raise BudgetError(
            f"no mix is within a predicted loss of {limit:.6g} nats: the least is {least.loss:.6g}, with {mix}; "
            "raise the budget, allow a more precise scheme, or use a better solver",
            least,
        )
    kept = {group: _undominated(options[group]) for group in sorted(groups)}
    cheapest = _cheapest(groups, kept, limit, time_limit_s)
    return _allocation(groups, _least_loss_at_cost(kept, cheapest, limit))


def least_loss(groups: Sequence[str], options: Choices) -> Allocation:
    """The mix of least predicted loss, whatever it costs (the cheapest of those); ConfigError as for `allocate`."""
    _check(groups, options)
    return _allocation(groups, {g: min(options[g], key=lambda o: (o.loss, o.cost, o.scheme)) for g in groups})


def frontier(groups: Sequence[str], options: Choices, limits: Iterable[float]) -> list[Allocation]:
    """The cheapest mix for each limit, in the order given; limits below the least possible loss are left out."""
    least = least_loss(groups, options)
    return [allocate(groups, options, limit) for limit in limits if limit >= least.loss]


def _check(groups: Sequence[str], options: Choices) -> None:
    if not groups:
        raise ConfigError("there is no group to allocate a scheme to")
    if len(set(groups)) != len(groups):
        raise ConfigError(f"groups are given twice: {sorted({g for g in groups if list(groups).count(g) > 1})}")
    for group in groups:
        choices = options.get(group, ())
        if not choices:
            raise ConfigError(f"group {group!r} has no scheme to choose from")
        if len({o.scheme for o in choices}) != len(choices):
            raise ConfigError(f"group {group!r} has a scheme twice: {sorted(o.scheme for o in choices)}")
        for option in choices:
            if not (math.isfinite(option.loss) and math.isfinite(option.cost)):
                raise ConfigError(f"group {group!r} in {option.scheme} has loss {option.loss} and cost {option.cost}")


def _undominated(choices: Sequence[Option]) -> list[Option]:
    """The options that no other matches in both loss and cost, by rising cost; of equals the first name."""
    kept: list[Option] = []
    for option in sorted(choices, key=lambda o: (o.cost, o.loss, o.scheme)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _total(picks: Picks, field: str) -> float:
    return math.fsum(getattr(option, field) for option in picks.values())


def _allocation(groups: Sequence[str], picks: Picks) -> Allocation:
    return Allocation(
        schemes=tuple((group, picks[group].scheme) for group in groups),
        loss=_total(picks, "loss"),
        cost=_total(picks, "cost"),
    )


def _cheapest(groups: Sequence[str], kept: Kept, limit: float, time_limit_s: float) -> Picks:
    """The picks of least cost whose loss is at most `limit`, which is known to be possible."""
    problem = _Problem(kept, "cost", {"loss": limit})
    for attempt in range(MAX_CUTS + 1):
        status, picks, gap = problem.solve(time_limit_s=time_limit_s)
        within = picks is not None and _total(picks, "loss") <= limit
        if status == OUT_OF_TIME:
            left = "no mix found" if gap is None else f"{gap:.2g} of the cost still open"
            raise BudgetError(
                f"the search for the cheapest mix ran out of its {time_limit_s:g} s, {left}: "
                "allow more time or fewer schemes",
                _allocation(groups, picks) if picks is not None and within else None,
            )
        if picks is None:
            break
        if within:
            return picks
        problem.forbid(picks)
        if attempt == MAX_CUTS - 1:
            problem.tighten()
    raise RuntimeError(f"HiGHS found no mix within {limit!r} although there is one (status {status})")


def _least_loss_at_cost(kept: Kept, cheapest: Picks, limit: float) -> Picks:
    """Of the picks that cost as little as `cheapest`, those of least loss."""
    cost = _total(cheapest, "cost")
    problem = _Problem(kept, "loss", {"cost": cost, "loss": _total(cheapest, "loss")})
    for _ in range(MAX_CUTS):
        _, picks, _ = problem.solve(node_limit=TIE_BREAK_NODES)
        if picks is None:
            break
        if _total(picks, "cost") <= cost and _total(picks, "loss") <= limit:
            return min(cheapest, picks, key=lambda p: _total(p, "loss"))
        problem.forbid(picks)
    return cheapest


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keeps HiGHS's left-over debug line (jump-dev/HiGHS.jl issue 318) off file descriptor 1, where reports go."""
    try:
        saved = os.dup(1)
    except OSError:
        # No standard output, nothing to keep clean.
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    _flush_c_stdout()
    os.dup2(sink, 1)
    try:
        yield
    finally:
        _flush_c_stdout()
        os.dup2(saved, 1)
        os.close(saved)
        os.close(sink)


def _flush_c_stdout() -> None:
    # HiGHS prints through C's own buffer, which would otherwise be written after the descriptor is back.
    ctypes.CDLL(None if os.name != "nt" else "ucrtbase").fflush(None)


class _Problem:
    """Least sum of `objective` (a field of Option) with the sum of each field in `bounds` within its bound."""

    def __init__(self, kept: Kept, objective: str, bounds: Mapping[str, float]) -> None:
        least = {f: {g: min(getattr(o, f) for o in c) for g, c in kept.items()} for f in (objective, *bounds)}
        most = {f: math.fsum(max(getattr(o, f) for o in c) for c in kept.values()) for f in bounds}
        # A bound may be infinite; no mix needs more room than the one of the largest values.
        room = {f: min(bound, most[f]) - math.fsum(least[f].values()) for f, bound in bounds.items()}
        # An option that takes more than all the room there is would only spread the coefficients.
        self._flat = [
            (group, option)
            for group, choices in kept.items()
            for option in choices
            if all(getattr(option, f) - least[f][group] <= room[f] + 1e-12 * abs(most[f]) for f in bounds)
        ]
        rows = {f: np.array([getattr(option, f) - least[f][group] for group, option in self._flat]) for f in least}
        position = {group: i for i, group in enumerate(kept)}
        count = len(self._flat)
        self._one_each = csr_array(
            (np.ones(count), ([position[group] for group, _ in self._flat], np.arange(count))), shape=(len(kept), count)
        )
        self._goal = rows[objective] * (GOAL_SCALE / (rows[objective].max() or 1.0))
        scale = {f: max(room[f], float(rows[f].max())) or 1.0 for f in bounds}
        self._rows = [rows[f] / scale[f] for f in bounds]
        self._upper = [room[f] / scale[f] for f in bounds]

    def solve(
        self, *, time_limit_s: float = np.inf, node_limit: int = 2**31 - 1
    ) -> tuple[int, Picks | None, float | None]:
        """HiGHS's status, the picks that it found if any, and the relative gap that it left."""
        bounds = LinearConstraint(csr_array(np.stack(self._rows)), -np.inf, np.array(self._upper))
        with _silent_stdout():
            result = milp(
                self._goal,
                integrality=np.ones(len(self._flat), dtype=np.int64),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(self._one_each, 1, 1), bounds],
                options={"mip_rel_gap": 0.0, "time_limit": time_limit_s, "node_limit": node_limit},
            )
        if result.x is None:
            return result.status, None, None
        picks = dict(self._flat[i] for i in np.flatnonzero(result.x > 0.5))
        return result.status, picks, result.mip_gap

    def forbid(self, picks: Picks) -> None:
        """Cuts off one mix: not all of its options together."""
        self._rows.append(np.array([float(picks[group] is option) for group, option in self._flat]))
        self._upper.append(len(picks) - 1.0)

    def tighten(self) -> None:
        """Lowers the first bound by more than HiGHS can overstep it."""
        self._upper[0] -= CLEARANCE
