"""The contract: the ops of namespace `lowprec`, with schema, shapes, dtypes and their fake (shape-only) forms.

| op | operands | result |
|---|---|---|
| quantize_per_token_int8 | x[M,K] float | codes[M,K] int8, scale[M,1] f32 |
| quantize_per_token_fp8 | x[M,K] float | codes[M,K] e4m3fn, scale[M,1] f32 |
| quantize_per_block_fp8 | x[M,K] float, block = 128 | codes[M,K] e4m3fn, scale[M,K/block] f32 |
| rms_norm_quantize | x[M,K] float, weight[K] like x, eps, kind, block? | codes[M,K], scale[M,1 or K/block] f32 |
| add_rms_norm_quantize | x[M,K] float, residual[M,K], weight[K] like x, eps, kind, block? | the same, x + residual |
| silu_mul_quantize | x[M,2K] float, gate and up side by side, kind, block? | codes[M,K], scale[M,1 or K/block] f32 |
| w8a8_int8_gemm, w8a8_fp8_gemm | x_codes[M,K], x_scale[M,1], w_codes[N,K], w_scale[N,1], bias[N]?, out_dtype | y[M,N] |
| w8a8_fp8_block_gemm | x_codes[M,K], x_scale[M,K/128], w_codes[N,K], w_scale[N/128,K/128], bias?, out_dtype | y[M,N] |
| w8a16_gemm | x[M,K] float, w_codes[N,K] int8, w_scale[N,1], bias[N]? | y[M,N] in x's dtype |
| w4a16_gemm | x[M,K] float, w_packed[N,P] int32, w_scale[N,K/G], bias[N]?, group_size, w_zero[N,K/G]? int8 | y[M,N] |
| w4a8_int8_gemm, w4a8_fp8_gemm | x_codes, x_scale, w_packed, w_scale, bias?, group_size, out_dtype | y[M,N] |
| nested_gemm | x, w_base[N,P], w_residual[N,P], w_scale, w_ratio int8, w_zero?, bias?, group_size, level | y[M,N] |
| moe_* | `ops_moe.py` | y[T,N] |

P is `packing.words_for(K)`, `kind` "int8" or "fp8". Numbers of blocks are rounded up, scales float32, bias any float;
M may be 0, operands may have any strides. Integer products are summed exactly. Every op computes the numbers of its
reference (`reference.py`, which also says what becomes of values that are not finite); the packed layout is drawn in
`packing.py`. A wrong shape or dtype raises ValueError, also in the fake form.

On a GPU an op runs the Triton launcher that `custom_op.CUDA` names. It takes less than the reference: x of 16 bits in
gemms of float activations, groups of 32, 64, 128, ... columns, blocks of 16 to 256, e4m3 only from sm_89 on. Anything
else is an error, the launcher's or the compiler's, never a slower answer.

What runs fast is a `kernel.Kernel`: it names a pair of formats and so, in `GEMMS`, the op whose numbers it must give.
The kernels called "reference" (`slow.py`) call the references of the ops; the runtime compares its layers with these,
and the tests do so with every kernel that is registered.
"""

import functools

import torch
from torch import Tensor

from lowprec_kernels import reference
from lowprec_kernels.custom_op import CUDA, FLOATS, OPS, Result, define, expect, float_type, groups
from lowprec_kernels.kernel import ActivationKind, WeightKind
from lowprec_kernels.ops_moe import moe_w4a16_gemm, moe_w8a8_fp8_block_gemm, moe_w8a8_fp8_gemm, moe_w8a8_int8_gemm
from lowprec_kernels.packing import words_for

__all__ = [
    "CUDA",
    "GEMMS",
    "OPS",
    "add_rms_norm_quantize",
    "moe_w4a16_gemm",
    "moe_w8a8_fp8_block_gemm",
    "moe_w8a8_fp8_gemm",
    "moe_w8a8_int8_gemm",
    "nested_gemm",
    "quantize_per_block_fp8",
    "quantize_per_token_fp8",
    "quantize_per_token_int8",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "w4a8_fp8_gemm",
    "w4a8_int8_gemm",
    "w4a16_gemm",
    "w8a8_fp8_block_gemm",
    "w8a8_fp8_gemm",
    "w8a8_int8_gemm",
    "w8a16_gemm",
]

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def _cast(m: int, k: int, kind: str, block: int | None) -> Result:
    """Codes [m, k] and their scales."""
    if kind not in CODES:
        raise ValueError(f"kind must be one of {', '.join(CODES)}, not {kind}")
    if k == 0:
        raise ValueError("x must have columns, not K = 0")
    if block is not None and block <= 0:
        raise ValueError(f"block must be a number of columns, not {block}")
    return ((m, k), CODES[kind]), ((m, 1 if block is None else -(-k // block)), torch.float32)


def _quantize(kind: str, block: int | None, x: Tensor) -> Result:
    m, k = expect("x", x, ("M", "K"), *FLOATS)
    return _cast(m, k, kind, block)


def _quantize_per_block_fp8(x: Tensor, block: int = reference.SCALE_BLOCK) -> Result:
    return _quantize("fp8", block, x)


def _rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, kind: str, block: int | None = None) -> Result:
    m, k = expect("x", x, ("M", "K"), *FLOATS)
    expect("weight", weight, (k,), x.dtype)
    return _cast(m, k, kind, block)


def _add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, kind: str, block: int | None = None
) -> Result:
    codes, scale = _rms_norm_quantize(x, weight, eps, kind, block)
    expect("residual", residual, tuple(x.shape), x.dtype)
    return codes, scale, (tuple(x.shape), x.dtype)


def _silu_mul_quantize(x: Tensor, kind: str, block: int | None = None) -> Result:
    m, width = expect("x", x, ("M", "2 K"), *FLOATS)
    if width % 2:
        raise ValueError(f"x must be gate and up side by side, [M, 2 K], not {tuple(x.shape)}")
    return _cast(m, width // 2, kind, block)


def _product(m: int, n: int, bias: Tensor | None, dtype: torch.dtype) -> Result:
    if bias is not None:
        expect("bias", bias, (n,), *FLOATS)
    return (((m, n), float_type(dtype)),)


def _w8a8(
    dtype: torch.dtype,
    block: int | None,
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Result:
    """`block`: the side of blocks that share a scale, None where whole rows do."""
    m, k = expect("x_codes", x_codes, ("M", "K"), dtype)
    n, _ = expect("w_codes", w_codes, ("N", k), dtype)
    down, across = (n, 1) if block is None else (-(-n // block), -(-k // block))
    expect("x_scale", x_scale, (m, across), torch.float32)
    expect("w_scale", w_scale, (down, across), torch.float32)
    return _product(m, n, bias, out_dtype)


def _w8a16(x: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None) -> Result:
    m, k = expect("x", x, ("M", "K"), *FLOATS)
    n, _ = expect("w_codes", w_codes, ("N", k), torch.int8)
    expect("w_scale", w_scale, (n, 1), torch.float32)
    return _product(m, n, bias, x.dtype)


def _int4(k: int, w_packed: Tensor, w_scale: Tensor, w_zero: Tensor | None, group_size: int) -> int:
    """N, the rows of an INT4 weight that fits K columns of x."""
    n, _ = expect("w_packed", w_packed, ("N", words_for(k)), torch.int32)
    shape = n, groups(k, group_size)
    expect("w_scale", w_scale, shape, torch.float32)
    if w_zero is not None:
        expect("w_zero", w_zero, shape, torch.int8)
    return n


def _w4a16(
    x: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, group_size: int, w_zero: Tensor | None = None
) -> Result:
    m, k = expect("x", x, ("M", "K"), *FLOATS)
    return _product(m, _int4(k, w_packed, w_scale, w_zero, group_size), bias, x.dtype)


def _w4a8(
    dtype: torch.dtype,
    x_codes: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> Result:
    m, k = expect("x_codes", x_codes, ("M", "K"), dtype)
    expect("x_scale", x_scale, (m, 1), torch.float32)
    return _product(m, _int4(k, w_packed, w_scale, None, group_size), bias, out_dtype)


def _nested(
    x: Tensor,
    w_base: Tensor,
    w_residual: Tensor,
    w_scale: Tensor,
    w_ratio: Tensor,
    w_zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    level: int,
) -> Result:
    m, k = expect("x", x, ("M", "K"), *FLOATS)
    n = _int4(k, w_base, w_scale, w_zero, group_size)
    expect("w_residual", w_residual, (n, words_for(k)), torch.int32)
    expect("w_ratio", w_ratio, (n, k // group_size), torch.int8)
    if level not in reference.NESTED_LEVELS:
        raise ValueError(f"level must be one of {reference.NESTED_LEVELS}, not {level}")
    return _product(m, n, bias, x.dtype)


_partial = functools.partial
_INT8, _FP8 = CODES.values()

quantize_per_token_int8 = define(reference.quantize_per_token_int8, _partial(_quantize, "int8", None))
quantize_per_token_fp8 = define(reference.quantize_per_token_fp8, _partial(_quantize, "fp8", None))
quantize_per_block_fp8 = define(reference.quantize_per_block_fp8, _quantize_per_block_fp8)
rms_norm_quantize = define(reference.rms_norm_quantize, _rms_norm_quantize)
add_rms_norm_quantize = define(reference.add_rms_norm_quantize, _add_rms_norm_quantize)
silu_mul_quantize = define(reference.silu_mul_quantize, _silu_mul_quantize)
w8a8_int8_gemm = define(reference.w8a8_int8_gemm, _partial(_w8a8, _INT8, None))
w8a8_fp8_gemm = define(reference.w8a8_fp8_gemm, _partial(_w8a8, _FP8, None))
w8a8_fp8_block_gemm = define(reference.w8a8_fp8_block_gemm, _partial(_w8a8, _FP8, reference.SCALE_BLOCK))
w8a16_gemm = define(reference.w8a16_gemm, _w8a16)
w4a16_gemm = define(reference.w4a16_gemm, _w4a16)
w4a8_int8_gemm = define(reference.w4a8_int8_gemm, _partial(_w4a8, _INT8))
w4a8_fp8_gemm = define(reference.w4a8_fp8_gemm, _partial(_w4a8, _FP8))
nested_gemm = define(reference.nested_gemm, _nested)

# (weights, activations) -> the op that multiplies them; bfloat16 weights are a plain matmul and have none.
GEMMS: dict[tuple[WeightKind, ActivationKind | None], str] = {
    ("int8", None): "w8a16_gemm",
    ("int8", "int8"): "w8a8_int8_gemm",
    ("fp8", "fp8"): "w8a8_fp8_gemm",
    ("int4", None): "w4a16_gemm",
    ("int4", "int8"): "w4a8_int8_gemm",
    ("int4", "fp8"): "w4a8_fp8_gemm",
}
