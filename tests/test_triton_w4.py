"""The INT4 and nested kernels against float64: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

import interpreter  # noqa: F401, I001  switches the interpreter on before the first kernel is imported

import pytest
import torch
from interpreter import DEVICE, INTERPRETED
from torch import Tensor

from lowprec_kernels import reference
from lowprec_kernels.packing import pack_int4, unpack_int4
from lowprec_kernels.triton_common import counters
from lowprec_kernels.triton_nested import nested_gemm
from lowprec_kernels.triton_w4 import (
    FAMILIES,
    dequantize,
    family_of,
    group_sums,
    in_fragment_order,
    scale_layout,
    w4a8_fp8_gemm,
    w4a8_int8_gemm,
    w4a16_gemm,
)
from lowprec_kernels.tuning import MOST_CANDIDATES, Config, Problem

GROUPS = [32, 64, 128]
# One row and one column of weights, edges in every direction, more than one tile, K that ends in half a chunk.
SHAPES = [(1, 1, 128), (1, 48, 256), (5, 40, 384), (17, 70, 128), (70, 33, 256)]
BF16_ROUNDING = 2.0**-8
SMALL = {"block_n": 32, "block_k": 64, "warps": 2, "stages": 2}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _codes(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8).to(DEVICE)


def _scales(n: int, k: int, group: int) -> Tensor:
    values = torch.rand(n, k // group, generator=torch.Generator().manual_seed(2)) / 64 + 1 / 128
    return values.to(torch.bfloat16).to(torch.float32).to(DEVICE)


def _error(y: Tensor, truth: Tensor) -> float:
    return float((y.to(torch.float64) - truth).norm() / truth.norm().clamp_min(1e-30))


def _shapes(group: int) -> list[tuple[int, int, int]]:
    found = [(m, n, k) for m, n, k in SHAPES if k % group == 0]
    return [*found, (3, 16, 96)] if group == 32 else found


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_w4a16_against_float64(dtype: torch.dtype, zeros: bool, group: int) -> None:
    for m, n, k in _shapes(group):
        x, packed, scale = _random(m, k).to(dtype), pack_int4(_codes(n, k)), _scales(n, k, group)
        zero = _codes(n, k // group, seed=3) if zeros else None
        bias = _random(n, seed=4) if n != 48 else None
        truth = reference.w4a16_gemm(x.to(torch.float64), packed, scale, bias, group, zero)
        tolerance = BF16_ROUNDING if dtype == torch.bfloat16 else BF16_ROUNDING / 8
        y = w4a16_gemm(x, packed, scale, bias, group, zero)
        assert (y.dtype, y.shape) == (dtype, (m, n))
        assert _error(y, truth) <= tolerance
        for form in ("scaled", "dequantize"):
            y = w4a16_gemm(x, packed, scale, bias, group, zero, Config(block_m=64, form=form, **SMALL))
            assert _error(y, truth) <= 2 * tolerance


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_w4a8_against_float64(out_dtype: torch.dtype, group: int) -> None:
    for m, n, k in _shapes(group):
        x, packed, scale = _random(m, k), pack_int4(_codes(n, k)), _scales(n, k, group)
        bias = _random(n, seed=4) if n != 48 else None
        tolerance = BF16_ROUNDING if out_dtype == torch.bfloat16 else 1e-6
        codes, x_scale = reference.quantize_per_token_int8(x)
        truth = reference.w4a8_int8_gemm(codes, x_scale, packed, scale, bias, group, torch.float64)
        assert _error(w4a8_int8_gemm(codes, x_scale, packed, scale, bias, group, out_dtype), truth) <= tolerance
        if not INTERPRETED:
            # Matrix units add e4m3 products in about 14 bits.
            tolerance = max(tolerance, 2e-3)
        codes, x_scale = reference.quantize_per_token_fp8(x)
        truth = reference.w4a8_fp8_gemm(codes, x_scale, packed, scale, bias, group, torch.float64)
        assert _error(w4a8_fp8_gemm(codes, x_scale, packed, scale, bias, group, out_dtype), truth) <= tolerance


@pytest.mark.parametrize("group", GROUPS)
def test_w4a8_int8_sums_of_a_group_are_exact(group: int) -> None:
    k, n = 2 * group if group > 32 else 128, 33
    x = torch.randint(-127, 128, (5, k), generator=torch.Generator().manual_seed(5), dtype=torch.int8).to(DEVICE)
    codes = _codes(n, k)
    x[0], codes[0] = 127, -8
    x[:, group:] = 0
    ones = torch.ones(5, 1, device=DEVICE)
    y = w4a8_int8_gemm(x, ones, pack_int4(codes), torch.ones(n, k // group, device=DEVICE), None, group, torch.float32)
    assert torch.equal(y.to(torch.int64).cpu(), x.to(torch.int64).cpu() @ codes.to(torch.int64).cpu().t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows", [16, 64])
def test_each_column_meets_its_own_weights(rows: int, dtype: torch.dtype) -> None:
    k, n, group = 128, 16, 64
    codes, scale = _codes(n, k), _scales(n, k, group)
    x = torch.eye(k, device=DEVICE).to(dtype)
    ones = torch.ones(k, 1, device=DEVICE)
    config = Config(block_m=rows, **SMALL)
    packed = pack_int4(codes)
    if dtype == torch.bfloat16:
        y = w4a16_gemm(x, packed, scale, None, group, None, config)
    elif dtype == torch.int8:
        y = w4a8_int8_gemm(x, ones, packed, scale, None, group, torch.float32, config)
    else:
        y = w4a8_fp8_gemm(x, ones, packed, scale, None, group, torch.float32, config=config)
    truth = (codes.double() * scale.double().repeat_interleave(group, 1)).t()
    torch.testing.assert_close(y.double(), truth, rtol=BF16_ROUNDING, atol=1e-9)


@pytest.mark.parametrize("split", [2, 3, 7])
def test_splits_of_k_give_one_result_and_leave_the_counters_clean(split: int) -> None:
    m, n, k, group = 3, 70, 640, 64
    x, packed, scale = _random(m, k).to(torch.bfloat16), pack_int4(_codes(n, k)), _scales(n, k, group)
    config = Config(block_m=16, split_k=split, **SMALL)
    first, second = (w4a16_gemm(x, packed, scale, None, group, None, config) for _ in range(2))
    assert torch.equal(first, second)
    assert _error(first, reference.w4a16_gemm(x.double(), packed, scale, None, group)) <= BF16_ROUNDING
    assert int(counters(x.device).abs().max()) == 0


@pytest.mark.parametrize("group", GROUPS)
def test_scales_laid_out_for_speed_change_nothing(group: int) -> None:
    m, n, k = 5, 70, 384
    x, packed, scale, zero = _random(m, k), pack_int4(_codes(n, k)), _scales(n, k, group), _codes(n, k // group, 3)
    fast = scale_layout(scale)
    assert (fast.dtype, fast.stride(0)) == (torch.bfloat16, 1)
    half = x.to(torch.bfloat16)
    plain = w4a16_gemm(half, packed, scale, None, group, zero)
    assert torch.equal(w4a16_gemm(half, packed, fast, None, group, zero), plain)
    codes, x_scale = reference.quantize_per_token_fp8(x)
    first, second = (w4a8_fp8_gemm(codes, x_scale, packed, s, None, group, torch.float32) for s in (scale, fast))
    assert torch.equal(first, second)
    odd = scale * 1.001
    assert scale_layout(odd).dtype == torch.float32


def test_strided_inputs_and_no_rows() -> None:
    n, k, group = 24, 256, 64
    packed, scale = pack_int4(_codes(n, k)), _scales(n, k, group)
    wide = _random(6, 2 * k).to(torch.bfloat16)
    for x in (wide[:, ::2], wide[::2, :k], wide[:, :k].t().contiguous().t()):
        truth = reference.w4a16_gemm(x.double(), packed, scale, None, group)
        assert _error(w4a16_gemm(x, packed, scale, None, group), truth) <= BF16_ROUNDING
    apart = pack_int4(_codes(2 * n, k))[::2]
    truth = reference.w4a16_gemm(wide[:, :k].double(), apart, scale, None, group)
    assert _error(w4a16_gemm(wide[:, :k], apart, scale, None, group), truth) <= BF16_ROUNDING
    assert w4a16_gemm(wide[:0, :k], packed, scale, None, group).shape == (0, n)


@pytest.mark.parametrize("form", ["", "scaled", "dequantize"])
def test_zero_points_near_the_codes_lose_no_precision(form: str) -> None:
    """Weights are small differences of codes and zero points, x has a mean: what is taken off is large."""
    m, n, k, group = 5, 33, 256, 64
    packed, scale = pack_int4(torch.full((n, k), 7, dtype=torch.int8, device=DEVICE)), _scales(n, k, group)
    zero = torch.full((n, k // group), 6, dtype=torch.int8, device=DEVICE)
    x = (_random(m, k) + 3).to(torch.bfloat16)
    truth = reference.w4a16_gemm(x.double(), packed, scale, None, group, zero)
    y = w4a16_gemm(x, packed, scale, None, group, zero, Config(block_m=64, form=form, **SMALL))
    assert _error(y, truth) <= BF16_ROUNDING


def test_float16_keeps_weights_exact_however_small_the_scales() -> None:
    m, n, k, group = 300, 33, 256, 64
    x, packed, scale = _random(m, k).to(torch.float16), pack_int4(_codes(n, k)), _scales(n, k, group) * 2.0**-20
    truth = reference.w4a16_gemm(x.double(), packed, scale, None, group)
    wide = w4a16_gemm(x * 2.0**4, packed, scale, None, group)
    assert _error(wide, truth * 2.0**4) <= 0.02


def test_empty_matrices() -> None:
    x, scale = _random(2, 0).to(torch.bfloat16), torch.ones(16, 0, device=DEVICE)
    empty = torch.zeros(16, 0, dtype=torch.int32, device=DEVICE)
    bias = _random(16)
    assert torch.equal(w4a16_gemm(x, empty, scale, bias, 32), bias.to(torch.bfloat16).expand(2, 16))
    assert not w4a16_gemm(x, empty, scale, None, 32).any()
    half = _random(2, 64).to(torch.bfloat16)
    assert w4a16_gemm(half, empty[:0].new_empty(0, 8), scale.new_ones(0, 2), None, 32).shape == (2, 0)


def test_a_row_that_is_not_finite_touches_no_other() -> None:
    n, k, group = 24, 128, 64
    packed, scale = pack_int4(_codes(n, k)), _scales(n, k, group)
    x = _random(4, k).to(torch.bfloat16)
    x[1, 7], x[2, 9] = float("nan"), float("inf")
    y = w4a16_gemm(x, packed, scale, None, group)
    assert bool(y[1].isnan().all())
    assert not bool(y[2].isfinite().all())
    assert bool(y[[0, 3]].isfinite().all())
    codes, x_scale = reference.quantize_per_token_fp8(x.float())
    y = w4a8_fp8_gemm(codes, x_scale, packed, scale, None, group, torch.float32)
    assert bool(y[[1, 2]].isnan().all())
    assert bool(y[[0, 3]].isfinite().all())


def test_groups_of_zeros_give_zeros() -> None:
    n, k, group = 16, 128, 64
    packed, scale = pack_int4(torch.zeros(n, k, dtype=torch.int8, device=DEVICE)), _scales(n, k, group)
    x = _random(3, k)
    assert bool((w4a16_gemm(x.to(torch.bfloat16), packed, scale, None, group) == 0).all())
    codes, x_scale = reference.quantize_per_token_fp8(x)
    y = w4a8_fp8_gemm(codes, x_scale, packed, scale, None, group, torch.float32)
    assert float(y.abs().max()) <= 1e-6 * float(x.abs().sum())


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_levels_of_nested_weights(group: int, zeros: bool) -> None:
    for m, n, k in ((3, 40, 256), (70, 33, 384)):
        x, base, rest, scale = _random(m, k).to(torch.bfloat16), _codes(n, k), _codes(n, k, 7), _scales(n, k, group)
        zero = _codes(n, k // group, seed=3) if zeros else None
        ratio = 4 + 2 * (_codes(n, k // group, seed=5) & 3)
        operands = (x, pack_int4(base), pack_int4(rest), scale, ratio, zero, None, group)
        fine = reference.nested_gemm(x.double(), *operands[1:], 8)
        for form in ("", "scaled"):
            config = Config(block_m=64, form=form, **SMALL)
            assert _error(nested_gemm(*operands, 8, config=config), fine) <= BF16_ROUNDING
        assert _error(nested_gemm(*operands, 8), fine) <= BF16_ROUNDING
        plain = w4a16_gemm(x, pack_int4(base), scale, None, group, zero, Config(block_m=64, **SMALL))
        assert torch.equal(nested_gemm(*operands, 4, config=Config(block_m=64, **SMALL)), plain)


def test_helpers_against_plain_torch() -> None:
    codes, scale, zero = _codes(19, 192), _scales(19, 192, 32), _codes(19, 6, seed=3)
    packed = pack_int4(codes)
    wanted = (codes.double().view(19, 6, 32) - zero.double()[..., None]) * scale.double()[..., None]
    dense = dequantize(packed, scale, 32, zero, torch.float32)
    torch.testing.assert_close(dense.double(), wanted.view(19, 192), rtol=1e-6, atol=0)
    assert torch.equal(unpack_int4(packed, 192), codes)
    x = torch.randint(-127, 128, (21, 192), generator=torch.Generator().manual_seed(5), dtype=torch.int8).to(DEVICE)
    assert torch.equal(group_sums(x, 64), x.float().view(21, 3, 64).sum(-1))
    columns = torch.arange(96, device=DEVICE)[None]
    order = in_fragment_order(columns)
    assert order.shape == (1, 128)
    assert sorted(order[0].tolist()) == sorted([*range(96), *[0] * 32])
    # Eight columns of a plane belong to one lane: its four words' pairs lie eight places apart.
    assert order[0, :16].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27]


def test_what_cannot_run_is_refused() -> None:
    x, packed = _random(2, 96).to(torch.bfloat16), pack_int4(_codes(16, 96))
    with pytest.raises(ValueError, match="not 48"):
        w4a16_gemm(x, packed, torch.ones(16, 2, device=DEVICE), None, 48)
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        w4a16_gemm(x.float(), packed, torch.ones(16, 3, device=DEVICE), None, 32)
    with pytest.raises(ValueError, match="K = 64"):
        w4a16_gemm(x[:, :64], packed, torch.ones(16, 3, device=DEVICE), None, 32)
    ones = torch.ones(16, 3, device=DEVICE)
    operands = (x, packed, packed, ones, ones.to(torch.int8), None, None, 32)
    with pytest.raises(ValueError, match="not 5"):
        nested_gemm(*operands, 5)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_problem_has_candidates(family: object) -> None:
    group = int(family.name.rpartition("-g")[2])
    for m in (1, 8, 16, 32, 64, 256, 4096):
        for n, k in ((128, group), (4096, 4096), (73728, 12288)):
            found = family.fitting(Problem(m=m, n=n, k=k))
            assert 1 <= len(found) <= MOST_CANDIDATES
    assert family_of(torch.bfloat16, 256) is family_of(torch.bfloat16, 128)
