"""The check of the prediction: which (group, scheme) pairs are measured directly, and how well the two agree."""

import random
from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

from lowprec.formats import scheme_named
from lowprec.results import CheckedPair, SensitivityResult

Pair = tuple[str, str]
FEWEST_TO_RANK = 3


def base_of(scheme: str) -> str:
    """The scheme without its group size: `w4a16-g64` and `w4a16-g128` are one when K decided which."""
    stem, _, size = scheme.rpartition("-g")
    return stem if size.isdigit() else scheme


def choose_pairs(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """About `count` of the (group, scheme) pairs, drawn evenly over the schemes, two of each at least."""
    by_scheme: dict[str, list[Pair]] = {}
    for group, scheme in pairs:
        by_scheme.setdefault(base_of(scheme), []).append((group, scheme))
    generator = random.Random(seed)
    each = max(2, count // max(len(by_scheme), 1))
    chosen: list[Pair] = []
    for _, found in sorted(by_scheme.items()):
        chosen += generator.sample(found, min(each, len(found)))
    return chosen


def agreement(pairs: Sequence[CheckedPair], predicted_kl_nats: float, measured_kl_nats: float) -> SensitivityResult:
    """Rank correlations over the pairs, overall and within each family and scheme, beside the final mix's two KLs."""
    families: dict[str, list[CheckedPair]] = {}
    schemes: dict[str, list[CheckedPair]] = {}
    for pair in pairs:
        families.setdefault(scheme_named(pair.scheme).family, []).append(pair)
        schemes.setdefault(base_of(pair.scheme), []).append(pair)
    return SensitivityResult(
        spearman=_spearman(pairs),
        spearman_within=tuple(
            (name, _spearman(found))
            for within in (families, schemes)
            for name, found in sorted(within.items())
            if len(found) >= FEWEST_TO_RANK
        ),
        predicted_kl_nats=predicted_kl_nats,
        measured_kl_nats=measured_kl_nats,
        pairs=tuple(pairs),
    )


def _spearman(pairs: Sequence[CheckedPair]) -> float:
    """Rank correlation of predicted and measured KL; 0 where there are too few pairs to rank."""
    if len(pairs) < FEWEST_TO_RANK:
        return 0.0
    value = spearmanr([p.predicted_kl_nats for p in pairs], [p.measured_kl_nats for p in pairs]).statistic
    return float(value) if np.isfinite(value) else 0.0
