"""From two levels for every group to the rungs of a ladder: which mixes, and which of them are worth keeping.

The mixes lie on the front of (nats, microseconds): for equally spaced times between the bottom (every group at its
fastest) and the top (every group at its higher level) the one of least predicted loss, by the knapsack that plans are
made with (`lowprec.steps.allocate`), with nats and microseconds in each other's places. Each begins from the one below
it, whose raised groups stay up: so going up no group goes down. What that may cost is little: where the front is convex
(groups are raised in the order of nats saved for a microsecond) its mixes contain each other anyway.

A group whose lower level is not faster here has no reason to be there: it stays at the higher one on every rung.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats.nested import LEVEL_NAMES as LEVELS
from lowprec.formats.nested import NestedWeight
from lowprec.ladder import Rung, reason_for_no_step
from lowprec.records import Group
from lowprec.steps.allocate import Allocation, Choices, Option, allocate, least_loss

LOW, HIGH = LEVELS


def level_options(
    groups: Sequence[Group],
    predicted: Mapping[str, float],
    weight: Callable[[str], Tensor],
    nested: Mapping[str, NestedWeight],
    us: Mapping[tuple[str, int], float],
) -> dict[str, list[Option]]:
    """Group -> what each level loses and costs.

    Args:
        predicted: group -> nats of its INT4 weights.
        weight: layer -> its weight [N, K] float32 before rounding.
        nested: layer -> both planes.
        us: (group, level) -> microseconds.

    The loss of a rounding is quadratic in the error (Fisher's form), so that of the higher level is taken to be the
    lower one's times the squared ratio of their errors' norms. It only says which groups go up first: what a rung
    loses is measured.
    """
    found = {}
    for group in groups:
        errors = {
            level: sum(float((nested[x].dequantize(level) - weight(x)).double().square().sum()) for x in group.layers)
            for level in LEVELS.values()
        }
        ratio = errors[LEVELS[HIGH]] / errors[LEVELS[LOW]] if errors[LEVELS[LOW]] else 1.0
        losses = {LOW: predicted[group.name], HIGH: min(1.0, ratio) * predicted[group.name]}
        found[group.name] = [
            Option(scheme=name, loss=losses[name], cost=us[group.name, level]) for name, level in LEVELS.items()
        ]
    return found


def climb(groups: Sequence[str], options: Choices, rungs: int) -> list[Allocation]:
    """At most `rungs` mixes of levels from the fastest to the top, no group falling on the way.

    Raises:
        ConfigError: fewer than two rungs asked for.
        UnsupportedError: no group's lower level is faster.
    """
    if rungs < 2:
        raise ConfigError(f"a ladder of {rungs} rungs: give 2 or more")
    swapped = {g: [Option(scheme=o.scheme, loss=o.cost, cost=o.loss) for o in found] for g, found in options.items()}
    top = _swapped(allocate(groups, _raised(swapped, groups), float("inf")))
    mixes = [_swapped(least_loss(groups, swapped))]
    if mixes[0].schemes == top.schemes:
        raise UnsupportedError(
            "no group's INT4 level is faster than its INT8 level here: there is nothing to switch to"
        )
    for step in range(1, rungs - 1):
        limit = mixes[0].cost + (top.cost - mixes[0].cost) * step / (rungs - 1)
        up = [group for group, level in mixes[-1].schemes if level == HIGH]
        mix = _swapped(allocate(groups, _raised(swapped, up), max(limit, mixes[-1].cost)))
        if mix.schemes not in (mixes[-1].schemes, top.schemes):
            mixes.append(mix)
    return [*mixes, top]


def _raised(options: Choices, groups: Sequence[str]) -> dict[str, list[Option]]:
    """The options with these groups at the higher level alone."""
    up = set(groups)
    return {g: [o for o in found if g not in up or o.scheme == HIGH] for g, found in options.items()}


def _swapped(mix: Allocation) -> Allocation:
    return replace(mix, loss=mix.cost, cost=mix.loss)


def steps_only(rungs: Sequence[Rung]) -> tuple[list[Rung], list[tuple[str, str]]]:
    """The rungs that are steps by what was measured, from the cheapest to the dearest, and (rung, why) of the others.

    Losses and times are noisy. Left out is what is no step to the top, which always stays; what another one beats, from
    above or from below; and of the rest what is no step to the next one kept.
    """
    top, left = rungs[-1], list[tuple[str, str]]()

    def sift(found: Sequence[Rung], why: Callable[[Rung], str | None]) -> list[Rung]:
        reasons = [(rung, why(rung)) for rung in found]
        left.extend((rung.name, reason) for rung, reason in reasons if reason is not None)
        return [rung for rung, reason in reasons if reason is None]

    below = sift(rungs[-2::-1], lambda rung: reason_for_no_step(rung, top))
    kept = [top]
    for rung in sift(below, lambda rung: _beaten(rung, below)):
        kept += sift([rung], partial(reason_for_no_step, upper=kept[-1]))
    return kept[::-1], left


def _beaten(rung: Rung, others: Sequence[Rung]) -> str | None:
    """Why one of `others`, the dearest first, makes `rung` useless, None if none does. Prompts are read at the top."""
    place = others.index(rung)
    for index, other in enumerate(others):
        ratios = [other.pass_us("decode", t.tokens) / t.p50_us for t in rung.decode]
        better = other.loss_nats < rung.loss_nats or min(ratios) < 1.0
        # Of two that are equal the dearer one, which comes first, stays.
        if other.loss_nats <= rung.loss_nats and max(ratios) <= 1.0 and (better or index < place):
            return (
                f"{other.name!r} decodes as fast or faster and loses {other.loss_nats:g} nats, no more than these "
                f"{rung.loss_nats:g}"
            )
    return None


def names(mixes: Sequence[Allocation], parameters: Mapping[str, int]) -> list[str]:
    """What the rungs are called: the share of the weights that is at the lower level; each name once."""
    whole, found = sum(parameters[group] for group, _ in mixes[0].schemes), []
    for mix in mixes:
        low = sum(parameters[group] for group, level in mix.schemes if level == LOW)
        found.append("INT8" if not low else "INT4" if low == whole else f"{low / whole:.0%} INT4")
    lows = [sum(level == LOW for _, level in mix.schemes) for mix in mixes]
    return [
        name if found.count(name) == 1 else f"{name} ({low} group{'s' if low > 1 else ''})"
        for name, low in zip(found, lows, strict=True)
    ]
