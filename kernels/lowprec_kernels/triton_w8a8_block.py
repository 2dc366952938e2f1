"""W8A8-FP8 with block scales on a GPU: 1 x 128 blocks of x, 128 x 128 blocks of w (DeepSeek-V3, arXiv 2412.19437, 3.3).

    y[m, n] = sum_b x_scale[m, b] * w_scale[n / 128, b] * (sum_{k in block b} x_codes[m, k] * w_codes[n, k]) + bias[n]

One step of the loop over K is one block of 128: its product starts from zero, and its sums are promoted, that is scaled
and added to a float32 accumulator by ordinary arithmetic. So the about 14 bits that sm_90's QGMMA keeps while adding
matter within 128 products only, and cost the accumulators twice over in registers: 128 x 128 takes 8 warps.

Operands as in `triton_w8a8.py` (both K-major), x_scale [M, ceil(K/128)] and w_scale [ceil(N/128), ceil(K/128)] float32
of any strides (an x_scale stored with M contiguous is read in fewer transactions); the last blocks may be partial. The
forms are those of `triton_w8a8.py`. Before sm_89 there is no E4M3; gfx942 multiplies it as fp16.

Left out: 256 columns in one tile (its sums and products together spill); two groups of warps, of which one promotes
while the other multiplies (DeepGEMM): Triton's way to specialise warps gives wrong sums (`triton_w8a8.py`).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec_kernels.triton_common import finish_tile, on_device, split_buffers, tile_of
from lowprec_kernels.triton_w8a8 import code_tile
from lowprec_kernels.triton_w8a8_forms import (
    FP8_BLOCK,
    choose,
    descriptors,
    fp8_reason,
    k_major,
    persistent_programs,
)
from lowprec_kernels.tuning import Config

SCALE_BLOCK = 128


@triton.jit
def _pointer_kernel(
    x,
    w,
    out,
    scale_x,
    scale_w,
    bias,
    workspace,
    counters,
    m,
    n,
    k,
    stride_x,
    stride_w,
    stride_scale_xm,
    stride_scale_xk,
    stride_scale_wn,
    stride_scale_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """x [m, k], w [n, k] codes -> out [m, n] contiguous; grid (tiles, SPLIT_K). BLOCK_K is 128, BLOCK_N divides it."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tile_m, tile_n = tile_of(tile, tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K)
    first = split * steps
    columns = first * BLOCK_K + tl.arange(0, BLOCK_K)
    # Rows past the end wrap around: they cost nothing, are never stored, and the loads need no mask for them.
    inside_m = rows_m % m
    x_at = x + inside_m.to(tl.int64)[:, None] * stride_x + columns[None, :]
    w_at = w + (rows_n % n).to(tl.int64)[:, None] * stride_w + columns[None, :]
    scale_x_at = scale_x + inside_m.to(tl.int64) * stride_scale_xm + first * stride_scale_xk
    scale_w_at = scale_w + (tile_n * BLOCK_N // BLOCK_K) * stride_scale_wn + first * stride_scale_wk
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    last = tl.minimum(first + steps, tl.cdiv(k, BLOCK_K))
    if first < last:
        factors = tl.load(scale_x_at)
        factor = tl.load(scale_w_at)
    else:
        factors = tl.zeros((BLOCK_M,), dtype=tl.float32)
        factor = 0.0
    for step in range(first, last):
        # The scales of the next block are asked for a whole step before their use.
        ahead = tl.minimum(step + 1, last - 1) - first
        next_factors = tl.load(scale_x_at + ahead * stride_scale_xk)
        next_factor = tl.load(scale_w_at + ahead * stride_scale_wk)
        x_tile = code_tile(x_at, k - step * BLOCK_K, BLOCK_K, WHOLE_K)
        w_tile = code_tile(w_at, k - step * BLOCK_K, BLOCK_K, WHOLE_K)
        if SWAPPED:
            acc += tl.dot(w_tile, tl.trans(x_tile)) * (factors * factor)[None, :]
        else:
            acc += tl.dot(x_tile, tl.trans(w_tile)) * (factors * factor)[:, None]
        factors = next_factors
        factor = next_factor
        x_at += BLOCK_K
        w_at += BLOCK_K
    finish_tile(
        acc,
        out,
        None,
        None,
        bias,
        workspace,
        counters,
        rows_m,
        rows_n,
        m,
        n,
        n,
        1,
        tile,
        split,
        BLOCK_M,
        BLOCK_N,
        SWAPPED,
        SPLIT_K,
    )


@triton.jit
def _tma_kernel(
    x,
    w,
    out,
    scale_x,
    scale_w,
    bias,
    m,
    n,
    k,
    stride_scale_xm,
    stride_scale_xk,
    stride_scale_wn,
    stride_scale_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Descriptors of x [m, k], w [n, k] codes and out [m, n]; see `triton_w8a8`."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    steps = tl.cdiv(k, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        rows_m = tl.minimum(row + tl.arange(0, BLOCK_M), m - 1)
        scale_x_at = scale_x + rows_m.to(tl.int64) * stride_scale_xm
        scale_w_at = scale_w + (column // BLOCK_K) * stride_scale_wn
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        factors = tl.load(scale_x_at)
        factor = tl.load(scale_w_at)
        for step in range(steps):
            # The scales of the next block are asked for a whole step before their use.
            ahead = tl.minimum(step + 1, steps - 1)
            next_factors = tl.load(scale_x_at + ahead * stride_scale_xk)
            next_factor = tl.load(scale_w_at + ahead * stride_scale_wk)
            part = tl.dot(x.load([row, step * BLOCK_K]), tl.trans(w.load([column, step * BLOCK_K])))
            acc += part * (factors * factor)[:, None]
            factors = next_factors
            factor = next_factor
        if bias is not None:
            rows_n = column + tl.arange(0, BLOCK_N)
            acc += tl.load(bias + rows_n, mask=rows_n < n, other=0.0).to(tl.float32)[None, :]
        out.store([row, column], acc.to(out.dtype))


def w8a8_fp8_block_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """[M, K] e4m3, [M, ceil(K/128)], [N, K] e4m3, [ceil(N/128), ceil(K/128)], [N] or None -> [M, N] `out_dtype`.

    Raises:
        ValueError: `config` cannot run, or the device has no E4M3.
    """
    reason = fp8_reason(x_codes)
    if reason is not None:
        raise ValueError(reason)
    (m, k), n = x_codes.shape, w_codes.shape[0]
    out = x_codes.new_empty((m, n), dtype=out_dtype)
    if out.numel() == 0:
        return out
    x, w = k_major(x_codes), k_major(w_codes)
    config = choose(FP8_BLOCK, x, w, out, config, SCALE_BLOCK)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    vectors = x_scale, w_scale, bias if bias is None else bias.contiguous()
    strides = *x_scale.stride(), *w_scale.stride()
    shared: dict[str, Any] = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    with on_device(x):
        if config.form == "tma":
            operands = descriptors(x, w, out, config, config.block_n)
            programs = persistent_programs(x, tiles, config, FP8_BLOCK.tma.shared_bytes(config))
            _tma_kernel[(programs,)](*operands, *vectors, m, n, k, *strides, **shared)
        else:
            workspace, counters = split_buffers(x, tiles, config, torch.float32)
            _pointer_kernel[tiles, config.split_k](
                x,
                w,
                out,
                *vectors,
                workspace,
                counters,
                m,
                n,
                k,
                x.stride(0),
                w.stride(0),
                *strides,
                SPLIT_K=config.split_k,
                SWAPPED=config.form == "swap",
                WHOLE_K=k % config.block_k == 0,
                **shared,
            )
    return out
