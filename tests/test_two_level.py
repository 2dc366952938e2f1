"""Scales of two levels: the same INT4 weights are INT8 with one scale for a row, to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.errors import UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.base import as_bfloat16
from lowprec.formats.two_level import LARGEST, in_rows, multipliers
from lowprec.solvers import SOLVERS, LayerStatistics

FORMAT = WEIGHT_FORMATS["int4-two-level-g64"]
K = 256


def weights(seed: int, spread: float) -> torch.Tensor:
    """[24, K] with groups of unlike size, a row of zeros and a group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(24, K, generator=generator)
    w = w * torch.exp(spread * torch.randn(24, K // 64, generator=generator)).repeat_interleave(64, 1)
    w[3], w[5, :64] = 0.0, 0.0
    return w


@pytest.mark.parametrize("solver", ["rtn", "gptq-quick", "gptq"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.0, 0.3, 2.0]))
def test_int4_is_int8_by_rows_whatever_solves_it(solver: str, seed: int, spread: float) -> None:
    w, x = weights(seed, spread), torch.randn(512, K, generator=torch.Generator().manual_seed(seed))
    found = SOLVERS[solver].solve(w, FORMAT, LayerStatistics(hessian=x.T @ x / 512, tokens=512))
    assert FORMAT.refuses(found) is None
    assert torch.equal(as_bfloat16(found.scale), found.scale), "a checkpoint stores bfloat16"
    rows = in_rows(found)
    assert (rows.format, tuple(rows.scale.shape)) == ("int8", (24, 1))
    assert WEIGHT_FORMATS["int8"].refuses(rows) is None
    assert torch.equal(rows.dequantize(), found.dequantize())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    scales=st.lists(st.floats(2.0**-20, 2.0**10, allow_subnormal=False), min_size=4, max_size=4),
)
def test_scales_stay_near_and_stay_themselves(scales: list[float]) -> None:
    wanted = torch.tensor([scales])
    found = FORMAT.store_scales(wanted)
    assert torch.equal(FORMAT.store_scales(found), found)
    top = wanted.amax()
    # The coarsest step that a row may have is an eighth of its largest scale, rounded to four bits. Scales are off by
    # half of it, those near zero by a whole one: no multiplier is 0.
    assert float((found - wanted).abs().max()) <= float(top) / 8 * 17 / 16
    large = wanted >= top / 8
    assert float((found - wanted)[large].abs().max()) <= float(top) / 8 * 17 / 32
    whole = multipliers(found)
    assert bool(((whole >= 1) & (whole <= LARGEST)).all())


def test_it_costs_little_of_the_error_of_ordinary_groups() -> None:
    w, x = torch.randn(64, K), torch.randn(512, K)
    statistics = LayerStatistics(hessian=x.T @ x / 512, tokens=512)

    def error(fmt: str) -> float:
        return float((SOLVERS["gptq"].solve(w, WEIGHT_FORMATS[fmt], statistics).dequantize() - w).square().mean())

    assert error("int4-two-level-g64") < 1.06 * error("int4-g64")


def test_ordinary_scales_are_refused() -> None:
    w = weights(0, 0.3)
    plain = SOLVERS["rtn"].solve(w, WEIGHT_FORMATS["int4-g64"], None)
    assert "no multiples" in str(FORMAT.refuses(plain))
    with pytest.raises(UnsupportedError, match="not INT8 by rows"):
        in_rows(plain)
    wide = QuantizedWeight(format=FORMAT.name, codes=torch.full((1, 64), 9, dtype=torch.int8), scale=torch.ones(1, 1))
    assert "outside" in str(FORMAT.refuses(wide))
