"""The kernels behind `triton_moe.py`, which says what they compute: a tile of one expert's rows per block.

A block finds its expert by itself: from the E + 1 offsets it adds up how many tiles of rows the experts have and counts
the experts that end before its own tile. That costs one load and one scan of E numbers, little beside a tile's weights.

Few rows per expert (decoding): bound by reading weights. The operands are swapped, so that w fills the 64 rows of a
matrix instruction and x its columns, 16 at least; neighbouring blocks read neighbouring rows of w, x comes from the L2
cache. INT4 is always computed so: a row's scale is then two numbers of a thread, and unpacked weights go from registers
to the matrix unit without a detour through shared memory. Many rows per expert (prefilling) in INT8 and FP8: x fills
the rows, and GROUP_M tiles of rows walk along w together.

FP8 sums are brought to float32 every 128 columns, because the matrix unit of sm_90 keeps about 14 bits while it adds
(DeepSeek-V3, arXiv 2412.19437, section 3.3.2). INT4 sums are scaled once per group, so weights are exact operands.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import Any

import triton
import triton.language as tl

from lowprec_kernels.aot import TARGETS, AotCase
from lowprec_kernels.triton_common import across, scale_and_store, tile_of
from lowprec_kernels.triton_unpack import fragment_columns, nibbles_as_float


@triton.jit
def expert_tile(offsets, tile, experts, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """Number of a tile of rows -> its expert and its number there; EXPERTS (>= `experts`) beyond the last tile."""
    numbers = tl.arange(0, EXPERTS)
    begin = tl.load(offsets + numbers, mask=numbers < experts, other=0)
    end = tl.load(offsets + numbers + 1, mask=numbers < experts, other=0)
    tiles_up_to = tl.cumsum(tl.cdiv(end - begin, BLOCK_M), 0)
    past = tiles_up_to <= tile
    return tl.sum(past.to(tl.int32), 0), tile - tl.max(tl.where(past, tiles_up_to, 0), 0)


@triton.jit
def tile_rows(offsets, rows, expert, within, BLOCK_M: tl.constexpr):
    """Tile of an expert -> rows of y [BLOCK_M], the end of its rows, and the rows of x [BLOCK_M] int64."""
    rows_m = tl.load(offsets + expert) + within * BLOCK_M + tl.arange(0, BLOCK_M)
    end = tl.load(offsets + expert + 1)
    source = rows_m
    if rows is not None:
        source = tl.load(rows + rows_m, mask=rows_m < end, other=0)
    return rows_m, end, source.to(tl.int64)


@triton.jit
def w_rows(w, expert, first_n, n, stride_e, stride_n, BLOCK_N: tl.constexpr):
    """Pointers [BLOCK_N, 1] to rows of an expert's weights; past the last row, the last (which is not stored)."""
    inside = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - first_n)
    return w + expert.to(tl.int64) * stride_e + first_n.to(tl.int64) * stride_n + (inside * stride_n)[:, None]


@triton.jit
def block_scales(x_scale, w_scale, source, inside, stride_m, stride_k, block, blocks):
    """Scales of x [BLOCK_M] times that of w for a block of columns; beyond the last block, those of the last."""
    at = tl.minimum(block, blocks - 1)
    return tl.load(x_scale + source * stride_m + at * stride_k, mask=inside, other=0.0) * tl.load(w_scale + at)


@triton.jit
def product(x_tile, w_tile, acc, SWAPPED: tl.constexpr, SUM: tl.constexpr, PROMOTE: tl.constexpr):
    """acc plus x [BLOCK_M, BLOCK_K] times w [BLOCK_N, BLOCK_K], as [BLOCK_M, BLOCK_N] or its transpose."""
    if SWAPPED:
        acc = tl.dot(w_tile, tl.trans(x_tile), acc, out_dtype=SUM, max_num_imprecise_acc=PROMOTE)
    else:
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, out_dtype=SUM, max_num_imprecise_acc=PROMOTE)
    return acc


@triton.jit
def moe_w8a8_kernel(
    x,
    x_scale,
    w,
    w_scale,
    offsets,
    rows,
    row_weight,
    out,
    n,
    k,
    experts,
    tiles_m,
    stride_x,
    stride_e,
    stride_w,
    stride_sm,
    stride_sk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    MASK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    PROMOTE: tl.constexpr,
):
    """x_scale [X, 1], w_scale [E, N, 1]; where SCALE_BLOCK is not 0, x_scale [X, KB], w_scale [E, NB, KB]."""
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    tile, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(n, BLOCK_N), GROUP_M)
    expert, within = expert_tile(offsets, tile, experts, BLOCK_M, EXPERTS)
    if expert >= experts:
        return
    rows_m, end, source = tile_rows(offsets, rows, expert, within, BLOCK_M)
    inside = rows_m < end
    first_n = tile_n * BLOCK_N
    rows_n = first_n + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)[None, :]
    x_at = x + (source * stride_x)[:, None] + columns
    w_at = w_rows(w, expert, first_n, n, stride_e, stride_w, BLOCK_N) + columns
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), SUM)
    if SCALE_BLOCK > 0:
        none = acc
        blocks = tl.cdiv(k, SCALE_BLOCK)
        w_scale += (expert * tl.cdiv(n, SCALE_BLOCK) + first_n // SCALE_BLOCK) * blocks
        factors = block_scales(x_scale, w_scale, source, inside, stride_sm, stride_sk, 0, blocks)
    for start in range(0, k, BLOCK_K):
        if MASK_K:
            x_tile = tl.load(x_at, mask=inside[:, None] & (columns < k - start), other=0.0)
            w_tile = tl.load(w_at, mask=columns < k - start, other=0.0)
        else:
            x_tile = tl.load(x_at, mask=inside[:, None], other=0.0)
            w_tile = tl.load(w_at)
        if SCALE_BLOCK > 0:
            # The next scales are fetched while this block is multiplied: Triton pipelines operands of products alone.
            block = (start + BLOCK_K) // SCALE_BLOCK
            following = block_scales(x_scale, w_scale, source, inside, stride_sm, stride_sk, block, blocks)
            factors, _ = across(factors, rows_n, SWAPPED)
            acc += product(x_tile, w_tile, none, SWAPPED, SUM, PROMOTE) * factors
            factors = following
        else:
            acc = product(x_tile, w_tile, acc, SWAPPED, SUM, PROMOTE)
        x_at += BLOCK_K
        w_at += BLOCK_K
    y = acc.to(tl.float32)
    if SCALE_BLOCK > 0:
        w_scale = None
    else:
        factors, _ = across(tl.load(x_scale + source * stride_sm, mask=inside, other=0.0), rows_n, SWAPPED)
        y *= factors
        w_scale += expert * n
    # The end of the expert's rows bounds the store; the router's weights are scales of rows of y.
    scale_and_store(y, out, row_weight, w_scale, None, rows_m, rows_n, end, n, n, 1, SWAPPED)


@triton.jit
def group_scales(at, column, groups, GROUP: tl.constexpr):
    """Scales of w [BLOCK_N, 1] for the group that a column is in; beyond the last column, those of the last group."""
    return tl.load(at + tl.minimum(column // GROUP, groups - 1))


@triton.jit
def moe_w4a16_kernel(
    x,
    w,
    w_scale,
    offsets,
    rows,
    row_weight,
    out,
    n,
    k,
    experts,
    tiles_m,
    stride_x,
    stride_e,
    stride_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    MASK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    PERMUTED: tl.constexpr,
    FAST: tl.constexpr,
):
    """w words [E, n, P], w_scale [E, n, k / GROUP]; BLOCK_K divides GROUP, or it is a chunk of two groups.

    PERMUTED: the columns of every plane of x lie in the order of `fragment_columns` already, and are read in one piece.
    """
    HALF: tl.constexpr = BLOCK_K // 2
    WORDS: tl.constexpr = BLOCK_K // 8
    TWO_GROUPS: tl.constexpr = GROUP % BLOCK_K != 0
    tile, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(n, BLOCK_N), GROUP_M)
    expert, within = expert_tile(offsets, tile, experts, BLOCK_M, EXPERTS)
    if expert >= experts:
        return
    rows_m, end, source = tile_rows(offsets, rows, expert, within, BLOCK_M)
    inside = (rows_m < end)[:, None]
    first_n = tile_n * BLOCK_N
    rows_n = first_n + tl.arange(0, BLOCK_N)
    # The column that meets a place of the low plane; the high one holds the column PLANE further on.
    place = tl.arange(0, HALF)
    columns = (place // PLANE * (2 * PLANE) + place % PLANE if PERMUTED else fragment_columns(HALF))[None, :]
    x_at = x + (source * stride_x)[:, None] + columns
    words = tl.arange(0, WORDS)[None, :]
    w_at = w_rows(w, expert, first_n, n, stride_e, stride_w, BLOCK_N) + words
    groups = k // GROUP
    s_at = w_rows(w_scale, expert, first_n, n, n * groups, groups, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    none = acc
    low = group_scales(s_at, 0, groups, GROUP)
    if TWO_GROUPS:
        high = group_scales(s_at, PLANE, groups, GROUP)
    for start in range(0, k, BLOCK_K):
        if MASK_K:
            x_low = tl.load(x_at, mask=inside & (columns < k - start), other=0.0)
            x_high = tl.load(x_at + PLANE, mask=inside & (columns + PLANE < k - start), other=0.0)
        else:
            x_low = tl.load(x_at, mask=inside, other=0.0)
            x_high = tl.load(x_at + PLANE, mask=inside, other=0.0)
        # Whole chunks are stored, and a block that is longer than a chunk is inside a group: no mask.
        w_low, w_high = nibbles_as_float(tl.load(w_at), x.dtype.element_ty, FAST)
        # The next scales are fetched while this block is multiplied: Triton pipelines operands of products alone.
        following = group_scales(s_at, start + BLOCK_K, groups, GROUP)
        if TWO_GROUPS:
            acc += tl.dot(w_low, tl.trans(x_low), none) * low
            acc += tl.dot(w_high, tl.trans(x_high), none) * high
            high = group_scales(s_at, start + BLOCK_K + PLANE, groups, GROUP)
        else:
            acc += tl.dot(w_high, tl.trans(x_high), tl.dot(w_low, tl.trans(x_low), none)) * low
        low = following
        x_at += BLOCK_K
        w_at += WORDS
    scale_and_store(acc, out, row_weight, None, None, rows_m, rows_n, end, n, n, 1, True)


_TYPES = {"offsets": "*i32", "rows": "*i32", "row_weight": "*fp32", "x_scale": "*fp32", "w_scale": "*fp32"}
# Triton 3.6.0 multiplies int8 on sm_100 as on sm_80.
_INT8 = {"sm_80": "IMMA", "sm_89": "IMMA", "sm_90": "IGMMA", "sm_100": "UTCIMMA|IMMA", "gfx942": "v_mfma_i32_.*_i8"}
# The e4m3 of gfx942 is another one, so that it multiplies in float16.
_FP8 = {"sm_89": "QMMA", "sm_90": "QGMMA", "sm_100": "UTCQMMA", "gfx942": "v_mfma_f32_.*_f16"}
_BF16 = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32_.*_bf16"}


def _case(
    name: str,
    kernel: Any,
    kinds: tuple[str, str, str],
    tile: tuple[int, int, int, int, int],
    expected: dict[str, str],
    targets: tuple[str, ...],
    most: float | None = None,
    **constants: Any,
) -> AotCase:
    """`kinds` of x, w, out; `tile`: rows of x, rows of w, columns, warps, stages; `most` instructions per weight."""
    rows_m, rows_n, columns, warps, stages = tile
    shape = {"BLOCK_M": rows_m, "BLOCK_N": rows_n, "BLOCK_K": columns, "GROUP_M": 1, "EXPERTS": 256, "MASK_K": False}
    types = _TYPES | dict(zip(("x", "w", "out"), (f"*{kind}" for kind in kinds), strict=True))
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in shape | constants}
    return AotCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constants=shape | constants,
        divisible=tuple(name for name in signature if name not in ("tiles_m", "stride_sm", "stride_sk")),
        warps=warps,
        stages=stages,
        expected=expected,
        weights_per_trip=rows_n * columns,
        limits={} if most is None else {"sm_90": most},
        targets=targets,
    )


def _w8a8_case(name: str, kind: str, swapped: bool, scale_block: int, most: float) -> AotCase:
    return _case(
        name,
        moe_w8a8_kernel,
        (kind, kind, "bf16"),
        (16, 128, 128, 4, 4) if swapped else (64, 128, 128, 8, 3),
        _INT8 if kind == "i8" else _FP8,
        TARGETS if kind == "i8" else TARGETS[1:],
        most,
        SWAPPED=swapped,
        SCALE_BLOCK=scale_block,
        PROMOTE=128 if kind == "fp8e4nv" and not scale_block else None,
    )


def _w4a16_case(name: str, group: int, permuted: bool, fast: bool, most: float | None = None) -> AotCase:
    tile = (64, 128, min(group, 128), 8, 4) if permuted else (16, 128, max(min(group, 128), 64), 4, 5)
    # With 64 rows of x a few registers spill on sm_100, where such a tile was not looked into.
    targets = TARGETS[4:] if not fast else TARGETS[:3] if permuted else TARGETS[:4]
    constants = {"GROUP": group, "PLANE": 32, "PERMUTED": permuted, "FAST": fast}
    return _case(name, moe_w4a16_kernel, ("bf16", "i32", "bf16"), tile, _BF16, targets, most, **constants)


AOT = (
    _w8a8_case("int8, few rows", "i8", True, 0, 0.85),
    _w8a8_case("int8, many rows", "i8", False, 0, 1.4),
    _w8a8_case("fp8, few rows", "fp8e4nv", True, 0, 1.05),
    _w8a8_case("fp8, many rows", "fp8e4nv", False, 0, 1.9),
    _w8a8_case("fp8 block, few rows", "fp8e4nv", True, 128, 1.2),
    _w8a8_case("fp8 block, many rows", "fp8e4nv", False, 128, 2.1),
    _w4a16_case("int4 g128, few rows", 128, False, True, 2.9),
    _w4a16_case("int4 g32, few rows", 32, False, True, 4.1),
    _w4a16_case("int4 g128, many rows", 128, True, True, 3.9),
    _w4a16_case("int4 g128, few rows, without PTX", 128, False, False),
)
