"""Mixture of experts: grouped matmuls over rows that are sorted by expert, with FP8, INT8 and INT4 weights.

    y[i, n] = row_weight[i] * sum_k x[rows[i], k] w[e, n, k]     where offsets[e] <= i < offsets[e + 1]

x is [X, K], the weights of E experts are [E, N, K]; scales and codes as in the ops for one matrix, with an E in front
of those of the weights. DeepSeek's FP8 has scales for 1 x 128 of x and 128 x 128 of w instead (arXiv 2412.19437,
section 3.3.1). `rows` spares the caller a sorted copy of x (without it row i of x is row i of y), `row_weight` is the
router's. The T rows of y stay in sorted order; `sort_by_expert` says where they belong. Rows whose id is outside [0, E)
(experts of another device) are left unwritten.

Nothing is known on the host but T: an expert may have no row or all of them. So the grid has as many tiles of rows as
T rows can fill at worst (`most_tiles`); each block finds its expert on the device, and those beyond the last tile end
at once. One launch, no preparing kernel, no synchronisation: it can be captured in a CUDA graph.

x, w may have any strides; where the last is not 1 a contiguous copy is made, which for w is dear. FP8 needs sm_89.
Left out: K split over blocks (experts times tiles of columns fill a device), tensor memory accelerators, gate and up
fused with their activation, zero points, INT4 groups that are no multiple of 32.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lowprec_kernels.packing import CHUNK, PLANE, words_for
from lowprec_kernels.triton_common import on_device, on_nvidia
from lowprec_kernels.triton_moe_kernels import moe_w4a16_kernel, moe_w8a8_kernel
from lowprec_kernels.tuning import Config, Family, Problem, config_for

# Side of a block that shares a scale in DeepSeek's FP8.
SCALE_BLOCK = 128
# Forms: w on the tall side of the product; x copied with its columns in the order in which INT4 is unpacked.
SWAP = "swap"
PERMUTED = "permuted"


def sort_by_expert(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """topk_ids [tokens, top_k] -> rows [T] int32, offsets [experts + 1] int32, order [T] int64, without synchronising.

    `order[i]` is the place in `topk_ids.flatten()` that sorted row i comes from, `rows[i]` its token. Back again:
    `z = torch.empty_like(y); z[order] = y; z.view(tokens, top_k, N).sum(1)`.
    """
    ids, order = torch.sort(topk_ids.flatten(), stable=True)
    bounds = torch.arange(experts + 1, dtype=ids.dtype, device=ids.device)
    offsets = torch.searchsorted(ids, bounds, out_int32=True)
    return (order // topk_ids.shape[1]).to(torch.int32), offsets, order


def most_tiles(rows: int, experts: int, block_m: int) -> int:
    """Tiles of rows at worst: every expert has one row, and what is left over fills whole tiles."""
    busy = min(rows, experts)
    return busy + (rows - busy) // block_m


def moe_problem(rows: int, n: int, k: int, experts: int) -> Problem:
    """The key of the tuning tables, with the mean number of rows of an expert: that is what decides between tiles."""
    return Problem(m=-(-rows // experts), n=n, k=k, experts=experts)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """Which expert computes which row.

    Attributes:
        offsets: [E + 1] int32, where each expert's rows of y begin.
        rows: [T] int32, each row's row of x; None where x is sorted already.
        weight: [T] float32, the router's weight of each row, or None.
    """

    offsets: Tensor
    rows: Tensor | None = None
    weight: Tensor | None = None

    def count(self, op: str, x: Tensor, w: Tensor) -> int:
        """T, the rows of y.

        Raises:
            ValueError: operands that do not fit each other.
        """
        if x.ndim != 2 or w.ndim != 3:
            raise ValueError(f"{op}: x must be [rows, K] and w [E, N, K], not {tuple(x.shape)} and {tuple(w.shape)}")
        total = len(x) if self.rows is None else len(self.rows)
        self._check(op, "offsets", self.offsets, (len(w) + 1,), torch.int32)
        self._check(op, "rows", self.rows, (total,), torch.int32)
        self._check(op, "row_weight", self.weight, (total,), torch.float32)
        return total

    @staticmethod
    def _check(op: str, name: str, found: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if found is not None and (tuple(found.shape) != shape or found.dtype != dtype or not found.is_contiguous()):
            raise ValueError(
                f"{op}: {name} must be {shape} {dtype}, contiguous, not {tuple(found.shape)} {found.dtype}"
            )


def _check_scale(op: str, name: str, scale: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(scale.shape) != shape or scale.dtype != torch.float32:
        raise ValueError(f"{op}: {name} must be {shape} float32, not {tuple(scale.shape)} {scale.dtype}")


def _rows_last(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, copied where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _in_fragment_order(x: Tensor) -> Tensor:
    """x [X, K] -> a copy, in which each 32 columns stand in the order of `triton_unpack.fragment_columns`."""
    planes = x.reshape(len(x), -1, 4, 2, 2, 2)
    return planes.permute(0, 1, 3, 4, 2, 5).reshape(x.shape)


def _launch(
    kernel: Any,
    config: Config,
    sizes: tuple[int, int, int, int],
    x: Tensor,
    tensors: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    **constants: Any,
) -> None:
    """`sizes` are T, n, k and the number of experts; `tensors` what comes after x, up to the output."""
    total, n, k, experts = sizes
    if config.split_k != 1:
        raise ValueError(f"grouped matmuls do not split K: split_k = {config.split_k}")
    tiles_m = most_tiles(total, experts, config.block_m)
    with on_device(x):
        kernel[(tiles_m * triton.cdiv(n, config.block_n),)](
            x,
            *tensors,
            n,
            k,
            experts,
            tiles_m,
            *strides,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            EXPERTS=triton.next_power_of_2(experts),
            MASK_K=k % config.block_k != 0,
            num_warps=config.warps,
            num_stages=config.stages,
            **constants,
        )


def _w8a8(
    op: str,
    family: Family,
    scale_block: int,
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    routing: Routing,
    out_dtype: torch.dtype,
    config: Config | None,
) -> Tensor:
    total = routing.count(op, x_codes, w_codes)
    experts, n, k = w_codes.shape
    dtype = torch.int8 if family is INT8 else torch.float8_e4m3fn
    if (x_codes.dtype, w_codes.dtype, x_codes.shape[1]) != (dtype, dtype, k):
        raise ValueError(f"{op}: x {x_codes.dtype} {tuple(x_codes.shape)} and w {w_codes.dtype} {tuple(w_codes.shape)}")
    blocks = (triton.cdiv(n, scale_block), triton.cdiv(k, scale_block)) if scale_block else (n, 1)
    _check_scale(op, "x_scale", x_scale, (len(x_codes), blocks[1]))
    _check_scale(op, "w_scale", w_scale, (experts, *blocks))
    out = x_codes.new_empty((total, n), dtype=out_dtype)
    if not out.numel():
        return out
    config = config or config_for(family, moe_problem(total, n, k, experts), x_codes.device)
    if scale_block and (scale_block % config.block_n or scale_block % config.block_k):
        raise ValueError(f"{op}: {config} has tiles of w that no single scale covers")
    x, w = _rows_last(x_codes), _rows_last(w_codes)
    _launch(
        moe_w8a8_kernel,
        config,
        (total, n, k, experts),
        x,
        (x_scale, w, w_scale.contiguous(), routing.offsets, routing.rows, routing.weight, out),
        (x.stride(0), w.stride(0), w.stride(1), *x_scale.stride()),
        SWAPPED=config.form == SWAP,
        SCALE_BLOCK=scale_block,
        PROMOTE=None if family is not FP8 else min(SCALE_BLOCK, config.block_k),
    )
    return out


def moe_w8a8_int8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    row_weight: Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """x_codes [X, K], x_scale [X, 1], w_codes [E, N, K], w_scale [E, N, 1] -> y [T, N]; int32 sums, exact."""
    routing = Routing(offsets=offsets, rows=rows, weight=row_weight)
    name = "moe_w8a8_int8_gemm"
    return _w8a8(name, INT8, 0, x_codes, x_scale, w_codes, w_scale, routing, out_dtype, config)


def moe_w8a8_fp8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    row_weight: Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """x_codes [X, K], x_scale [X, 1], w_codes [E, N, K], w_scale [E, N, 1] -> y [T, N]; e4m3 codes."""
    routing = Routing(offsets=offsets, rows=rows, weight=row_weight)
    name = "moe_w8a8_fp8_gemm"
    return _w8a8(name, FP8, 0, x_codes, x_scale, w_codes, w_scale, routing, out_dtype, config)


def moe_w8a8_fp8_block_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    row_weight: Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """The same with x_scale [X, ceil(K / 128)], w_scale [E, ceil(N / 128), ceil(K / 128)]: DeepSeek's FP8."""
    routing = Routing(offsets=offsets, rows=rows, weight=row_weight)
    name = "moe_w8a8_fp8_block_gemm"
    return _w8a8(name, FP8_BLOCK, SCALE_BLOCK, x_codes, x_scale, w_codes, w_scale, routing, out_dtype, config)


def moe_w4a16_gemm(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    row_weight: Tensor | None,
    group_size: int,
    config: Config | None = None,
) -> Tensor:
    """x [X, K] bf16 or fp16, w_packed [E, N, words_for(K)] int32, w_scale [E, N, K / G] -> y [T, N] in x's dtype."""
    op = "moe_w4a16_gemm"
    routing = Routing(offsets=offsets, rows=rows, weight=row_weight)
    total = routing.count(op, x, w_packed)
    (experts, n, words), k = w_packed.shape, x.shape[1]
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{op}: x must be bfloat16 or float16, not {x.dtype}")
    if w_packed.dtype != torch.int32 or words != words_for(k):
        raise ValueError(f"{op}: K = {k} is {words_for(k)} int32 words, not {words} {w_packed.dtype}")
    if group_size <= 0 or group_size % PLANE or k % group_size:
        raise ValueError(f"{op}: groups of {group_size} are no multiple of {PLANE}, or no divisor of K = {k}")
    _check_scale(op, "w_scale", w_scale, (experts, n, k // group_size))
    out = x.new_empty((total, n))
    if not out.numel():
        return out
    config = config or config_for(w4a16_family(group_size), moe_problem(total, n, k, experts), x.device)
    if config.block_k % CHUNK or (group_size % config.block_k and config.block_k != CHUNK):
        raise ValueError(f"{op}: {config} does not fit groups of {group_size}")
    x, w = _rows_last(x), _rows_last(w_packed)
    if config.form == PERMUTED:
        x = _in_fragment_order(x)
    _launch(
        moe_w4a16_kernel,
        config,
        (total, n, k, experts),
        x,
        (w, w_scale.contiguous(), offsets, rows, row_weight, out),
        (x.stride(0), w.stride(0), w.stride(1)),
        GROUP=group_size,
        PLANE=PLANE,
        PERMUTED=config.form == PERMUTED,
        FAST=on_nvidia(x),
    )
    return out


def _block_m(problem: Problem) -> int:
    """Rows of a tile so that most experts have one: about twice the mean, from 16 to 128."""
    return next((rows for rows in (16, 32, 64) if 2 * problem.m <= rows), 128)


def _tall(problem: Problem) -> int:
    """Rows of a tile where there are many: a last tile that is half empty must not weigh."""
    return 64 if problem.m <= 128 else 128


def _few_rows(problem: Problem, shapes: Sequence[tuple[int, int, int, int]], form: str = SWAP) -> list[Config]:
    """Tiles (block_n, block_k, warps, stages), of the likely number of rows and of half of it."""
    likely = min(_block_m(problem), 64)
    return [
        Config(block_m=rows, block_n=n, block_k=k, warps=warps, stages=stages, group_m=1, form=form)
        for rows in sorted({likely, max(likely // 2, 16)}, reverse=True)
        for n, k, warps, stages in shapes
    ]


def _w8a8_candidates(problem: Problem) -> list[Config]:
    few = [(128, 128, 4, 4), (128, 128, 4, 6), (64, 256, 4, 4), (64, 128, 4, 6), (128, 256, 8, 3), (256, 128, 8, 4)]
    if problem.m <= 32:
        return _few_rows(problem, few)
    many = [(64, 128, 128, 4, 3), (128, 128, 128, 8, 4), (64, 128, 128, 4, 4), (64, 256, 128, 8, 3)]
    many += [(128, 128, 128, 8, 3), (128, 64, 128, 4, 4), (64, 128, 128, 8, 3)]
    many.sort(key=lambda tile: tile[0] != _tall(problem))
    tiles = [Config(block_m=m, block_n=n, block_k=k, warps=warps, stages=s) for m, n, k, warps, s in many]
    return tiles + _few_rows(problem, few[:2])


def _block_candidates(problem: Problem) -> list[Config]:
    return [c for c in _w8a8_candidates(problem) if max(c.block_n, c.block_k) <= SCALE_BLOCK]


def _w4a16_candidates(block_k: int, problem: Problem) -> list[Config]:
    few = [(128, 4, 5), (128, 4, 7), (64, 4, 6), (64, 4, 8), (128, 8, 5), (256, 8, 4)]
    if problem.m <= 16:
        return _few_rows(problem, [(n, block_k, warps, stages) for n, warps, stages in few], "")
    many = [(64, 128, 4, 4), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 4), (64, 128, 8, 4), (64, 256, 8, 3)]
    many += [(32, 128, 4, 5)]
    many.sort(key=lambda tile: tile[0] != _tall(problem))
    return [
        Config(block_m=m, block_n=n, block_k=block_k, warps=warps, stages=stages, form=PERMUTED)
        for m, n, warps, stages in many
        if m <= _block_m(problem)
    ]


def w4a16_family(group_size: int) -> Family:
    """The family for groups of this size: of the largest known one that divides it."""
    return W4A16[max(g for g in W4A16 if group_size % g == 0)]


INT8 = Family(name="moe_w8a8_int8", candidates=_w8a8_candidates, bytes_x=1, bytes_w=1)
FP8 = Family(name="moe_w8a8_fp8", candidates=_w8a8_candidates, bytes_x=1, bytes_w=1)
FP8_BLOCK = Family(name="moe_w8a8_fp8_block", candidates=_block_candidates, bytes_x=1, bytes_w=1)
# Group size -> family. A tile's columns lie in one group, except that two groups of 32 are a chunk.
W4A16 = {
    group: Family(
        name=f"moe_w4a16_g{group}",
        candidates=functools.partial(_w4a16_candidates, max(group, CHUNK)),
        bytes_x=2,
        bytes_w=0.5,
    )
    for group in (PLANE, CHUNK, 2 * CHUNK)
}
FAMILIES = (INT8, FP8, FP8_BLOCK, *W4A16.values())
