"""Grouped matmuls of mixtures of experts against a loop over the experts in float64, and the routing they need."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from interpreter import DEVICE, INTERPRETED
from lowprec_kernels import reference_moe
from lowprec_kernels.packing import pack_int4
from lowprec_kernels.triton_moe import (
    FAMILIES,
    FP8_BLOCK,
    SCALE_BLOCK,
    moe_problem,
    moe_w4a16_gemm,
    moe_w8a8_fp8_block_gemm,
    moe_w8a8_fp8_gemm,
    moe_w8a8_int8_gemm,
    most_tiles,
    sort_by_expert,
)
from lowprec_kernels.tuning import Config, Family

# Rows of each expert: empty ones, more rows than a tile has, all rows in one expert, no row at all.
ROUTINGS = {"mixed": (3, 0, 37, 1, 0), "one expert": (0, 0, 21), "single": (5,), "none": (0, 0)}
SHAPES = [(48, 128), (33, 100), (1, 64), (130, 300)]
TINY = Config(block_m=16, block_n=64, block_k=64, group_m=1, form="swap")
# The matrix unit of sm_90 keeps about 14 bits of a sum of e4m3 products.
EIGHT_BIT = {"int8": 1e-6, "fp8": 1e-6 if INTERPRETED else 2e-3, "fp8 block": 1e-6 if INTERPRETED else 2e-3}
TILES = {
    "swap": TINY,
    "plain": dataclasses.replace(TINY, form="", group_m=2),
    "tall": dataclasses.replace(TINY, block_m=32, block_n=32, group_m=8),
}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed)).to(DEVICE)


def _positive(*shape: int, seed: int = 0) -> Tensor:
    return (torch.rand(*shape, generator=_generator(seed)) / 64 + 1 / 128).to(DEVICE)


def _int8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, generator=_generator(seed), dtype=torch.int8).to(DEVICE)


def _fp8(*shape: int, seed: int = 0) -> Tensor:
    return (_random(*shape, seed=seed) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def _int4(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-8, 8, shape, generator=_generator(seed), dtype=torch.int8).to(DEVICE)


def _routing(counts: tuple[int, ...], gather: bool) -> tuple[int, Tensor, Tensor | None, Tensor | None]:
    """Rows of experts -> rows of x, offsets, rows, row_weight; without `gather` x is sorted and nothing is weighed."""
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32).to(DEVICE)
    total = sum(counts)
    if not gather:
        return total, offsets, None, None
    rows = torch.randint(0, 7, (total,), generator=_generator(3), dtype=torch.int32).to(DEVICE)
    return 7, offsets, rows, _random(total, seed=4)


def _w8a8_operands(kind: str, x_rows: int, experts: int, n: int, k: int) -> tuple[Tensor, ...]:
    codes = _int8 if kind == "int8" else _fp8
    blocks = (-(-n // SCALE_BLOCK), -(-k // SCALE_BLOCK)) if kind == "fp8 block" else (n, 1)
    return (
        codes(x_rows, k, seed=1),
        _positive(x_rows, blocks[1], seed=5),
        codes(experts, n, k, seed=2),
        _positive(experts, *blocks, seed=6),
    )


W8A8: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "int8": (moe_w8a8_int8_gemm, reference_moe.moe_w8a8_int8_gemm),
    "fp8": (moe_w8a8_fp8_gemm, reference_moe.moe_w8a8_fp8_gemm),
    "fp8 block": (moe_w8a8_fp8_block_gemm, reference_moe.moe_w8a8_fp8_block_gemm),
}


def _close(y: Tensor, truth: Tensor, tolerance: float) -> None:
    assert (y.shape, y.dtype) == (truth.shape, truth.dtype)
    y, truth = y.to(torch.float64), truth.to(torch.float64)
    assert bool(((y - truth).norm(dim=-1) <= tolerance * truth.norm(dim=-1) + 1e-30).all())


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("counts", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("kind", W8A8)
def test_w8a8_over_routings(kind: str, counts: tuple[int, ...], gather: bool, tile: str) -> None:
    x_rows, offsets, rows, weight = _routing(counts, gather)
    operands = _w8a8_operands(kind, x_rows, len(counts), 40, 192)
    op, reference = W8A8[kind]
    y = op(*operands, offsets, rows, weight, torch.float32, TILES[tile])
    _close(y, reference(*operands, offsets, rows, weight, torch.float32), EIGHT_BIT[kind])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("kind", W8A8)
def test_w8a8_over_shapes(kind: str, n: int, k: int, tile: str) -> None:
    x_rows, offsets, rows, weight = _routing((3, 0, 18), True)
    operands = _w8a8_operands(kind, x_rows, 3, n, k)
    op, reference = W8A8[kind]
    y = op(*operands, offsets, rows, weight, torch.bfloat16, TILES[tile])
    _close(y, reference(*operands, offsets, rows, weight, torch.bfloat16), 2**-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("counts", ROUTINGS.values(), ids=ROUTINGS)
def test_w4a16_over_routings(counts: tuple[int, ...], gather: bool, dtype: torch.dtype) -> None:
    x_rows, offsets, rows, weight = _routing(counts, gather)
    x = _random(x_rows, 192, seed=1).to(dtype)
    w, scale = pack_int4(_int4(len(counts), 40, 192, seed=2)), _positive(len(counts), 40, 3, seed=6)
    y = moe_w4a16_gemm(x, w, scale, offsets, rows, weight, 64, TINY)
    _close(y, reference_moe.moe_w4a16_gemm(x, w, scale, offsets, rows, weight, 64), 2**-8)


@pytest.mark.parametrize("form", ["", "permuted"])
@pytest.mark.parametrize(
    ("group", "block_k", "n", "k"),
    [
        (32, 64, 48, 96),
        (96, 64, 33, 288),
        (64, 64, 130, 128),
        (128, 128, 40, 384),
        (256, 128, 1, 256),
        (160, 64, 8, 160),
    ],
)
def test_w4a16_over_groups(group: int, block_k: int, n: int, k: int, form: str) -> None:
    x_rows, offsets, rows, weight = _routing((3, 0, 18), True)
    x = _random(x_rows, k, seed=1).to(torch.float16)
    w, scale = pack_int4(_int4(3, n, k, seed=2)), _positive(3, n, k // group, seed=6)
    config = dataclasses.replace(TINY, block_k=block_k, form=form)
    y = moe_w4a16_gemm(x, w, scale, offsets, rows, weight, group, config)
    _close(y, reference_moe.moe_w4a16_gemm(x, w, scale, offsets, rows, weight, group), 2**-10)


def test_int8_sums_are_exact() -> None:
    _, offsets, _, _ = _routing((2, 3), False)
    x, w = _int8(5, 1000, seed=1), _int8(2, 8, 1000, seed=2)
    x[:1], w[:, :1] = 127, -127
    y = moe_w8a8_int8_gemm(
        x, x.new_ones(5, 1).float(), w, w.new_ones(2, 8, 1).float(), offsets, None, None, torch.float32
    )
    # CUDA multiplies no matrices of integers.
    x, w = x.long().cpu(), w.long().cpu()
    assert torch.equal(y.long().cpu(), torch.cat((x[:2] @ w[0].t(), x[2:] @ w[1].t())))


@pytest.mark.parametrize("form", ["swap", ""])
def test_every_code_of_w_goes_to_its_place(form: str) -> None:
    """One-hot rows of x read one column of w each: the columns, rows and experts of an answer are the weight's own."""
    k, n, counts = 128, 24, (128, 128)
    _, offsets, _, _ = _routing(counts, False)
    hot = torch.eye(k, device=DEVICE).repeat(2, 1)
    config = dataclasses.replace(TINY, form=form)
    codes = _int4(2, n, k, seed=2)
    expected = torch.cat([w.t() for w in codes]).float()
    ones = torch.ones(2 * k, 1, device=DEVICE)
    y = moe_w8a8_int8_gemm(
        hot.to(torch.int8), ones, codes, ones[:n].expand(2, n, 1), offsets, None, None, torch.float32, config
    )
    assert torch.equal(y, expected)
    eights = hot.to(torch.float8_e4m3fn)
    w = codes.float().to(torch.float8_e4m3fn)
    y = moe_w8a8_fp8_gemm(eights, ones, w, ones[:n].expand(2, n, 1), offsets, None, None, torch.float32, config)
    assert torch.equal(y, expected)
    y = moe_w8a8_fp8_block_gemm(eights, ones, w, ones[:2].reshape(2, 1, 1), offsets, None, None, torch.float32, config)
    assert torch.equal(y, expected)
    y = moe_w4a16_gemm(hot.half(), pack_int4(codes), ones[: 2 * n].reshape(2, n, 1), offsets, None, None, k, TINY)
    assert torch.equal(y.float(), expected)


@pytest.mark.parametrize("kind", W8A8)
def test_scales_that_are_nan_reach_their_own_rows_and_no_other(kind: str) -> None:
    x_rows, offsets, _, _ = _routing((3, 0, 4), False)
    x, x_scale, w, w_scale = _w8a8_operands(kind, x_rows, 3, 24, 192)
    x_scale[2] = torch.nan
    y = W8A8[kind][0](x, x_scale, w, w_scale, offsets, None, None, torch.float32, TINY)
    assert y.isnan().all(1).tolist() == [row == 2 for row in range(7)]
    assert bool(y[[0, 1, 3, 4, 5, 6]].isfinite().all())


def test_rows_of_x_that_are_not_finite_stay_alone() -> None:
    x_rows, offsets, _, _ = _routing((3, 0, 4), False)
    x = _random(x_rows, 128).to(torch.bfloat16)
    x[2, 5] = torch.nan
    y = moe_w4a16_gemm(x, pack_int4(_int4(3, 24, 128)), _positive(3, 24, 1), offsets, None, None, 128)
    assert y.isnan().all(1).tolist() == [row == 2 for row in range(7)]


def test_strided_operands() -> None:
    x_rows, offsets, rows, weight = _routing((3, 0, 4), True)
    x, x_scale, w, w_scale = _w8a8_operands("fp8 block", x_rows, 3, 130, 300)
    truth = reference_moe.moe_w8a8_fp8_block_gemm(x, x_scale, w, w_scale, offsets, rows, weight, torch.float32)
    # Padded rows, and scales that lie column by column as the quantiser of a grouped matmul leaves them.
    wide = torch.zeros(3, 130, 400, device=DEVICE).to(torch.float8_e4m3fn)
    wide[..., :300] = w
    columns = x_scale.t().contiguous().t()
    y = moe_w8a8_fp8_block_gemm(x, columns, wide[..., :300], w_scale, offsets, rows, weight, torch.float32)
    _close(y, truth, EIGHT_BIT["fp8 block"])
    transposed = w.transpose(1, 2).contiguous().transpose(1, 2)
    y = moe_w8a8_fp8_block_gemm(x, x_scale, transposed, w_scale, offsets, rows, weight, torch.float32)
    _close(y, truth, EIGHT_BIT["fp8 block"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_sorting_by_expert(dtype: torch.dtype) -> None:
    ids = torch.tensor([[4, 0], [2, 4], [0, 7], [4, 2]], dtype=dtype, device=DEVICE)
    rows, offsets, order = sort_by_expert(ids, 5)
    assert (rows.dtype, offsets.dtype) == (torch.int32, torch.int32)
    # Id 7 is an expert of another device: behind the last offset.
    assert offsets.tolist() == [0, 2, 2, 4, 4, 7]
    assert rows.tolist() == [0, 2, 1, 3, 0, 1, 3, 2]
    assert order.tolist() == [1, 4, 2, 7, 0, 3, 6, 5]


def test_a_layer_of_experts_from_router_to_sum() -> None:
    tokens, top_k, experts, n, k = 9, 2, 4, 24, 64
    x = _random(tokens, k).to(torch.float16)
    codes = _int4(experts, n, k)
    scale = _positive(experts, n, 1)
    scores, ids = _random(tokens, experts, seed=7).softmax(-1).topk(top_k)
    rows, offsets, order = sort_by_expert(ids, experts)
    y = moe_w4a16_gemm(x, pack_int4(codes), scale, offsets, rows, scores.flatten()[order], k)
    unsorted = torch.empty_like(y)
    unsorted[order] = y
    dense = torch.einsum("tk,enk->ten", x.double(), codes.double() * scale.double())
    truth = (dense.gather(1, ids[..., None].expand(-1, -1, n)) * scores.double()[..., None]).sum(1)
    _close(unsorted.view(tokens, top_k, n).double().sum(1), truth, 1e-3)


@pytest.mark.parametrize(("total", "experts", "block_m"), [(0, 4, 16), (3, 4, 16), (9, 3, 2), (1024, 256, 16)])
def test_the_grid_holds_every_distribution_and_no_more(total: int, experts: int, block_m: int) -> None:
    most = most_tiles(total, experts, block_m)
    busy = min(total, experts)
    worst = [1 + (total - busy if expert == 0 else 0) for expert in range(busy)]
    assert most == sum(-(-rows // block_m) for rows in worst)
    for seed in range(50):
        ids = torch.randint(0, experts, (total,), generator=_generator(seed))
        assert most >= sum(-(-rows // block_m) for rows in ids.bincount(minlength=experts).tolist())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("rows", [8, 1024, 4096, 32768, 1 << 20])
def test_every_candidate_can_be_launched(family: Family, rows: int) -> None:
    problem = moe_problem(rows, 4096, 7168, 256)
    assert problem.m == max(-(-rows // 256), 1)
    configs = family.fitting(problem)
    assert len(set(configs)) == len(configs)
    assert {config.form for config in configs} <= {"", "swap", "permuted"}
    if family is FP8_BLOCK:
        assert all(SCALE_BLOCK % c.block_n == SCALE_BLOCK % c.block_k == 0 for c in configs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.zeros(3, dtype=torch.int32)}, "offsets must be"),
        ({"offsets": torch.zeros(4)}, "offsets must be"),
        ({"rows": torch.zeros(5, dtype=torch.int64)}, "rows must be"),
        ({"row_weight": torch.zeros(4)}, "row_weight must be"),
        ({"x_scale": torch.ones(5, 2)}, "x_scale must be"),
        ({"w_scale": torch.ones(3, 8, 2)}, "w_scale must be"),
        ({"w_codes": torch.ones(3, 8, 65, dtype=torch.int8)}, "moe_w8a8_int8_gemm: x"),
        ({"w_codes": torch.ones(3, 8, dtype=torch.int8)}, "w \\[E, N, K\\]"),
        ({"config": dataclasses.replace(TINY, split_k=2)}, "do not split K"),
    ],
)
def test_wrong_operands_are_named(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "x_codes": torch.ones(5, 64, dtype=torch.int8),
        "x_scale": torch.ones(5, 1),
        "w_codes": torch.ones(3, 8, 64, dtype=torch.int8),
        "w_scale": torch.ones(3, 8, 1),
        "offsets": torch.tensor([0, 2, 2, 5], dtype=torch.int32),
        "rows": None,
        "row_weight": None,
        "out_dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        moe_w8a8_int8_gemm(**{**good, **change})


@pytest.mark.parametrize(
    ("group", "k", "config", "message"),
    [
        (48, 96, TINY, "no multiple of 32"),
        (64, 96, TINY, "no divisor"),
        (64, 128, dataclasses.replace(TINY, block_k=128), "does not fit groups"),
    ],
)
def test_groups_that_cannot_be_computed_are_named(group: int, k: int, config: Config, message: str) -> None:
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    w = pack_int4(torch.zeros(1, 8, k, dtype=torch.int8))
    arguments = torch.ones(2, k).half(), w, torch.ones(1, 8, k // group), offsets, None, None, group, config
    with pytest.raises(ValueError, match=message):
        moe_w4a16_gemm(*arguments)
