"""Which pairs are measured directly, and what is said of them."""

from collections import Counter

import pytest

from lowprec.results import CheckedPair
from lowprec.steps.check import agreement, base_of, choose_pairs

SCHEMES = ("w4a16-g64", "w4a8-int8-g64", "w8a16", "w8a8-fp8")


def pair(scheme: str, predicted: float, measured: float) -> CheckedPair:
    return CheckedPair(group="g", scheme=scheme, predicted_kl_nats=predicted, measured_kl_nats=measured)


def test_pairs_are_drawn_evenly_over_schemes_whatever_group_size_k_allows() -> None:
    pairs = [(f"g{i}", scheme) for i in range(10) for scheme in SCHEMES] + [("down", "w4a16-g128")]
    chosen = choose_pairs(pairs, 12, seed=0)
    assert Counter(base_of(scheme) for _, scheme in chosen) == dict.fromkeys(map(base_of, SCHEMES), 3)
    assert chosen == choose_pairs(pairs, 12, seed=0)
    assert chosen != choose_pairs(pairs, 12, seed=1)
    assert len(set(chosen)) == len(chosen)


def test_ranks_are_reported_overall_and_within_families_and_schemes() -> None:
    pairs = [pair("w4a16-g64", 3.0, 3.1), pair("w4a16-g128", 2.0, 2.5), pair("w4a8-int8-g64", 1.0, 2.7)]
    pairs += [pair("w8a16", 0.1 * i, 0.2 * i) for i in range(1, 4)]
    found = agreement(pairs, 0.5, 0.6)
    within = dict(found.spearman_within)
    assert within == {"int4": pytest.approx(0.5), "int8": pytest.approx(1.0), "w8a16": pytest.approx(1.0)}
    assert found.spearman == pytest.approx(1 - 6 * 2 / (6 * 35))
    assert (found.predicted_kl_nats, found.measured_kl_nats) == (0.5, 0.6)


def test_too_few_pairs_are_not_ranked() -> None:
    found = agreement([pair("w8a16", 1.0, 1.0), pair("w8a16", 2.0, 2.0)], 0.0, 0.0)
    assert found.spearman == 0.0
    assert found.spearman_within == ()
