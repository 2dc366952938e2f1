"""Verification on tuning data: losses do not quite add, so the mix is measured and the limit corrected.

The allocation works with predicted KL; the budget is in the metric. Between them stand a ratio, loss / KL, that is
unknown before the first measurement (about 0.8 for perplexity of language models), and a margin for the statistical
error: a mix is accepted when the *upper* bound of its measured loss is within the budget, since held-out data will be
judged by its upper bound, too. Each round measures a mix, corrects ratio and margin by it, and allocates again:
tighter when the mix was over, looser when it left much of the budget unused. At most `rounds` rounds; the cheapest
accepted mix wins, and when none was accepted the one that came closest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lowprec.steps.allocate import Allocation, Option, allocate

FIRST_RATIO = 0.8
FIRST_MARGIN = 0.25
ENOUGH_USED = 0.8
STEP_BACK = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A mix's loss on tuning data, in the unit of the limit: estimate and upper bound, and its KL in nats."""

    loss: float
    upper: float
    kl_nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One measured mix. `predicted` is its loss as foreseen, ratio included."""

    allocation: Allocation
    predicted: float
    measured: Measured

    def accepted(self, limit: float) -> bool:
        """Whether the upper bound is within the limit."""
        return self.measured.upper <= limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The chosen round, whether it was accepted, and all rounds in order."""

    chosen: Round
    accepted: bool
    rounds: tuple[Round, ...]


def verify(
    groups: Sequence[str],
    options: Mapping[str, Sequence[Option]],
    limit: float,
    measure: Callable[[Allocation], Measured],
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verified:
    """Finds the cheapest mix whose measured loss is within `limit`.

    Args:
        options: losses in nats of KL, costs in the objective's unit.
        limit: the budget, in the unit that `measure` answers in.
        measure: measures a mix on tuning data.
        rounds: how many mixes may be measured.
    """
    ratio, margin = FIRST_RATIO, FIRST_MARGIN * limit
    cheapest = allocate(groups, options, float("inf")).cost
    taken: list[Round] = []
    for number in range(rounds):
        allocation = allocate(groups, options, max(limit - margin, 0.0) / ratio)
        if any(allocation.schemes == earlier.allocation.schemes for earlier in taken):
            break
        taken.append(Round(allocation=allocation, predicted=allocation.loss * ratio, measured=measure(allocation)))
        progress(number + 1, rounds)
        last = taken[-1]
        if last.accepted(limit) and (allocation.cost <= cheapest or _used(last, limit)):
            break
        ratio, margin = _corrected(last, limit, ratio)
    chosen = _best(taken, limit)
    return Verified(chosen=chosen, accepted=chosen.accepted(limit), rounds=tuple(taken))


def _used(last: Round, limit: float) -> bool:
    return last.measured.upper >= ENOUGH_USED * limit


def _corrected(last: Round, limit: float, ratio: float) -> tuple[float, float]:
    measured = last.measured
    if last.allocation.loss > 0 and measured.loss > 0:
        ratio = measured.loss / last.allocation.loss
    # The interval narrows with the loss itself; keeping its width is on the safe side when the mix shrinks.
    margin = max(measured.upper - measured.loss, 0.0)
    if not last.accepted(limit):
        ratio /= STEP_BACK
    return ratio, min(margin, 0.9 * limit)


def _best(taken: Sequence[Round], limit: float) -> Round:
    accepted = [r for r in taken if r.accepted(limit)]
    if accepted:
        return min(accepted, key=lambda r: (r.allocation.cost, r.measured.upper))
    return min(taken, key=lambda r: r.measured.upper)
