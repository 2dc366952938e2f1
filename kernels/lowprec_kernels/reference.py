"""The slow truth of every op: the plainest code that is right, on any device, by name in `REFERENCES`.

    quantize   s_t = max(max_k |x_tk| / q, 1e-12),  codes = round(x / s_t)             q = 127 (int8), 448 (fp8 e4m3)
               the same of norm(x), norm(x + residual) and silu(gate) * up; a block of columns may have its own scale
    w8a8       y = s_t s_n sum_k xc_tk wc_nk + b
    w8a8 block y = sum_c s_tc s_{n/128,c} sum_{k in c} xc_tk wc_nk + b                  c = k / 128, rounded down
    w8a16      y = s_n sum_k x_tk wc_nk + b
    w4a16      y = sum_g s_ng sum_{k in g} x_tk (wc_nk - z_ng) + b
    w4a8       y = s_t sum_g s_ng sum_{k in g} xc_tk wc_nk + b
    nested     level 4: w4a16 of the base; level 8: codes m_ng (wc_nk - z_ng) + r_nk, scales s_ng / m_ng

Sums over codes are done in float64, in which any sum of int8 products is exact, so the integer accumulators are those
of an int32 unit bit for bit (K < 133,000, where int32 itself would overflow). Everything is rounded once, at the end;
norms and silu alone are rounded where transformers' own layers round. Experts: `reference_moe.py`.

Values that are not finite: a row of x that holds NaN or infinity gets the scale NaN, so its whole output is NaN and
no other row is touched; a block with a scale of its own is marked alone, and with it the row's outputs. A fixed
(static) scale saturates infinity and has no way to mark NaN in int8: it becomes 0.
Sources: LLM.int8 (arXiv 2208.07339, eq. 3) for vector-wise scales; OCP OFP8 revision 1.0 for e4m3; DeepSeek-V3
(arXiv 2412.19437, section 3.3) for scales of blocks.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lowprec_kernels.packing import unpack_int4

INT8_MAX = 127.0
FP8_MAX = 448.0
TINY_SCALE = 1e-12
# Side of the blocks of columns, and of columns and rows of a weight, that share a scale in DeepSeek's FP8.
SCALE_BLOCK = 128
NESTED_LEVELS = (4, 8)


def per_token_scale(x: Tensor, largest: float) -> Tensor:
    """x [M, K] -> [M, 1] float32: max |x| / `largest`, at least 1e-12; NaN where the row is not finite."""
    amax = x.to(torch.float32).abs().amax(-1, keepdim=True)
    # A GPU divides by a number by multiplying with its reciprocal, and truly by a tensor.
    scale = (amax / torch.full_like(amax, largest)).clamp_min(TINY_SCALE)
    return torch.where(scale.isfinite(), scale, torch.nan)


def quantize_per_token_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] float -> codes [M, K] int8 in [-127, 127], scale [M, 1] float32."""
    scale = per_token_scale(x, INT8_MAX)
    codes = (x.to(torch.float32) / scale).round().clamp(-INT8_MAX, INT8_MAX)
    return codes.nan_to_num(0.0).to(torch.int8).contiguous(), scale


def quantize_per_token_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] float -> codes [M, K] float8_e4m3fn in [-448, 448], scale [M, 1] float32."""
    scale = per_token_scale(x, FP8_MAX)
    codes = (x.to(torch.float32) / scale).clamp(-FP8_MAX, FP8_MAX)
    return codes.nan_to_num(0.0).to(torch.float8_e4m3fn).contiguous(), scale


def quantize(x: Tensor, kind: str, block: int | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K] float -> codes [M, K], scale [M, ceil(K / block)] float32, or [M, 1] where `block` is None.

    Raises:
        ValueError: `kind` is neither "int8" nor "fp8".
    """
    casts = {"int8": quantize_per_token_int8, "fp8": quantize_per_token_fp8}
    if kind not in casts:
        raise ValueError(f"codes are int8 or fp8, not {kind}")
    if block is None:
        return casts[kind](x)
    m, k = x.shape
    blocks = -(-k // block)
    # Each block is a token of `block` values.
    codes, scale = casts[kind](torch.nn.functional.pad(x, (0, blocks * block - k)).reshape(m * blocks, block))
    # Slices are taken of bytes: torch has no copy of e4m3 on every device.
    whole = codes.view(torch.uint8).reshape(m, blocks * block)
    return whole[:, :k].contiguous().view(codes.dtype), scale.reshape(m, blocks)


def quantize_per_block_fp8(x: Tensor, block: int = SCALE_BLOCK) -> tuple[Tensor, Tensor]:
    """x [M, K] float -> codes [M, K] float8_e4m3fn, scale [M, ceil(K / block)] float32."""
    return quantize(x, "fp8", block)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [M, K], weight [K] -> [M, K] in x's dtype: transformers' LlamaRMSNorm, whose mean is taken in float32."""
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def silu_mul(x: Tensor) -> Tensor:
    """x = gate|up [M, 2K] -> silu(gate) * up [M, K]."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, kind: str, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """x [M, K], weight [K] -> codes [M, K] and scales of norm(x), as `quantize` gives them."""
    return quantize(rms_norm(x, weight, eps), kind, block)


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, kind: str, block: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [M, K], weight [K] -> codes [M, K] and scales of norm(x + residual), and x + residual [M, K]."""
    summed = (x + residual).contiguous()
    return *quantize(rms_norm(summed, weight, eps), kind, block), summed


def silu_mul_quantize(x: Tensor, kind: str, block: int | None = None) -> tuple[Tensor, Tensor]:
    """x = gate|up [M, 2K] -> codes [M, K] and scales of silu(gate) * up, as `quantize` gives them."""
    return quantize(silu_mul(x), kind, block)


def quantize_static(x: Tensor, scale: Tensor, kind: Literal["int8", "fp8"]) -> Tensor:
    """x [M, K] float, one calibrated scale -> codes [M, K] int8 or float8_e4m3fn, saturating; NaN becomes 0 in int8."""
    codes = x.to(torch.float32) / scale
    if kind == "int8":
        return codes.round().clamp(-INT8_MAX, INT8_MAX).nan_to_num(0.0).to(torch.int8)
    return codes.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def accumulate_int8(x_codes: Tensor, w_codes: Tensor) -> Tensor:
    """x_codes [M, K], w_codes [N, K] int8 -> [M, N] int32, exact."""
    return (x_codes.to(torch.float64) @ w_codes.to(torch.float64).t()).to(torch.int32)


def _finish(y: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y + bias.to(torch.float64)).to(out_dtype)


def grouped_weight(w_packed: Tensor, w_scale: Tensor, group_size: int, w_zero: Tensor | None = None) -> Tensor:
    """[N, words_for(K)] words, [N, K/G] scales and codes that stand for zero -> [N, K] float64."""
    codes = unpack_int4(w_packed, w_scale.shape[1] * group_size).to(torch.float64)
    grouped = codes.reshape(*w_scale.shape, group_size)
    if w_zero is not None:
        grouped = grouped - w_zero.to(torch.float64)[..., None]
    return (grouped * w_scale.to(torch.float64)[..., None]).reshape(codes.shape)


def w8a8_int8_gemm(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """[M, K] int8, [M, 1], [N, K] int8, [N, 1], [N] or None -> [M, N] `out_dtype`."""
    sums = accumulate_int8(x_codes, w_codes).to(torch.float64)
    return _finish(sums * x_scale.to(torch.float64) * w_scale.to(torch.float64).t(), bias, out_dtype)


def w8a8_fp8_gemm(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """[M, K] e4m3, [M, 1], [N, K] e4m3, [N, 1], [N] or None -> [M, N] `out_dtype`."""
    sums = x_codes.to(torch.float64) @ w_codes.to(torch.float64).t()
    return _finish(sums * x_scale.to(torch.float64) * w_scale.to(torch.float64).t(), bias, out_dtype)


def per_element(scale: Tensor, shape: tuple[int, ...], last: int) -> Tensor:
    """Scales of blocks of 128 in each of the `last` last dimensions -> one per element of `shape`, float64."""
    wide = scale.to(torch.float64)
    for dimension in range(len(shape) - last, len(shape)):
        repeated = wide.repeat_interleave(SCALE_BLOCK, dimension)
        wide = repeated.narrow(dimension, 0, shape[dimension])
    return wide


def w8a8_fp8_block_gemm(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """[M, K] e4m3, [M, ceil(K/128)], [N, K] e4m3, [ceil(N/128), ceil(K/128)], [N] or None -> [M, N] `out_dtype`."""
    x = x_codes.to(torch.float64) * per_element(x_scale, x_codes.shape, 1)
    w = w_codes.to(torch.float64) * per_element(w_scale, w_codes.shape, 2)
    return _finish(x @ w.t(), bias, out_dtype)


def w8a16_gemm(x: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] float, w_codes [N, K] int8, w_scale [N, 1], bias [N] or None -> [M, N] in x's dtype."""
    sums = x.to(torch.float64) @ w_codes.to(torch.float64).t()
    return _finish(sums * w_scale.to(torch.float64).t(), bias, x.dtype)


def w4a16_gemm(
    x: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, group_size: int, w_zero: Tensor | None = None
) -> Tensor:
    """x [M, K] float, [N, words_for(K)] int32, [N, K/G], [N] or None, [N, K/G] int8 or None -> [M, N] in x's dtype."""
    return _finish(x.to(torch.float64) @ grouped_weight(w_packed, w_scale, group_size, w_zero).t(), bias, x.dtype)


def w4a8_int8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """[M, K] int8, [M, 1], [N, words_for(K)] int32, [N, K/G], [N] or None -> [M, N]; an exact integer sum per group."""
    w_codes = unpack_int4(w_packed, x_codes.shape[1])
    y = x_scale.new_zeros(x_codes.shape[0], w_codes.shape[0], dtype=torch.float64)
    for group in range(w_scale.shape[1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        sums = accumulate_int8(x_codes[:, columns], w_codes[:, columns])
        y += sums.to(torch.float64) * w_scale[:, group].to(torch.float64)
    return _finish(y * x_scale.to(torch.float64), bias, out_dtype)


def w4a8_fp8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """[M, K] e4m3, [M, 1], [N, words_for(K)] int32, [N, K/G], [N] or None -> [M, N] `out_dtype`."""
    sums = x_codes.to(torch.float64) @ grouped_weight(w_packed, w_scale, group_size).t()
    return _finish(sums * x_scale.to(torch.float64), bias, out_dtype)


def nested_gemm(
    x: Tensor,
    w_base: Tensor,
    w_residual: Tensor,
    w_scale: Tensor,
    w_ratio: Tensor,
    w_zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    level: int,
) -> Tensor:
    """x [M, K], two [N, words_for(K)] int32, [N, K/G], two [N, K/G] int8 (the second may be None), [N]? -> [M, N].

    Args:
        w_residual: the second plane.
        w_ratio: steps of level 8 in one of level 4.
        level: 4 or 8.

    Raises:
        ValueError: `level` is neither 4 nor 8.
    """
    if level not in NESTED_LEVELS:
        raise ValueError(f"level must be one of {NESTED_LEVELS}, not {level}")
    w = grouped_weight(w_base, w_scale, group_size, w_zero)
    if level == 8:
        w = w + grouped_weight(w_residual, w_scale.to(torch.float64) / w_ratio, group_size)
    return _finish(x.to(torch.float64) @ w.t(), bias, x.dtype)


REFERENCES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        quantize_per_token_int8,
        quantize_per_token_fp8,
        quantize_per_block_fp8,
        rms_norm_quantize,
        add_rms_norm_quantize,
        silu_mul_quantize,
        w8a8_int8_gemm,
        w8a8_fp8_gemm,
        w8a8_fp8_block_gemm,
        w8a16_gemm,
        w4a16_gemm,
        w4a8_int8_gemm,
        w4a8_fp8_gemm,
        nested_gemm,
    )
}
