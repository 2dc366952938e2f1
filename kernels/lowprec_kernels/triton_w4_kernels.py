"""The kernels of `triton_w4.py`, whose docstring says what they compute and why they are built so."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from lowprec_kernels.triton_common import finish_tile, tile_of
from lowprec_kernels.triton_unpack import (
    FACTOR_FP8,
    FACTOR_INT8,
    fragment_columns,
    nibbles_as_float,
    nibbles_as_fp8,
    nibbles_as_int8,
)

# Columns of weights and of x: both as they are; weights permuted and x read so; x already permuted in memory.
PLAIN = tl.constexpr(0)
PERMUTE_X = tl.constexpr(1)
PERMUTED_X = tl.constexpr(2)


@triton.jit
def _operands(at, there, KIND: tl.constexpr, FAST: tl.constexpr, ORDER: tl.constexpr):
    """Loads a tile of words or bytes, all or where `there`; the operands of both planes, [BLOCK_N, HALF] each."""
    stored = tl.load(at) if there is None else tl.load(at, mask=there, other=0)
    if KIND == tl.int8:
        lo, hi = nibbles_as_int8(stored, FAST)
    elif KIND == tl.float8e4nv:
        lo, hi = nibbles_as_fp8(stored, FAST)
    else:
        lo, hi = nibbles_as_float(stored, KIND, FAST, ORDER != PLAIN)
    return lo, hi


@triton.jit
def _groups(s_at, first, groups, stride_g, COUNT: tl.constexpr):
    """Scales [BLOCK_N, COUNT] float32 from group `first` on."""
    at = tl.minimum(first + tl.arange(0, COUNT), groups - 1) * stride_g
    return tl.load(s_at[:, None] + at[None, :]).to(tl.float32)


@triton.jit
def _column(tile, place: tl.constexpr):
    """Column `place` [ROWS] of a float32 tile whose rows lie in one thread each: chosen when compiled."""
    bits = tl.where(tl.arange(0, tile.shape[1])[None, :] == place, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
def _in_two(values):
    """float32 values as a bfloat16 value, which tf32 holds, and the rest, of which tf32 holds the upper 11 bits."""
    upper = values.to(tl.bfloat16).to(tl.float32)
    return upper, values - upper


@triton.jit
def _offset(
    x_sums,
    stride_xm,
    stride_xg,
    s_at,
    z_at,
    stride_g,
    m,
    rows_m,
    groups,
    split,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M]: what zero points, or the offset 8 of e4m3 operands, add to this split's rows.

    The sum over groups of scale times zero point (s_at, z_at: rows of [n, groups]) times x_sums [m, groups].
    """
    offset = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    at = tl.arange(0, 16)
    for start in tl.range(split * 16, groups, SPLIT_K * 16, num_stages=1):
        inside = start + at < groups
        group_at = ((start + at) * stride_g)[None, :]
        factors = tl.load(s_at[:, None] + group_at, mask=inside[None, :], other=0.0).to(tl.float32)
        if z_at is None:
            factors *= 8.0
        else:
            factors *= tl.load(z_at[:, None] + group_at, mask=inside[None, :], other=0).to(tl.float32)
        places = (start + at).to(tl.int64)[:, None] * stride_xg + rows_m.to(tl.int64)[None, :] * stride_xm
        sums = tl.load(x_sums + places, mask=inside[:, None] & (rows_m < m)[None, :], other=0.0)
        upper, lower = _in_two(sums)
        coarse, fine = _in_two(factors)
        offset = tl.dot(coarse, upper, offset, input_precision="tf32")
        offset = tl.dot(coarse, lower, offset, input_precision="tf32")
        offset = tl.dot(fine, upper, offset, input_precision="tf32")
    return offset


@triton.jit
def _scaled(codes, factor, FINE: tl.constexpr):
    """codes [ROWS, COLUMNS] times factor [ROWS] float32, in the codes' dtype, which holds factors of coarse levels."""
    if FINE:
        return (codes.to(tl.float32) * factor[:, None]).to(codes.dtype)
    return codes * factor.to(codes.dtype)[:, None]


@triton.jit
def w4_kernel(
    x,
    w,
    residual,
    ratio,
    scale,
    zero,
    x_scale,
    x_sums,
    bias,
    out,
    workspace,
    counters,
    m,
    n,
    k,
    stride_x,
    stride_w,
    stride_s,
    stride_g,
    stride_o,
    stride_xm,
    stride_xg,
    GROUP: tl.constexpr,
    ORDER: tl.constexpr,
    FAST: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """x [m, k], w [n, stride_w] words (float x) or bytes, last axis dense; scale, zero, ratio [n, k / GROUP]."""
    HALF: tl.constexpr = STEP // 2
    KIND: tl.constexpr = x.dtype.element_ty
    SUM: tl.constexpr = tl.int32 if KIND == tl.int8 else tl.float32
    UNITS: tl.constexpr = HALF // 4 if KIND == tl.bfloat16 or KIND == tl.float16 else HALF
    PARTS: tl.constexpr = BLOCK_K // STEP
    COUNT: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tile, split = tl.program_id(0), tl.program_id(1)
    tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond n repeat the last one: what they give is not stored.
    safe_n = tl.minimum(rows_n, n - 1).to(tl.int64)
    at = tl.arange(0, HALF)
    columns = at // 32 * 64 + at % 32 if ORDER != PERMUTE_X else fragment_columns(HALF)
    x_at = x + rows_m.to(tl.int64)[None, :] * stride_x + columns[:, None]
    units = tl.arange(0, UNITS)[None, :]
    w_at = safe_n[:, None] * stride_w + units
    s_at = scale + safe_n * stride_s
    z_at = None if zero is None else zero + safe_n * stride_s
    r_at = None if ratio is None else ratio + safe_n * stride_s
    groups = k // GROUP
    ahead = split * BLOCK_K // GROUP
    next_factors = _groups(s_at, ahead, groups, stride_g, COUNT)
    inside = (rows_m < m)[None, :]
    none = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    # What one of acc stands for.
    UNIT: tl.constexpr = FACTOR_INT8 if KIND == tl.int8 else FACTOR_FP8 if KIND == tl.float8e4nv else 1.0
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if x_sums is not None:
        # First, while registers are free.
        acc -= (1.0 / UNIT) * _offset(
            x_sums, stride_xm, stride_xg, s_at, z_at, stride_g, m, rows_m, groups, split, SPLIT_K, BLOCK_M, BLOCK_N
        )
    for block in range(split, tl.cdiv(k, BLOCK_K), SPLIT_K):
        # Scales of the next trip are asked for now: a load waits in memory's queue behind all the weights that were
        # asked for before it, and Triton itself copies ahead only what products are made of.
        factors = next_factors
        ahead = (block + SPLIT_K) * BLOCK_K // GROUP
        next_factors = _groups(s_at, ahead, groups, stride_g, COUNT)
        if r_at is not None:
            # Asked for when they are needed: there are no registers for the next trip's.
            ratios = _groups(r_at, block * BLOCK_K // GROUP, groups, stride_g, COUNT)
        for part in tl.static_range(PARTS):
            step = block * PARTS + part
            start = step * STEP
            if EVEN_K:
                x_lo = tl.load(x_at + start, mask=inside, other=0.0)
                x_hi = tl.load(x_at + (start + 32), mask=inside, other=0.0)
                there = None
            else:
                x_lo = tl.load(x_at + start, mask=inside & (columns[:, None] < k - start), other=0.0)
                x_hi = tl.load(x_at + (start + 32), mask=inside & (columns[:, None] < k - start - 32), other=0.0)
                there = units + step * UNITS < stride_w
            lo, hi = _operands(w + (w_at + step * UNITS), there, KIND, FAST, ORDER)
            factor = _column(factors, part * STEP // GROUP)
            if SCALED and zero is not None:
                # Before they are scaled: what is rounded must not be larger than the weight.
                first = step * STEP // GROUP
                z = tl.load(z_at + tl.minimum(first, groups - 1) * stride_g).to(KIND)
                lo -= z[:, None]
            if residual is not None:
                r_lo, r_hi = _operands(residual + (w_at + step * UNITS), there, KIND, FAST, ORDER)
                steps = _column(ratios, part * STEP // GROUP)
                lo = lo * steps.to(KIND)[:, None] + r_lo
                factor = factor / steps
            if SCALED:
                lo = _scaled(lo, factor, residual is not None)
                acc = tl.dot(lo, x_lo, acc)
            else:
                sums = tl.dot(lo, x_lo, none, out_dtype=SUM)
            if GROUP == 32:
                # Each plane of a chunk is a group.
                if not SCALED:
                    acc += sums.to(tl.float32) * factor[:, None]
                factor = _column(factors, part * STEP // GROUP + 1)
                sums = none
                if residual is not None:
                    steps = _column(ratios, part * STEP // GROUP + 1)
                    factor = factor / steps
            if SCALED and zero is not None:
                if GROUP == 32:
                    z = tl.load(z_at + tl.minimum(first + 1, groups - 1) * stride_g).to(KIND)
                hi -= z[:, None]
            if residual is not None:
                hi = hi * steps.to(KIND)[:, None] + r_hi
            if SCALED:
                hi = _scaled(hi, factor, residual is not None)
                acc = tl.dot(hi, x_hi, acc)
            else:
                sums = tl.dot(hi, x_hi, sums, out_dtype=SUM)
                acc += sums.to(tl.float32) * factor[:, None]
    acc *= UNIT
    finish_tile(
        acc, out, x_scale, None, bias, workspace, counters, rows_m, rows_n, m, n, stride_o, 1, tile, split,
        BLOCK_M, BLOCK_N, True, SPLIT_K,
    )  # fmt: skip


@triton.jit
def sums_kernel(x, out, m, k, stride_x, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """out [m, k / GROUP] = sums of x [m, k] over groups of columns."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    at = x + rows.to(tl.int64)[:, None] * stride_x + columns[None, :]
    values = tl.load(at, mask=(rows < m)[:, None], other=0.0).to(tl.float32)
    at = out + rows.to(tl.int64) * (k // GROUP) + tl.program_id(1)
    tl.store(at, tl.sum(values, 1), mask=rows < m)


@triton.jit
def dequantize_kernel(
    w,
    scale,
    zero,
    out,
    n,
    k,
    stride_w,
    stride_s,
    stride_g,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Words [n, stride_w] -> out [n, k], scaled; scale, zero [n, k / GROUP] of any strides."""
    KIND: tl.constexpr = out.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.program_id(1) * (8 * CHUNKS) + tl.arange(0, 8 * CHUNKS)
    safe_n = tl.minimum(rows, n - 1).to(tl.int64)
    stored = tl.load(w + safe_n[:, None] * stride_w + words[None, :], mask=(words < stride_w)[None, :], other=0)
    # float32 results are made from bfloat16 codes, which are exact.
    CODE: tl.constexpr = tl.bfloat16 if KIND == tl.float32 else KIND
    lo, hi = nibbles_as_float(stored, CODE, FAST, False)
    at = tl.arange(0, 32 * CHUNKS)
    for plane in tl.static_range(2):
        # One scale a plane of a chunk, which lies in one group.
        columns = tl.program_id(1) * (64 * CHUNKS) + at // 32 * 64 + plane * 32 + at % 32
        first = tl.program_id(1) * (64 * CHUNKS) + tl.arange(0, CHUNKS) * 64 + plane * 32
        groups = safe_n[:, None] * stride_s + (tl.minimum(first, k - 1) // GROUP).to(tl.int64)[None, :] * stride_g
        values = (lo if plane == 0 else hi).to(tl.float32)
        if zero is not None:
            values -= _spread(tl.load(zero + groups).to(tl.float32))
        values *= _spread(tl.load(scale + groups).to(tl.float32))
        mask = (rows < n)[:, None] & (columns < k)[None, :]
        tl.store(out + safe_n[:, None] * k + columns[None, :], values.to(KIND), mask=mask)


@triton.jit
def _spread(values):
    """[ROWS, CHUNKS] -> [ROWS, 32 CHUNKS]: each value for the columns of its plane."""
    ROWS: tl.constexpr = values.shape[0]
    CHUNKS: tl.constexpr = values.shape[1]
    wide = tl.broadcast_to(tl.expand_dims(values, 2), (ROWS, CHUNKS, 32))
    return tl.reshape(wide, (ROWS, CHUNKS * 32))
