"""The verdict on held-out data: within the budget, over it, or not to be told.

Every metric here is a monotone function g of one ratio R = sum d_i / sum n_i over independent units i of text: for
perplexity d = loss - reference loss in nats, n = tokens, g(R) = exp(R) - 1. Units are what is resampled (windows of one
document resemble each other), and reference and quantised model are resampled together (paired).

Bounds. R -+ q se, with the larger of two standard errors and the farther of two quantiles:
  - se of the linearised ratio, sqrt(U/(U-1) sum e_i^2) / N, e_i = d_i - R n_i, N = sum n_i (Cochran, Sampling
    Techniques, 1977, section 6.3), which holds however losses and sizes of units hang together; and Kish's (Survey
    Sampling, 1965), sqrt(V / (U* - 1)) with V = sum n_i (d_i/n_i - R)^2 / N and U* = N^2 / sum n_i^2 effective units,
    which does not hang on the few largest units alone;
  - q of the bootstrap-t (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5): each resample of
    units gives t* = (R* - R)/se*, which sees skewed losses; and q of Student's t with U* - 1 degrees of freedom, alone
    where there are fewer than `FEW_UNITS` units, as resampling a handful says nothing.
So a bound is wrong less often than asked for on even units, and about as often on heavy-tailed ones. Percentile, BCa,
Hall's transformation and the bootstrap-t alone were tried in simulation: with lognormal sizes and skewed losses their
upper bounds failed up to five times as often as they should, as a sample that misses the bad units has too small a mean
and too small an error. The simulation that this module is held to is in its tests.

Proportions (every value 0 or 1 in a unit of its own, as questions are) get the adjusted Wald interval of Bonett and
Price (Journal of Educational and Behavioral Statistics 37, 2012): one discordant pair is added in each direction, so
that no difference in few questions does not pass for certainty.

Looks. At most `planned_looks` looks, each at confidence 1 - (1 - confidence)/planned_looks. A later look happens only
if the earlier ones were inconclusive, is taken on units that none had seen, and judges all units so far together. A
false `within` needs a bound that fails at one of the looks, so by the union bound its probability is at most the sum
over the looks, 1 - confidence; that needs no independence, which is why the pooled data may be judged. The same
artefact must be scored at every look.

Rows per source have the same confidence each, not together. Left out: resampling within sources (it would narrow the
bounds where sources differ much), absolute budgets on perplexity.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lowprec.errors import ConfigError
from lowprec.records import Budget, Verdict
from lowprec.results import LossResult, SourceLoss
from lowprec.steps.scores import (
    PairedScores,
    PairedValues,
    change,
    concatenate,
    concatenate_values,
    mean_kl,
    perplexities,
    top1_agreement,
)

Floats = NDArray[np.float64]
Looked = PairedScores | PairedValues

MINIMUM_UNITS = 30
MINIMUM_TOKENS = 40_000
RESAMPLES = 4_000
# Counts held at a time, so that ten thousand questions do not take ten thousand columns of four thousand rows.
BLOCK_COUNTS = 1_000_000
FEW_UNITS = 8
# exp of a mean loss beyond this is no number that a report could show; nothing is known of the loss then.
LARGEST_NATS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """A ratio of sums and its one-sided bounds, each at the confidence asked for."""

    estimate: float
    lower: float
    upper: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verdict, its numbers and a sentence; `look_again` says that another look at unseen units is allowed."""

    verdict: Verdict
    reason: str
    loss: LossResult
    look_again: bool


@dataclass(frozen=True, slots=True)
class _Ratio:
    """A metric as a ratio of sums, one entry per window or example.

    `shown` is the function from the ratio to the metric; `proportion` the kind of change of right-or-wrong answers.
    """

    numerator: Floats
    denominator: Floats
    unit: NDArray[np.int64]
    shown: Literal["exp", "same"]
    proportion: Literal["relative", "absolute"] | None = None


def ratio_bounds(
    numerator: Floats, denominator: Floats, confidence: float, *, resamples: int = RESAMPLES, seed: int = 0
) -> Bounds:
    """Bounds of sum numerator / sum denominator over independent units.

    Args:
        numerator, denominator: [U], one entry per unit.
        confidence: of each bound by itself; 0.975 leaves 2.5 % above the upper one.
    """
    units, total = len(numerator), float(denominator.sum())
    ratio = float(numerator.sum()) / total
    if units < 2:
        return Bounds(estimate=ratio, lower=-LARGEST_NATS, upper=LARGEST_NATS)
    residual = numerator - ratio * denominator
    error, effective = _standard_error(residual, denominator)
    if error == 0.0:
        return Bounds(estimate=ratio, lower=ratio, upper=ratio)
    reach = float(stats.t.ppf(confidence, max(effective - 1.0, 1e-3)))
    below = above = reach
    if units >= FEW_UNITS:
        t = _studentised(residual, denominator, resamples, seed)
        low, high = np.quantile(t, [1.0 - confidence, confidence], method="closest_observation")
        below, above = max(reach, float(high)), max(reach, -float(low))
    return Bounds(
        estimate=ratio,
        lower=max(ratio - below * error, -LARGEST_NATS),
        upper=min(ratio + above * error, LARGEST_NATS),
    )


def _standard_error(residual: Floats, denominator: Floats) -> tuple[float, float]:
    """The larger of the two standard errors, and the effective number of units (all, where a denominator is zero)."""
    units, total = len(residual), float(denominator.sum())
    linearised = float(np.sqrt(units / (units - 1) * (residual**2).sum())) / total
    if denominator.min() <= 0:
        return linearised, float(units)
    effective = total**2 / float((denominator**2).sum())
    variance = float((residual**2 / denominator).sum()) / total
    return max(linearised, float(np.sqrt(variance / max(effective - 1.0, 1e-3)))), effective


def _studentised(residual: Floats, denominator: Floats, resamples: int, seed: int) -> Floats:
    """t* = (R* - R)/se* of each resample of units; residual is d - R n."""
    units = len(residual)
    columns = np.stack([residual, denominator, residual**2, residual * denominator, denominator**2], axis=1)
    rows = max(1, min(resamples, BLOCK_COUNTS // units))
    sums: Floats = np.concatenate(
        [_counts(units, min(rows, resamples - start), (seed, start)) @ columns for start in range(0, resamples, rows)]
    )
    e, n, ee, en, nn = sums.T
    # R* - R is the resample's mean residual; the squares are of d - R* n = e - (R* - R) n.
    shift = e / n
    variance = units / (units - 1) * np.maximum(ee - 2.0 * shift * en + shift**2 * nn, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        t: Floats = np.nan_to_num(e / np.sqrt(variance), nan=0.0, posinf=np.inf, neginf=-np.inf)
    return t


@functools.lru_cache(maxsize=8)
def _counts(units: int, resamples: int, seed: tuple[int, ...]) -> Floats:
    """[resamples, units]: how often each resample has drawn each unit."""
    generator = np.random.default_rng(seed)
    counts: Floats = generator.multinomial(units, np.full(units, 1.0 / units), size=resamples).astype(np.float64)
    return counts


def proportion_bounds(reference: Floats, difference: Floats, confidence: float, relative: bool) -> Bounds:
    """Bounds of sum difference / sum reference (or / number of questions) for answers that are right (1) or wrong (0).

    Args:
        reference: [Q], 1 where the reference is right; difference: [Q], reference minus candidate, in {-1, 0, 1}.
    """
    base = reference if relative else np.ones_like(reference)
    ratio = float(difference.sum() / base.sum())
    # One pair that only the reference answers and one that only the candidate answers.
    difference = np.append(difference, [1.0, -1.0])
    base = np.append(base, [1.0, 0.0] if relative else [1.0, 1.0])
    centre = float(difference.sum() / base.sum())
    error = float(np.sqrt(((difference - centre * base) ** 2).sum()) / base.sum())
    reach = float(stats.norm.ppf(confidence)) * error
    return Bounds(estimate=ratio, lower=min(centre - reach, ratio), upper=max(centre + reach, ratio))


def judge(
    looks: Sequence[Looked],
    budget: Budget,
    source_names: Sequence[str],
    *,
    planned_looks: int = 2,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Judgement:
    """The verdict after the looks so far.

    Args:
        looks: scores of each look, in order, of one artefact on disjoint units; call with the first, and with both
            only if `look_again`. A verdict that an earlier look reached stands.
        budget: its metric is "perplexity", "kl" or "top1" for scores, anything for values.
        planned_looks: how many looks were planned before the first one; the error is divided among them.

    Raises:
        ConfigError: the budget does not fit the metric.
        ValueError: more looks than planned, or looks that share units.
    """
    if not 1 <= len(looks) <= planned_looks:
        raise ValueError(f"{len(looks)} looks, {planned_looks} planned")
    if len(set().union(*[set(look.unit.tolist()) for look in looks])) < sum(len(np.unique(x.unit)) for x in looks):
        raise ValueError("looks share units; a second look must be taken at unseen ones")
    confidence = confidence_of(budget, planned_looks)
    for taken in range(1, len(looks) + 1):
        pooled = _pool(looks[:taken])
        loss = _loss_result(pooled, budget, source_names, confidence, taken, resamples, seed)
        short = _too_small(pooled, loss)
        verdict = "inconclusive" if short else _decide(loss, budget)
        if verdict != "inconclusive":
            break
    reason = _reason(verdict, loss, budget, short)
    return Judgement(
        verdict=verdict,
        reason=reason,
        loss=loss,
        look_again=verdict == "inconclusive" and len(looks) < planned_looks,
    )


def confidence_of(budget: Budget, looks: int) -> float:
    """Of the bounds at each of so many planned looks."""
    return 1.0 - (1.0 - budget.confidence) / looks


def _pool(looks: Sequence[Looked]) -> Looked:
    scores = [look for look in looks if isinstance(look, PairedScores)]
    values = [look for look in looks if isinstance(look, PairedValues)]
    if scores and values:
        raise ValueError("looks of different metrics")
    return concatenate(scores) if scores else concatenate_values(values)


def require_kind(budget: Budget) -> None:
    """Raises ConfigError when a metric of token scores has no loss of the budget's kind."""
    if budget.metric == "perplexity" and budget.kind == "absolute":
        raise ConfigError(
            f"budget {budget.limit:g} abs: perplexity is judged by its relative increase; give a relative budget, "
            "for example 5%, or another metric"
        )
    if budget.metric in ("kl", "top1") and budget.kind == "relative":
        raise ConfigError(
            f"budget {100 * budget.limit:g}% relative: {budget.metric} compares two models, so it has no value for the "
            "reference alone; give an absolute budget, for example '0.05 abs'"
        )


def _ratio(looked: Looked, budget: Budget) -> _Ratio:
    """The budget's metric as a ratio of sums over windows or examples."""
    if isinstance(looked, PairedValues):
        worse, base = change(looked, budget.kind)
        return _Ratio(worse, base, looked.unit, "same", budget.kind if _is_binary(looked) else None)
    tokens = looked.tokens.astype(np.float64)
    require_kind(budget)
    if budget.metric == "perplexity":
        return _Ratio(looked.loss - looked.loss_reference, tokens, looked.unit, "exp")
    if budget.metric not in ("kl", "top1"):
        raise ConfigError(f"metric {budget.metric!r} cannot be read off token scores; known: perplexity, kl, top1")
    return _Ratio(looked.kl if budget.metric == "kl" else tokens - looked.top1, tokens, looked.unit, "same")


def _is_binary(values: PairedValues) -> bool:
    """Right or wrong answers of equal weight, each a unit of its own."""
    answers = np.concatenate([values.reference, values.candidate])
    alone = len(np.unique(values.unit)) == len(values)
    return (
        alone and values.better == "higher" and bool(np.isin(answers, [0.0, 1.0]).all() and (values.weight == 1).all())
    )


def _bounds(ratio: _Ratio, mask: NDArray[np.bool_], confidence: float, resamples: int, seed: int) -> Bounds:
    """Bounds of the metric itself over the entries of `mask`."""
    numerator, denominator = ratio.numerator[mask], ratio.denominator[mask]
    if ratio.proportion is not None:
        return proportion_bounds(denominator, numerator, confidence, ratio.proportion == "relative")
    _, place = np.unique(ratio.unit[mask], return_inverse=True)
    d, n = (np.bincount(place, column).astype(np.float64) for column in (numerator, denominator))
    found = ratio_bounds(d, n, confidence, resamples=resamples, seed=seed)
    if ratio.shown == "same":
        return found
    return Bounds(
        estimate=float(np.expm1(found.estimate)), lower=float(np.expm1(found.lower)), upper=float(np.expm1(found.upper))
    )


def _weights(looked: Looked) -> Floats:
    return looked.tokens.astype(np.float64) if isinstance(looked, PairedScores) else looked.weight


def _loss_result(
    looked: Looked,
    budget: Budget,
    source_names: Sequence[str],
    confidence: float,
    looks: int,
    resamples: int,
    seed: int,
) -> LossResult:
    ratio = _ratio(looked, budget)
    whole = _bounds(ratio, np.ones(len(looked), bool), confidence, resamples, seed)
    weights = _weights(looked)
    kl = looked.kl if isinstance(looked, PairedScores) else None
    rows = []
    for source in np.unique(looked.source):
        mask = looked.source == source
        if ratio.denominator[mask].sum() <= 0:
            continue  # no question of this source was answered by the reference: no relative change exists
        own = _bounds(ratio, mask, confidence, resamples, seed)
        units = len(np.unique(looked.unit[mask]))
        rows.append(
            SourceLoss(
                source=source_names[source],
                relative=own.estimate,
                lower=own.lower if units > 1 else None,
                upper=own.upper if units > 1 else None,
                kl_nats=float(kl[mask].sum() / weights[mask].sum()) if kl is not None else None,
                units=units,
                tokens=round(weights[mask].sum()),
            )
        )
    scores = looked if isinstance(looked, PairedScores) else None
    before, after = perplexities(scores) if scores else (None, None)
    return LossResult(
        metric=budget.metric,
        budget=budget.limit,
        relative=whole.estimate,
        lower=whole.lower,
        upper=whole.upper,
        confidence=confidence,
        looks=looks,
        units=len(np.unique(looked.unit)),
        tokens=round(weights.sum()),
        kl_nats=mean_kl(scores) if scores else None,
        top1_agreement=top1_agreement(scores) if scores else None,
        perplexity_before=before,
        perplexity_after=after,
        per_source=tuple(rows),
    )


def _too_small(looked: Looked, loss: LossResult) -> str:
    """Why the data cannot carry a verdict, or an empty text. Examples are counted in units alone."""
    if loss.units < MINIMUM_UNITS:
        return f"{loss.units} independent units are fewer than the {MINIMUM_UNITS} that a verdict needs"
    if isinstance(looked, PairedScores) and loss.tokens < MINIMUM_TOKENS:
        return f"{loss.tokens} held-out tokens are fewer than the {MINIMUM_TOKENS} that a verdict needs"
    return ""


def _decide(loss: LossResult, budget: Budget) -> Verdict:
    if loss.upper <= budget.limit:
        return "within"
    return "over" if loss.lower > budget.limit else "inconclusive"


def _reason(verdict: Verdict, loss: LossResult, budget: Budget, short: str) -> str:
    def shown(value: float) -> str:
        return f"{value:+.2%}" if budget.kind == "relative" else f"{value:+.4g}"

    bounds = f"bounds {shown(loss.lower)} and {shown(loss.upper)}, each at {loss.confidence:.1%} confidence"
    seen = f"{loss.units} independent units in {loss.looks} look{'s' if loss.looks > 1 else ''}"
    limit = shown(budget.limit).lstrip("+")
    if short:
        return f"{short}: give more text with --data (loss of {loss.metric} {shown(loss.relative)}; {bounds})"
    if verdict == "within":
        return (
            f"the upper bound of the loss of {loss.metric}, {shown(loss.upper)}, is at most {limit} ({seen}; {bounds})"
        )
    if verdict == "over":
        return f"the lower bound of the loss of {loss.metric}, {shown(loss.lower)}, is above {limit} ({seen}; {bounds})"
    return f"the budget of {limit} lies between the bounds of the loss of {loss.metric} ({seen}; {bounds})"
