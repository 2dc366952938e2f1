"""The kernels of `triton_w4.py`, whose docstring says what they compute and why they are built so."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from lowprec_kernels.triton_common import finish_tile, tile_of
from lowprec_kernels.triton_unpack import (
    FACTOR_FP8,
    FACTOR_INT8,
    OFFSET_FP8,
    fragment_columns,
    nibbles_as_float,
    nibbles_as_fp8,
    nibbles_as_int8,
)

# Steps of the finer level of nested weights in one of the coarser.
NESTED = tl.constexpr(8.0)


@triton.jit
def _operands(at, KIND: tl.constexpr, FAST: tl.constexpr):
    """Loads a tile of words or bytes and makes the operands of both planes, [BLOCK_N, BLOCK_K / 2] each."""
    stored = tl.load(at)
    if KIND == tl.int8:
        lo, hi = nibbles_as_int8(stored, FAST)
    elif KIND == tl.float8e4nv:
        lo, hi = nibbles_as_fp8(stored, FAST)
    else:
        lo, hi = nibbles_as_float(stored, KIND, FAST)
    return lo, hi


@triton.jit
def _offset(x_sums, s_at, m, rows_m, groups, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N, BLOCK_M]: what the offset of e4m3 operands adds to a row; scales [n, groups], sums [groups, m]."""
    offset = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    at = tl.arange(0, 16)
    for start in tl.range(0, groups, 16, num_stages=1):
        inside = start + at < groups
        factors = tl.load(s_at[:, None] + (start + at)[None, :], mask=inside[None, :], other=0.0)
        places = (start + at).to(tl.int64)[:, None] * m + rows_m[None, :]
        sums = tl.load(x_sums + places, mask=inside[:, None] & (rows_m < m)[None, :], other=0.0)
        # Scales hold bfloat16 values, so tf32 holds them; the sums are taken in two parts that it holds.
        upper = sums.to(tl.bfloat16).to(tl.float32)
        offset = tl.dot(factors, upper, offset, input_precision="tf32")
        offset = tl.dot(factors, sums - upper, offset, input_precision="tf32")
    return offset * OFFSET_FP8


@triton.jit
def w4_kernel(
    x,
    w,
    residual,
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
    stride_o,
    GROUP: tl.constexpr,
    IN_ORDER: tl.constexpr,
    FAST: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """x [m, k], w [n, stride_w] words (float x) or bytes, scale [n, k / GROUP]; strides in elements, last axis of 1."""
    HALF: tl.constexpr = BLOCK_K // 2
    KIND: tl.constexpr = x.dtype.element_ty
    SUM: tl.constexpr = tl.int32 if KIND == tl.int8 else tl.float32
    UNITS: tl.constexpr = HALF // 4 if KIND == tl.bfloat16 or KIND == tl.float16 else HALF
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tile, split = tl.program_id(0), tl.program_id(1)
    tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond n repeat the last one: what they give is not stored.
    safe_n = tl.minimum(rows_n, n - 1).to(tl.int64)
    at = tl.arange(0, HALF)
    columns = at // 32 * 64 + at % 32 if IN_ORDER else fragment_columns(HALF)
    x_at = x + rows_m.to(tl.int64)[None, :] * stride_x + columns[:, None]
    w_at = safe_n[:, None] * stride_w + tl.arange(0, UNITS)[None, :]
    s_at = scale + safe_n * stride_s
    inside = (rows_m < m)[None, :]
    none = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(split, tl.cdiv(k, BLOCK_K), SPLIT_K):
        start = block * BLOCK_K
        x_lo = tl.load(x_at + start, mask=inside, other=0.0)
        if GROUP == 32:
            # K is a multiple of 32: the high plane of the last chunk may be empty.
            x_hi = tl.load(x_at + (start + 32), mask=inside & (columns[:, None] < k - start - 32), other=0.0)
        else:
            x_hi = tl.load(x_at + (start + 32), mask=inside, other=0.0)
        lo, hi = _operands(w + (w_at + block * UNITS), KIND, FAST)
        group = start // GROUP
        factor = tl.load(s_at + group)
        if zero is not None:
            z = tl.load(zero + safe_n * stride_s + group).to(KIND)
            lo -= z[:, None]
        if residual is not None:
            r_lo, r_hi = _operands(residual + (w_at + block * UNITS), KIND, FAST)
            lo = lo * NESTED + r_lo
        if SCALED:
            lo *= factor.to(KIND)[:, None]
            acc = tl.dot(lo, x_lo, acc)
        else:
            sums = tl.dot(lo, x_lo, none, out_dtype=SUM)
        if GROUP == 32:
            # Each plane of a chunk is a group.
            if not SCALED:
                acc += sums.to(tl.float32) * factor[:, None]
            group = tl.minimum(group + 1, stride_s - 1)
            factor = tl.load(s_at + group)
            if zero is not None:
                z = tl.load(zero + safe_n * stride_s + group).to(KIND)
            sums = none
        if zero is not None:
            hi -= z[:, None]
        if residual is not None:
            hi = hi * NESTED + r_hi
        if SCALED:
            hi *= factor.to(KIND)[:, None]
            acc = tl.dot(hi, x_hi, acc)
        else:
            sums = tl.dot(hi, x_hi, sums, out_dtype=SUM)
            acc += sums.to(tl.float32) * factor[:, None]
    if KIND == tl.int8:
        acc *= FACTOR_INT8
    elif KIND == tl.float8e4nv:
        if split == 0:
            acc -= _offset(x_sums, s_at, m, rows_m, stride_s, BLOCK_M, BLOCK_N)
        acc *= FACTOR_FP8
    if residual is not None:
        acc *= 1.0 / NESTED
    finish_tile(
        acc, out, x_scale, None, bias, workspace, counters, rows_m, rows_n, m, n, stride_o, 1, tile, split,
        BLOCK_M, BLOCK_N, True, SPLIT_K,
    )  # fmt: skip


@triton.jit
def sums_kernel(x, out, m, k, stride_x, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """out [k / GROUP, m] = sums of x [m, k] over groups of columns."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    at = x + rows.to(tl.int64)[:, None] * stride_x + columns[None, :]
    values = tl.load(at, mask=(rows < m)[:, None], other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(1).to(tl.int64) * m + rows, tl.sum(values, 1), mask=rows < m)


@triton.jit
def dequantize_kernel(
    w, scale, zero, out, n, k, stride_w, stride_s, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Words [n, stride_w] as bytes -> out [n, k], scaled."""
    HALF: tl.constexpr = BLOCK_K // 2
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.program_id(1) * HALF + tl.arange(0, HALF)
    inside = (rows < n)[:, None] & (at < stride_w)[None, :]
    p = tl.load(w + rows.to(tl.int64)[:, None] * stride_w + at[None, :], mask=inside, other=0x88)
    columns = at // 32 * 64 + at % 32
    for plane in tl.static_range(2):
        column = columns + 32 * plane
        mask = (rows < n)[:, None] & (column < k)[None, :]
        groups = rows.to(tl.int64)[:, None] * stride_s + (column // GROUP)[None, :]
        code = ((p >> (4 * plane)) & 0xF).to(tl.int32) - 8
        if zero is not None:
            code -= tl.load(zero + groups, mask=mask, other=0).to(tl.int32)
        value = code.to(tl.float32) * tl.load(scale + groups, mask=mask, other=0.0)
        tl.store(out + rows.to(tl.int64)[:, None] * k + column[None, :], value.to(out.dtype.element_ty), mask=mask)
