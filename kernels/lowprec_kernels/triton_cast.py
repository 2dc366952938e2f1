"""Casts of activations to int8 and fp8 with what comes before them in a transformer block, in one pass over memory.

    s_t = max(max_k |v_tk| / q, 1e-12),  codes = round(v / s_t)          q = 127 (int8), 448 (fp8 e4m3)

v is x itself, or one of (each step rounded to x's dtype, as torch rounds there)

    norm       weight * round(x / sqrt(mean_k x^2 + eps))                transformers' LlamaRMSNorm
    add_norm   the same of r = round(x + residual); r is written too     the residual stream of the next layer
    silu       round(silu(gate)) * up,  x = gate|up [M, 2K]              a gated MLP before its last matrix

A scale belongs to a row, or to 1 x `block` columns of it (DeepSeek-V3, arXiv 2412.19437, section 3.3). Group sums, for
weights with zero points, are sums of the *codes*: sum_k xc_k (wc_k - z) = sum_k xc_k wc_k - z sum_k xc_k, and the
row's scale is applied by who multiplies. In int8 they are exact.

A program holds a few whole rows in registers (K <= 16384); longer rows are read again from cache for each reduction.
Plain casts give `reference.py`'s codes bit for bit: the quotient is divided, not multiplied by a reciprocal, which
rounds twice and moves values that lie halfway between two codes. Row sums and exp of the fused forms round differently
from torch's in the last bit of float32. A row (block) that is not finite has the scale NaN and the codes 0.

Left out: static scales (one elementwise expression), e4m3 below sm_89 (no conversion instruction), e5m2.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec_kernels.kernel import ActivationKind
from lowprec_kernels.reference import FP8_MAX, INT8_MAX
from lowprec_kernels.triton_common import on_device
from lowprec_kernels.tuning import Config, Family, Problem, config_for

Prologue = Literal["plain", "norm", "add_norm", "silu"]
CODES: dict[ActivationKind, tuple[torch.dtype, float]] = {
    "int8": (torch.int8, INT8_MAX),
    "fp8": (torch.float8_e4m3fn, FP8_MAX),
}
MOST_IN_REGISTERS = 16384
# 1.5 * 2^23: adding it rounds |v| < 2^22 half to even, and leaves the integer in the low bits.
ROUNDER = tl.constexpr(12582912.0)
INFINITE_BITS = tl.constexpr(0x7F800000)
TINY_SCALE = tl.constexpr(1e-12)


class Quantized(NamedTuple):
    """codes [M, K] int8 or e4m3fn, scale [M, blocks] float32, the sum with the residual, and [M, K/G] float32 sums."""

    codes: Tensor
    scale: Tensor
    residual: Tensor | None
    group_sums: Tensor | None


@triton.jit
def quotient(values, scale, FUSED: tl.constexpr):
    """values / scale, rounded correctly where the result decides about a code.

    One reciprocal a row, then two corrections: the first leaves an error below one unit in the last place, the second
    rounds correctly by Markstein's theorem (IBM J. Res. Dev. 34, 1990). 5 instructions instead of the 10 and a branch
    of a division. The theorem wants remainders that do not underflow: they do only far below the smallest code.
    FUSED: whether tl.fma rounds once (not so in the interpreter).
    """
    if FUSED:
        reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        reciprocal = tl.broadcast_to(reciprocal, values.shape)
        divisor = tl.broadcast_to(scale, values.shape)
        result = values * reciprocal
        for _ in tl.static_range(2):
            result = tl.fma(tl.fma(-result, divisor, values), reciprocal, result)
    else:
        result = tl.div_rn(values, tl.broadcast_to(scale, values.shape))
    return result


@triton.jit
def magnitude_bits(values, AXIS: tl.constexpr):
    """The largest |value| as the bits of a float32: as integers they are ordered alike, NaN above infinity."""
    return tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=AXIS)


@triton.jit
def scale_of(bits, LARGEST: tl.constexpr):
    """Bits of the largest magnitude -> scale, NaN where they are not finite."""
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full(bits.shape, LARGEST, tl.float32))
    return tl.where(bits < INFINITE_BITS, tl.maximum(scale, TINY_SCALE), float("nan"))


@triton.jit
def load_values(
    x, residual, summed, rows, columns, mask, k, stride_x, stride_residual, PROLOGUE: tl.constexpr, WRITE: tl.constexpr
):
    """[ROWS, BLOCK_K] float32: x, x + residual (written to `summed` if WRITE) or silu(gate) * up; 0 outside."""
    dtype: tl.constexpr = x.dtype.element_ty
    at = x + rows.to(tl.int64)[:, None] * stride_x + columns[None, :]
    values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if PROLOGUE == "silu":
        activated = (values / (1.0 + tl.exp(-values))).to(dtype).to(tl.float32)
        values = (activated * tl.load(at + k, mask=mask, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    if PROLOGUE == "add_norm":
        at = residual + rows.to(tl.int64)[:, None] * stride_residual + columns[None, :]
        total = (values + tl.load(at, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        if WRITE:
            tl.store(summed + rows.to(tl.int64)[:, None] * k + columns[None, :], total, mask=mask)
        values = total.to(tl.float32)
    return values


@triton.jit
def norm(values, squares, weight, columns, k, eps, dtype: tl.constexpr):
    """[ROWS, BLOCK_K], sums of squares [ROWS] -> weight * round(values / rms), rounded to dtype, as float32."""
    normed = (values * tl.rsqrt(squares / k + eps)[:, None]).to(dtype).to(tl.float32)
    # Loaded as a matrix of one row: it then lies across the threads as the values do.
    factors = tl.load(weight + columns[None, :], mask=(columns < k)[None, :], other=0.0).to(tl.float32)
    return (normed * factors).to(dtype).to(tl.float32)


@triton.jit
def store_codes(
    values,
    row_bits,
    codes,
    scale,
    group_sums,
    rows,
    start,
    m,
    k,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Quantises [ROWS, BLOCK_K] values that begin at column `start`; BLOCK 0: by the rows' `row_bits`."""
    ROWS: tl.constexpr = values.shape[0]
    BLOCK_K: tl.constexpr = values.shape[1]
    COUNT: tl.constexpr = 1 if BLOCK == 0 else BLOCK_K // BLOCK
    blocked = tl.reshape(values, [ROWS, COUNT, BLOCK_K // COUNT])
    bits = row_bits[:, None] if BLOCK == 0 else magnitude_bits(blocked, 2)
    scales = scale_of(bits, LARGEST)
    result = tl.where((bits < INFINITE_BITS)[:, :, None], quotient(blocked, scales[:, :, None], FUSED), 0.0)
    result = tl.reshape(result, [ROWS, BLOCK_K])
    # In both formats values round to at most LARGEST without a clamp: quotients exceed it by 2^-23 of it at the most.
    whole = (result + ROUNDER).to(tl.int32, bitcast=True)
    result = whole.to(tl.int8) if LARGEST == 127.0 else result.to(tl.float8e4nv)

    rows_64 = rows.to(tl.int64)[:, None]
    columns = start + tl.arange(0, BLOCK_K)
    inside = (rows < m)[:, None]
    tl.store(codes + rows_64 * k + columns[None, :], result, mask=inside & (columns < k)[None, :])
    blocks = 1 if BLOCK == 0 else tl.cdiv(k, BLOCK)
    at = (0 if BLOCK == 0 else start // BLOCK) + tl.arange(0, COUNT)[None, :]
    tl.store(scale + rows_64 * blocks + at, scales, mask=inside & (at < blocks))
    if GROUP > 0:
        sums = tl.sum(tl.reshape(result.to(tl.float32), [ROWS, BLOCK_K // GROUP, GROUP]), axis=2)
        at = start // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
        tl.store(group_sums + rows_64 * (k // GROUP) + at, sums, mask=inside & (at < k // GROUP))


@triton.jit
def cast_kernel(
    x,
    residual,
    weight,
    codes,
    scale,
    summed,
    group_sums,
    m,
    k,
    stride_x,
    stride_residual,
    eps,
    PROLOGUE: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_PASS: tl.constexpr,
    FUSED: tl.constexpr,
):
    """ROWS rows of x, in chunks of BLOCK_K columns (one if ONE_PASS); BLOCK, GROUP: 0 for none."""
    NORMED: tl.constexpr = PROLOGUE == "norm" or PROLOGUE == "add_norm"
    dtype: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    span = tl.arange(0, BLOCK_K)
    squares = tl.zeros([ROWS], tl.float32)
    bits = tl.zeros([ROWS], tl.int32)
    if ONE_PASS:
        mask = (rows < m)[:, None] & (span < k)[None, :]
        values = load_values(x, residual, summed, rows, span, mask, k, stride_x, stride_residual, PROLOGUE, True)
        if NORMED:
            values = norm(values, tl.sum(values * values, axis=1), weight, span, k, eps, dtype)
        if BLOCK == 0:
            bits = magnitude_bits(values, 1)
        store_codes(values, bits, codes, scale, group_sums, rows, 0, m, k, LARGEST, BLOCK, GROUP, FUSED)
    else:
        if NORMED:
            for start in range(0, k, BLOCK_K):
                columns = start + span
                mask = (rows < m)[:, None] & (columns < k)[None, :]
                values = load_values(
                    x, residual, summed, rows, columns, mask, k, stride_x, stride_residual, PROLOGUE, True
                )
                squares += tl.sum(values * values, axis=1)
        if BLOCK == 0:
            for start in range(0, k, BLOCK_K):
                columns = start + span
                mask = (rows < m)[:, None] & (columns < k)[None, :]
                values = load_values(
                    x, residual, summed, rows, columns, mask, k, stride_x, stride_residual, PROLOGUE, False
                )
                if NORMED:
                    values = norm(values, squares, weight, columns, k, eps, dtype)
                bits = tl.maximum(bits, magnitude_bits(values, 1))
        for start in range(0, k, BLOCK_K):
            columns = start + span
            mask = (rows < m)[:, None] & (columns < k)[None, :]
            values = load_values(
                x, residual, summed, rows, columns, mask, k, stride_x, stride_residual, PROLOGUE, False
            )
            if NORMED:
                values = norm(values, squares, weight, columns, k, eps, dtype)
            store_codes(values, bits, codes, scale, group_sums, rows, start, m, k, LARGEST, BLOCK, GROUP, FUSED)


def _candidates(problem: Problem) -> tuple[Config, ...]:
    """Whole rows in registers, 32 values a thread at first: at 64 registers the device still holds all its threads."""
    block_k = min(MOST_IN_REGISTERS, max(256, triton.next_power_of_2(problem.k)))
    rows = max(1, 4096 // block_k)
    found = []
    for values in (32, 16, 64):
        for factor in (1, 2):
            warps = rows * factor * block_k // (32 * values)
            if 1 <= warps <= 16:
                found.append(Config(block_m=rows * factor, block_n=1, block_k=block_k, warps=warps, stages=1))
    return tuple(found)


FAMILY = Family(name="cast", candidates=_candidates, bytes_x=0, bytes_w=0)
FAMILIES = (FAMILY,)


def _check(
    x: Tensor, k: int, weight: Tensor | None, residual: Tensor | None, block: int | None, group_size: int | None
) -> None:
    if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or k == 0:
        raise ValueError(f"x must be a bfloat16, float16 or float32 matrix [M, K], not {x.dtype} {tuple(x.shape)}")
    if weight is not None and (tuple(weight.shape) != (k,) or weight.dtype != x.dtype):
        raise ValueError(f"the norm's weight must be [{k}] {x.dtype}, not {weight.dtype} {tuple(weight.shape)}")
    if residual is not None and (weight is None or residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"a residual comes before a norm and must be {x.dtype} {tuple(x.shape)} like x")
    for name, size in (("block", block), ("group_size", group_size)):
        if size is not None and (not 16 <= size <= 256 or size & (size - 1)):
            raise ValueError(f"{name} must be 16, 32, 64, 128 or 256 columns, not {size}")
    if group_size is not None and k % group_size:
        raise ValueError(f"K = {k} is not made of groups of {group_size}")


def quantize(
    x: Tensor,
    kind: ActivationKind,
    *,
    block: int | None = None,
    group_size: int | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    silu: bool = False,
    config: Config | None = None,
) -> Quantized:
    """x [M, K], or [M, 2K] for silu, of any strides -> codes [M, K] with their scales.

    Args:
        kind: format of the codes.
        block: columns that share a scale; None for the whole row.
        group_size: columns whose codes are summed; None for no sums.
        norm_weight: [K] in x's dtype: RMS norm with `eps` first.
        residual: [M, K] in x's dtype: added to x before the norm; the sum is returned.
        silu: multiply silu of the left half of x by its right half first.

    Raises:
        ValueError: shapes, dtypes or a combination that there is no kernel for.
    """
    if silu and (norm_weight is not None or x.shape[-1] % 2):
        raise ValueError(f"silu takes x = gate|up [M, 2K] and no norm, x is {tuple(x.shape)}")
    m, k = x.shape[0], x.shape[-1] // (2 if silu else 1)
    _check(x, k, norm_weight, residual, block, group_size)
    prologue: Prologue = (
        "silu" if silu else "plain" if norm_weight is None else "norm" if residual is None else "add_norm"
    )
    dtype, largest = CODES[kind]
    found = Quantized(
        codes=x.new_empty((m, k), dtype=dtype),
        scale=x.new_empty((m, 1 if block is None else triton.cdiv(k, block)), dtype=torch.float32),
        residual=None if residual is None else x.new_empty((m, k)),
        group_sums=None if group_size is None else x.new_empty((m, k // group_size), dtype=torch.float32),
    )
    if m == 0:
        return found
    config = config or config_for(FAMILY, Problem(m=m, n=1, k=k), x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    with on_device(x):
        cast_kernel[(triton.cdiv(m, config.block_m),)](
            x,
            residual,
            None if norm_weight is None else norm_weight.contiguous(),
            found.codes,
            found.scale,
            found.residual,
            found.group_sums,
            m,
            k,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            PROLOGUE=prologue,
            LARGEST=largest,
            BLOCK=block or 0,
            GROUP=group_size or 0,
            ROWS=config.block_m,
            BLOCK_K=config.block_k,
            ONE_PASS=k <= config.block_k,
            FUSED=x.is_cuda,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return found


def quantize_per_token_int8(x: Tensor, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K] float -> codes [M, K] int8 in [-127, 127], scale [M, 1] float32."""
    found = quantize(x, "int8", config=config)
    return found.codes, found.scale


def quantize_per_token_fp8(x: Tensor, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K] float -> codes [M, K] float8_e4m3fn in [-448, 448], scale [M, 1] float32."""
    found = quantize(x, "fp8", config=config)
    return found.codes, found.scale


def quantize_per_block_fp8(x: Tensor, block: int = 128, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K] float -> codes [M, K] float8_e4m3fn, scale [M, ceil(K / block)] float32."""
    found = quantize(x, "fp8", block=block, config=config)
    return found.codes, found.scale
