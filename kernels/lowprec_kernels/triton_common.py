"""What the Triton kernels share: the order of tiles, and the end of a tile (splits, scales, bias, masked store).

    y[m, n] = scale_m[m] * scale_n[n] * sum over splits of acc + bias[n]

A tile of sums is [BLOCK_M, BLOCK_N] (rows of x, rows of w) or, where the operands are swapped so that few rows of x
need not fill the tall side of a matrix instruction, its transpose [BLOCK_N, BLOCK_M]; memory holds rows of x first.

Split K: `SPLIT_K` blocks share a tile. Each writes its sums to a workspace [tile, split, BLOCK_M, BLOCK_N] and draws a
ticket from the tile's counter; who draws the last one adds the parts up in the order of the splits, so that the result
does not depend on who came last, finishes the tile and sets the counter back to zero. One launch, nothing to clear
between calls. (CUTLASS's semaphore makes the blocks wait for each other; here none waits.)

The counters of a device are shared by all launches, so launches that split K must not run at the same time on two
streams of one device. They are zeroed once, at first use, which must not fall into the capture of a CUDA graph.

Left out: other reductions of the splits (atomic additions to the output: not deterministic, and it must be cleared).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec_kernels.tuning import Config

MOST_SPLIT_TILES = 1 << 16
# Major compute capability of sm_90, and the warps that one of its matrix instructions takes.
HOPPER = 9
WARPGROUP = 4


def on_nvidia(x: Tensor) -> bool:
    """Whether kernels on x may hold inline PTX (not on AMD, not in the interpreter)."""
    return x.is_cuda and torch.version.hip is None


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device multiplies with wgmma; the interpreter stands in for one that does."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == HOPPER


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: makes it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def counters(device: torch.device) -> Tensor:
    """[MOST_SPLIT_TILES] int32 zeros, which every kernel leaves as zeros.

    Raises:
        RuntimeError: first use while a CUDA graph is captured, whose zeroing would only run when it is replayed.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("call this kernel once before capturing a CUDA graph: its counters are not there yet")
    return torch.zeros(MOST_SPLIT_TILES, dtype=torch.int32, device=device)


def split_buffers(x: Tensor, tiles: int, config: Config, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Workspace [tiles, split_k, block_m, block_n] of `dtype` and counters for `finish_tile`; None where split_k is 1.

    Raises:
        ValueError: more tiles than there are counters (so many tiles fill any device without a split).
    """
    if config.split_k == 1:
        return None, None
    if tiles > MOST_SPLIT_TILES:
        raise ValueError(f"split_k = {config.split_k} with {tiles} tiles, at most {MOST_SPLIT_TILES}: use split_k = 1")
    size = tiles * config.split_k * config.block_m * config.block_n
    return torch.empty(size, dtype=dtype, device=x.device), counters(x.device)


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Linear number -> (tile of rows of x, tile of rows of w): GROUP_M tiles of rows walk along w together."""
    width = GROUP_M * tiles_n
    first = (pid // width) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = pid % width
    return first + within % height, within // height


@triton.jit
def across(vector_m, vector_n, SWAPPED: tl.constexpr):
    """[BLOCK_M], [BLOCK_N] -> both as columns and rows that broadcast to a tile of sums."""
    return (vector_m[None, :], vector_n[:, None]) if SWAPPED else (vector_m[:, None], vector_n[None, :])


@triton.jit
def scale_and_store(acc, out, scale_m, scale_n, bias, rows_m, rows_n, m, n, stride_m, stride_n, SWAPPED: tl.constexpr):
    """Writes a tile of finished sums to out [m, n]; scale_m, scale_n, bias are contiguous or None."""
    inside_m = rows_m < m
    inside_n = rows_n < n
    y = acc.to(tl.float32)
    if scale_m is not None:
        factors = tl.load(scale_m + rows_m, mask=inside_m, other=0.0)
        factors, _ = across(factors, rows_n, SWAPPED)
        y *= factors
    if scale_n is not None:
        factors = tl.load(scale_n + rows_n, mask=inside_n, other=0.0)
        _, factors = across(rows_m, factors, SWAPPED)
        y *= factors
    if bias is not None:
        terms = tl.load(bias + rows_n, mask=inside_n, other=0.0).to(tl.float32)
        _, terms = across(rows_m, terms, SWAPPED)
        y += terms
    # A product of a row's number and the row stride may pass 2^31.
    at_m, at_n = across(rows_m.to(tl.int64) * stride_m, rows_n.to(tl.int64) * stride_n, SWAPPED)
    mask_m, mask_n = across(inside_m, inside_n, SWAPPED)
    tl.store(out + at_m + at_n, y.to(out.dtype.element_ty), mask=mask_m & mask_n)


@triton.jit
def finish_tile(
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
    stride_m,
    stride_n,
    tile,
    split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SWAPPED: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Ends a tile: acc is this split's sums, float32 or int32 like the workspace.

    rows_m [BLOCK_M], rows_n [BLOCK_N] int32: rows and columns of out, in memory where below m and n. `tile` is the
    tile's number among all, `split` in [0, SPLIT_K). Every one of the SPLIT_K blocks must come here, once.
    """
    if SPLIT_K == 1:
        scale_and_store(acc, out, scale_m, scale_n, bias, rows_m, rows_n, m, n, stride_m, stride_n, SWAPPED)
    else:
        in_m, in_n = across(tl.arange(0, BLOCK_M) * BLOCK_N, tl.arange(0, BLOCK_N), SWAPPED)
        mask_m, mask_n = across(rows_m < m, rows_n < n, SWAPPED)
        mask = mask_m & mask_n
        parts = workspace + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N) + in_m + in_n
        tl.store(parts + split * (BLOCK_M * BLOCK_N), acc, mask=mask)
        # The ticket is drawn by one thread: those of the other threads must have been written before it.
        tl.debug_barrier()
        ticket = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if ticket == SPLIT_K - 1:
            # Unrolled, so that the loads of all parts are under way together; .cg: other blocks wrote them.
            total = tl.load(parts, mask=mask, other=0, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT_K):
                total += tl.load(parts + other * (BLOCK_M * BLOCK_N), mask=mask, other=0, cache_modifier=".cg")
            scale_and_store(total, out, scale_m, scale_n, bias, rows_m, rows_n, m, n, stride_m, stride_n, SWAPPED)
            tl.store(counters + tile, 0)
