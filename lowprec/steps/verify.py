"""Verification on tuning data: losses do not quite add, so mixes are measured and the limit corrected.

The allocation works with predicted KL; the budget is in the metric. A mix is accepted when the *upper* bound of its
measured loss is within the budget, since held-out data will be judged by its upper bound, too. Between prediction and
upper bound stands an unknown curve. The search assumes

    upper(L) = a L^p,    L the mix's predicted KL

with a from the last measurement and p at first that of the metric's `Curve`; from two measurements on, p is theirs. Two
that contradict each other (the mix of less KL lost more: on a small budget the text's own noise is as large) count as
one in their middle, with the curve's p. The next limit solves upper(L) = limit, kept between the largest L that was
accepted and the smallest that was not. At most `rounds` mixes are measured; the cheapest accepted one wins.

Predicted losses may be corrected by what was measured, and bounds by what all mixes lost (`lowprec.steps.pooling`);
then those of the mixes measured before are, too.

The mix of no predicted loss is the reference itself: it is within every budget without being measured, and is what is
left when no other mix is accepted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lowprec.steps.allocate import Allocation, Option, allocate, least_loss
from lowprec.steps.scores import UnitSums

FIRST_MARGIN = 0.25
ENOUGH_USED = 0.8
# Aims below the limit: a bound that meets it on tuning text is as often above it as below on other text.
AIM = 0.9
POWERS = (0.25, 2.0)
Options = Mapping[str, Sequence[Option]]
BISECTIONS, SMALLEST_STEP = 12, 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """loss = scale KL^power: how a metric's loss, in the unit of the limit, rises with KL in nats."""

    scale: float
    power: float

    def loss(self, kl_nats: float) -> float:
        """The loss at a KL."""
        return float(self.scale * kl_nats**self.power)

    def kl_nats(self, loss: float) -> float:
        """The KL at a loss."""
        return float((loss / self.scale) ** (1.0 / self.power))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A mix's loss on tuning data, in the unit of the limit: estimate and upper bound, and its KL in nats.

    `units` are what it lost where, if it is loss of likelihood that the limit is about.
    """

    loss: float
    upper: float
    kl_nats: float
    units: UnitSums | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One measured mix. `predicted` and `predicted_kl_nats` are its loss and KL as foreseen before it was measured."""

    allocation: Allocation
    predicted: float
    predicted_kl_nats: float
    measured: Measured

    def accepted(self, limit: float) -> bool:
        """Whether the upper bound is within the limit."""
        return self.measured.upper <= limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The chosen round, whether it was accepted, all measured rounds in order, and the curve that they lie on.

    The chosen one is none of the rounds when only the reference itself is within the limit. `options` are those that
    were given, as the rounds corrected them.
    """

    chosen: Round
    accepted: bool
    rounds: tuple[Round, ...]
    curve: Curve
    options: Options

    @property
    def closest(self) -> Round:
        """The measured mix of the least upper bound."""
        return min(self.rounds, key=lambda r: r.measured.upper)


def _as_they_are(options: Options, taken: Sequence[Round]) -> Options:
    return options


def _each_by_itself(taken: Sequence[Round]) -> Sequence[Round]:
    return taken


def verify(
    groups: Sequence[str],
    options: Options,
    limit: float,
    measure: Callable[[Allocation], Measured],
    rounds: int,
    curve: Curve,
    progress: Callable[[int, int], None] = lambda done, total: None,
    correct: Callable[[Options, Sequence[Round]], Options] = _as_they_are,
    pool: Callable[[Sequence[Round]], Sequence[Round]] = _each_by_itself,
) -> Verified:
    """Finds the cheapest mix whose measured loss is within `limit`.

    Args:
        options: losses in nats of KL, costs in the objective's unit.
        limit: the budget, in the unit that `measure` answers in.
        measure: measures a mix on tuning data.
        rounds: how many mixes may be measured.
        curve: how the loss is expected to rise with KL.
        correct: (options, rounds so far) -> options with losses as the rounds say.
        pool: rounds so far -> the same with bounds as all of them together say; one that was accepted may turn out
            not to be, and the other way round.
    """
    cheapest = allocate(groups, options, float("inf")).cost
    allowed = curve.kl_nats((1.0 - FIRST_MARGIN) * limit)
    taken: list[Round] = []
    corrected = correct(options, taken)
    least = least_loss(groups, corrected)
    for number in range(rounds):
        allocation = _unmeasured(groups, corrected, max(allowed, least.loss), least.loss, taken, limit)
        if allocation is None:
            break
        predicted = _through(taken, curve).loss(allocation.loss)
        taken.append(
            Round(
                allocation=allocation,
                predicted=predicted,
                predicted_kl_nats=allocation.loss,
                measured=measure(allocation),
            )
        )
        progress(number + 1, rounds)
        corrected = correct(options, taken)
        least = least_loss(groups, corrected)
        taken = [_rescored(one, corrected) for one in pool(taken)]
        if any(
            r.allocation.cost <= cheapest or r.measured.upper >= ENOUGH_USED * limit for r in _accepted(taken, limit)
        ):
            break
        allowed = _next(taken, limit, curve)
    chosen = _best(taken, least, limit)
    return Verified(
        chosen=chosen,
        accepted=chosen.accepted(limit),
        rounds=tuple(taken),
        curve=_through(taken, curve),
        options=corrected,
    )


def _accepted(taken: Sequence[Round], limit: float) -> list[Round]:
    return [one for one in taken if one.accepted(limit)]


def _rescored(one: Round, options: Options) -> Round:
    """The round with its mix's loss as `options` predict it now."""
    losses = {(group, o.scheme): o.loss for group, found in options.items() for o in found}
    loss = math.fsum(losses[choice] for choice in one.allocation.schemes)
    return replace(one, allocation=replace(one.allocation, loss=loss))


def _unmeasured(
    groups: Sequence[str],
    options: Options,
    allowed: float,
    floor: float,
    taken: Sequence[Round],
    limit: float,
) -> Allocation | None:
    """The cheapest mix of at most `allowed`; where that is known already, one from inside the bracket, if there is."""
    known = {r.allocation.schemes for r in taken}
    for _ in range(BISECTIONS):
        allocation = allocate(groups, options, allowed)
        if allocation.schemes not in known and allocation.loss > 0.0:
            return allocation
        accepted, refused = _bracket(taken, limit)
        # A known mix that was refused is left downwards, one that was accepted (or the reference itself) upwards.
        low, high = (max(accepted, floor), allowed) if allocation.loss >= refused else (allowed, refused)
        if high == math.inf:
            allowed *= 2.0
        elif high - low <= SMALLEST_STEP * high:
            return None
        else:
            allowed = (low + high) / 2.0
    return None


def _bracket(taken: Sequence[Round], limit: float) -> tuple[float, float]:
    """The largest predicted KL that was accepted and the smallest that was not."""
    refused = min((r.allocation.loss for r in taken if not r.accepted(limit)), default=math.inf)
    accepted = max((r.allocation.loss for r in taken if r.accepted(limit) and r.allocation.loss < refused), default=0.0)
    return accepted, refused


def _through(taken: Sequence[Round], curve: Curve) -> Curve:
    """The curve of the losses: through the last one, with the power of the last two."""
    if not taken or min(taken[-1].measured.loss, taken[-1].allocation.loss) <= 0:
        return curve
    power = _power(taken, curve)
    return Curve(scale=taken[-1].measured.loss / taken[-1].allocation.loss ** power, power=power)


def _next(taken: Sequence[Round], limit: float, curve: Curve) -> float:
    """The predicted KL to allow in the next round."""
    upper, loss = _anchor(taken)
    wanted = loss * (AIM * limit / upper) ** (1.0 / _power(taken, curve)) if upper > 0 else 2.0 * loss
    accepted, refused = _bracket(taken, limit)
    if accepted < wanted < refused:
        return wanted
    # The curve leads out of the bracket: halve it instead, in the logarithm where it has two ends.
    if wanted >= refused:
        return math.sqrt(accepted * refused) if accepted else refused / 2.0
    return math.sqrt(accepted * refused) if refused < math.inf else 2.0 * accepted


def _slope(taken: Sequence[Round]) -> float | None:
    """How the logarithm of the upper bound rises with that of the predicted KL between the last two measurements."""
    if len(taken) < 2:
        return None
    one, two = taken[-2:]
    if min(one.measured.upper, two.measured.upper) <= 0 or one.allocation.loss == two.allocation.loss:
        return None
    rise = math.log(two.measured.upper / one.measured.upper)
    return rise / math.log(two.allocation.loss / one.allocation.loss)


def _power(taken: Sequence[Round], curve: Curve) -> float:
    """The power between the last two measurements; the expected one where they tell none."""
    slope = _slope(taken)
    return curve.power if slope is None or slope <= 0 else min(max(slope, POWERS[0]), POWERS[1])


def _anchor(taken: Sequence[Round]) -> tuple[float, float]:
    """(upper bound, predicted KL) that the curve goes through: the last one, or the middle of two in contradiction."""
    slope = _slope(taken)
    used = taken[-2:] if slope is not None and slope <= 0 else taken[-1:]
    uppers, losses = [r.measured.upper for r in used], [r.allocation.loss for r in used]
    return (uppers[0], losses[0]) if len(used) == 1 else (math.sqrt(math.prod(uppers)), math.sqrt(math.prod(losses)))


def _best(taken: Sequence[Round], least: Allocation, limit: float) -> Round:
    accepted = _accepted(taken, limit)
    if least.loss == 0.0:
        itself = Measured(loss=0.0, upper=0.0, kl_nats=0.0)
        accepted.append(Round(allocation=least, predicted=0.0, predicted_kl_nats=0.0, measured=itself))
    if accepted:
        return min(accepted, key=lambda r: (r.allocation.cost, r.measured.upper))
    return min(taken, key=lambda r: r.measured.upper)
