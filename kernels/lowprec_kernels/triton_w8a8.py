"""W8A8 on a GPU: INT8 or E4M3 codes times codes of the same kind, one scale per row of x and one per row of w.

    y[m, n] = x_scale[m] * w_scale[n] * sum_k x_codes[m, k] * w_codes[n, k] + bias[n]

Both operands are K-major (x [M, K], w [N, K], K contiguous), which the 8-bit matrix instructions of sm_90 want. INT8
sums are int32 and exact. E4M3 sums are float32, but sm_90's QGMMA keeps about 14 bits while it adds (DeepSeek-V3,
arXiv 2412.19437, section 3.3.2), so a long sum is off by about 1e-3 of its terms' size; the block format, whose sums
are promoted every 128 products (`triton_w8a8_block.py`), does not lose them.

Forms (`Config.form`):

| form | loads | tiles | for |
|---|---|---|---|
| pointer | plain, masked edges | one per block, `group_m` rows of tiles side by side; `split_k` | anything |
| swap | plain | the same, with w as the tall side of the product: sum = w x^T | M <= 64 |
| tma | tensor descriptors | persistent, the loads of the next tile run under the end of the last | large M |

Why swap: the matrix instructions of sm_90 are 64 tall; a tile with fewer rows of x would fall back to fp16 arithmetic,
while as the other side x may have any multiple of 8 rows. Why split: at M <= 64 there are fewer tiles than processors,
and the weights must stream at the rate of memory. TMA needs sm_90 and rows that begin at multiples of 16 bytes: without
a `config` the launcher takes the family `-pointer` where `tma_reason` names an obstacle; a `config` that cannot run is
an error. Persistent tiles and the split epilogue: Triton's tutorial 09 (persistent matmul); results are stored in two
halves, since those of a whole tile would take the shared memory of a pipeline stage.

On gfx942, whose own 8-bit float is e4m3fnuz, E4M3 is multiplied as fp16: right and slow. Before sm_89 there is no E4M3.
A single scale is read with stride 0 for E4M3; for INT8, whose splits are scaled at their end, it is repeated by a copy.

Left out: M = 1 without matrix instructions (memory bound either way); float32 results by descriptors; warps that
specialise in loading or multiplying, since `tl.range(warp_specialize=True)` of Triton 3.6.0 gave wrong sums on an H100
at ragged shapes.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec_kernels.triton_common import across, finish_tile, on_device, split_buffers, tile_of
from lowprec_kernels.triton_w8a8_forms import (
    FP8,
    INT8,
    Families,
    choose,
    descriptors,
    fp8_reason,
    k_major,
    persistent_programs,
)
from lowprec_kernels.tuning import Config


@triton.jit
def code_tile(pointers, left, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr):
    """Codes [rows, BLOCK_K] at `pointers`, zeros from column `left` on."""
    mask = None if WHOLE_K else tl.arange(0, BLOCK_K)[None, :] < left
    return tl.load(pointers, mask=mask, other=None if WHOLE_K else 0.0)


@triton.jit
def scaled(
    acc, scale_m, scale_n, rows_m, rows_n, m, n, STEP_M: tl.constexpr, STEP_N: tl.constexpr, SWAPPED: tl.constexpr
):
    """A tile of sums times its scales, float32; STEP 0 reads one scale for all rows."""
    factors_m = tl.load(scale_m + rows_m * STEP_M, mask=rows_m < m, other=0.0)
    factors_n = tl.load(scale_n + rows_n * STEP_N, mask=rows_n < n, other=0.0)
    factors_m, factors_n = across(factors_m, factors_n, SWAPPED)
    return acc.to(tl.float32) * factors_m * factors_n


@triton.jit
def _pointer_kernel(
    x,
    w,
    out,
    scale_m,
    scale_n,
    bias,
    workspace,
    counters,
    m,
    n,
    k,
    stride_x,
    stride_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    WHOLE_K: tl.constexpr,
    STEP_M: tl.constexpr,
    STEP_N: tl.constexpr,
    EXACT: tl.constexpr,
):
    """x [m, k], w [n, k] codes -> out [m, n] contiguous; grid (tiles, SPLIT_K)."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tile_m, tile_n = tile_of(tile, tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K)
    first = split * steps
    columns = first * BLOCK_K + tl.arange(0, BLOCK_K)
    # Rows past the end wrap around: they cost nothing, are never stored, and the loads need no mask for them.
    x_at = x + (rows_m % m).to(tl.int64)[:, None] * stride_x + columns[None, :]
    w_at = w + (rows_n % n).to(tl.int64)[:, None] * stride_w + columns[None, :]
    SUM: tl.constexpr = tl.int32 if EXACT else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), dtype=SUM)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(k, BLOCK_K))):
        x_tile = code_tile(x_at, k - step * BLOCK_K, BLOCK_K, WHOLE_K)
        w_tile = code_tile(w_at, k - step * BLOCK_K, BLOCK_K, WHOLE_K)
        if SWAPPED:
            acc = tl.dot(w_tile, tl.trans(x_tile), acc, out_dtype=SUM)
        else:
            acc = tl.dot(x_tile, tl.trans(w_tile), acc, out_dtype=SUM)
        x_at += BLOCK_K
        w_at += BLOCK_K
    # Float sums may be scaled before the splits are added; integer ones stay exact until then.
    if not EXACT:
        acc = scaled(acc, scale_m, scale_n, rows_m, rows_n, m, n, STEP_M, STEP_N, SWAPPED)
        scale_m = None
        scale_n = None
    finish_tile(
        acc,
        out,
        scale_m,
        scale_n,
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
def _store_by_tma(
    acc, out, scale_m, scale_n, bias, row, column, m, n, WIDTH: tl.constexpr, STEP_M: tl.constexpr, STEP_N: tl.constexpr
):
    """Scales acc [BLOCK_M, WIDTH] and stores it at (row, column) of the descriptor `out`, which clips the edges."""
    rows_m = row + tl.arange(0, acc.shape[0])
    rows_n = column + tl.arange(0, WIDTH)
    y = scaled(acc, scale_m, scale_n, rows_m, rows_n, m, n, STEP_M, STEP_N, False)
    if bias is not None:
        y += tl.load(bias + rows_n, mask=rows_n < n, other=0.0).to(tl.float32)[None, :]
    out.store([row, column], y.to(out.dtype))


@triton.jit
def _tma_kernel(
    x,
    w,
    out,
    scale_m,
    scale_n,
    bias,
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STEP_M: tl.constexpr,
    STEP_N: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Descriptors of x [m, k], w [n, k] codes and out [m, n], out's of half tiles."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    HALF: tl.constexpr = BLOCK_N // 2
    SUM: tl.constexpr = tl.int32 if EXACT else tl.float32
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
        for step in range(tl.cdiv(k, BLOCK_K)):
            x_tile = x.load([row, step * BLOCK_K])
            w_tile = w.load([column, step * BLOCK_K])
            acc = tl.dot(x_tile, tl.trans(w_tile), acc, out_dtype=SUM)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _store_by_tma(left, out, scale_m, scale_n, bias, row, column, m, n, HALF, STEP_M, STEP_N)
        _store_by_tma(right, out, scale_m, scale_n, bias, row, column + HALF, m, n, HALF, STEP_M, STEP_N)


def _step(scale: Tensor, rows: int, exact: bool) -> tuple[Tensor, int]:
    """Scales [rows, 1] or [1, 1] -> memory to read them from, elements from one row's to the next (0 or 1).

    The end of a tile of exact (integer) sums takes one scale per row, so that a single one is repeated for it.
    """
    if scale.numel() == 1 and rows > 1 and not exact:
        return scale, 0
    return scale.expand(rows, 1).contiguous(), 1


def _gemm(
    families: Families,
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None,
) -> Tensor:
    (m, k), n = x.shape, w.shape[0]
    out = x.new_empty((m, n), dtype=out_dtype)
    if out.numel() == 0:
        return out
    x, w = k_major(x), k_major(w)
    config = choose(families, x, w, out, config)
    exact = x.dtype == torch.int8
    (scale_m, step_m), (scale_n, step_n) = _step(x_scale, m, exact), _step(w_scale, n, exact)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    shared: dict[str, Any] = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "STEP_M": step_m,
        "STEP_N": step_n,
        "EXACT": exact,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    vectors = scale_m, scale_n, bias if bias is None else bias.contiguous()
    with on_device(x):
        if config.form == "tma":
            operands = descriptors(x, w, out, config, config.block_n // 2)
            programs = persistent_programs(x, tiles, config, families.tma.shared_bytes(config))
            _tma_kernel[(programs,)](*operands, *vectors, m, n, k, **shared)
        else:
            workspace, counters = split_buffers(x, tiles, config, torch.int32 if exact else torch.float32)
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
                SPLIT_K=config.split_k,
                SWAPPED=config.form == "swap",
                WHOLE_K=k % config.block_k == 0,
                **shared,
            )
    return out


def w8a8_int8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """[M, K] int8, [M, 1], [N, K] int8, [N, 1], [N] or None -> [M, N] `out_dtype`.

    Raises:
        ValueError: `config` cannot run.
    """
    return _gemm(INT8, x_codes, x_scale, w_codes, w_scale, bias, out_dtype, config)


def w8a8_fp8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """[M, K] e4m3, [M, 1] or [1, 1], [N, K] e4m3, [N, 1] or [1, 1], [N] or None -> [M, N] `out_dtype`.

    Raises:
        ValueError: `config` cannot run, or the device has no E4M3.
    """
    reason = fp8_reason(x_codes)
    if reason is not None:
        raise ValueError(reason)
    return _gemm(FP8, x_codes, x_scale, w_codes, w_scale, bias, out_dtype, config)
