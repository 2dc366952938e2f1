"""The contract: the ops of namespace `lowprec`, with schema, shapes, dtypes and their fake (shape-only) forms.

| op | operands | result |
|---|---|---|
| quantize_per_token_int8 | x[M,K] float | codes[M,K] int8, scale[M,1] f32 |
| quantize_per_token_fp8 | x[M,K] float | codes[M,K] e4m3fn, scale[M,1] f32 |
| w8a8_int8_gemm, w8a8_fp8_gemm | x_codes[M,K], x_scale[M,1], w_codes[N,K], w_scale[N,1], bias[N]?, out_dtype | y[M,N] |
| w8a16_gemm | x[M,K] float, w_codes[N,K] int8, w_scale[N,1], bias[N]? | y[M,N] in x's dtype |
| w4a16_gemm | x[M,K] float, w_packed[N,P] int32, w_scale[N,K/G], bias[N]?, group_size, w_zero[N,K/G]? int8 | y[M,N] |
| w4a8_int8_gemm, w4a8_fp8_gemm | x_codes, x_scale, w_packed, w_scale, bias?, group_size, out_dtype | y[M,N] |

P is `packing.words_for(K)`, scales are float32, bias is of any float dtype, M may be 0, operands may have any strides.
Integer products are summed exactly. Every op computes `reference.py`'s numbers, on any device; the packed layout is
drawn in `packing.py`, and what happens to values that are not finite is said in `reference.py`. A wrong shape or dtype
raises ValueError, also in the fake form.

What runs fast is a `kernel.Kernel`: it names a pair of formats and so, in `GEMMS`, the op whose numbers it must give.
The kernels called "reference" (`slow.py`) call the ops; the runtime compares its layers with these, and the tests do so
with every kernel that is registered.
"""

from typing import Any

import torch
from torch import Tensor

from lowprec_kernels import reference
from lowprec_kernels.kernel import ActivationKind, WeightKind
from lowprec_kernels.packing import words_for

OPS: dict[str, Any] = {}


def _check_x(op: str, x: Tensor) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be a float matrix [M, K], not {x.dtype} {tuple(x.shape)}")


def _check_codes(op: str, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    if codes.ndim != 2 or codes.dtype != dtype:
        raise ValueError(f"{op}: codes must be [rows, K] {dtype}, not {codes.dtype} {tuple(codes.shape)}")
    if tuple(scale.shape) != (codes.shape[0], 1) or scale.dtype != torch.float32:
        raise ValueError(f"{op}: scale must be [{codes.shape[0]}, 1] float32, not {scale.dtype} {tuple(scale.shape)}")


def _check_packed(op: str, k: int, w_packed: Tensor, w_scale: Tensor, group_size: int) -> None:
    if w_packed.ndim != 2 or w_packed.dtype != torch.int32 or w_packed.shape[1] != words_for(k):
        wanted = f"[N, {words_for(k)}] int32 for K = {k}"
        raise ValueError(f"{op}: w_packed must be {wanted}, not {w_packed.dtype} {tuple(w_packed.shape)}")
    if group_size <= 0 or k % group_size or tuple(w_scale.shape) != (w_packed.shape[0], k // group_size):
        raise ValueError(f"{op}: w_scale {tuple(w_scale.shape)} does not fit K = {k} in groups of {group_size}")


def _check_pair(op: str, k: int, n: int, w: Tensor, bias: Tensor | None) -> None:
    if w.shape[1] != k:
        raise ValueError(f"{op}: x has K = {k}, the weight {w.shape[1]}")
    _check_bias(op, n, bias)


def _check_bias(op: str, n: int, bias: Tensor | None) -> None:
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"{op}: bias must be [{n}], not {tuple(bias.shape)}")


def _check_w8a8(
    op: str, x_codes: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> None:
    _check_codes(op, x_codes, x_scale, dtype)
    _check_codes(op, w, w_scale, dtype)
    _check_pair(op, x_codes.shape[1], w.shape[0], w, bias)


@torch.library.custom_op("lowprec::quantize_per_token_int8", mutates_args=())
def quantize_per_token_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] float -> codes [M, K] int8, scale [M, 1] float32."""
    _check_x("quantize_per_token_int8", x)
    return reference.quantize_per_token_int8(x)


@quantize_per_token_int8.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_x("quantize_per_token_int8", x)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("lowprec::quantize_per_token_fp8", mutates_args=())
def quantize_per_token_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] float -> codes [M, K] float8_e4m3fn, scale [M, 1] float32."""
    _check_x("quantize_per_token_fp8", x)
    return reference.quantize_per_token_fp8(x)


@quantize_per_token_fp8.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_x("quantize_per_token_fp8", x)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("lowprec::w8a8_int8_gemm", mutates_args=())
def w8a8_int8_gemm(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """INT8 codes times INT8 codes, int32 sums, scaled; see the table above."""
    _check_w8a8("w8a8_int8_gemm", x_codes, x_scale, w_codes, w_scale, bias, torch.int8)
    return reference.w8a8_int8_gemm(x_codes, x_scale, w_codes, w_scale, bias, out_dtype)


@w8a8_int8_gemm.register_fake
def _(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    _check_w8a8("w8a8_int8_gemm", x_codes, x_scale, w_codes, w_scale, bias, torch.int8)
    return x_codes.new_empty((x_codes.shape[0], w_codes.shape[0]), dtype=out_dtype)


@torch.library.custom_op("lowprec::w8a8_fp8_gemm", mutates_args=())
def w8a8_fp8_gemm(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """E4M3 codes times E4M3 codes, scaled; see the table above."""
    _check_w8a8("w8a8_fp8_gemm", x_codes, x_scale, w_codes, w_scale, bias, torch.float8_e4m3fn)
    return reference.w8a8_fp8_gemm(x_codes, x_scale, w_codes, w_scale, bias, out_dtype)


@w8a8_fp8_gemm.register_fake
def _(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    _check_w8a8("w8a8_fp8_gemm", x_codes, x_scale, w_codes, w_scale, bias, torch.float8_e4m3fn)
    return x_codes.new_empty((x_codes.shape[0], w_codes.shape[0]), dtype=out_dtype)


def _check_w8a16(x: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None) -> None:
    _check_x("w8a16_gemm", x)
    _check_codes("w8a16_gemm", w_codes, w_scale, torch.int8)
    _check_pair("w8a16_gemm", x.shape[1], w_codes.shape[0], w_codes, bias)


@torch.library.custom_op("lowprec::w8a16_gemm", mutates_args=())
def w8a16_gemm(x: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Float activations times INT8 weights; see the table above."""
    _check_w8a16(x, w_codes, w_scale, bias)
    return reference.w8a16_gemm(x, w_codes, w_scale, bias)


@w8a16_gemm.register_fake
def _(x: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_w8a16(x, w_codes, w_scale, bias)
    return x.new_empty((x.shape[0], w_codes.shape[0]))


def _check_w4a16(
    x: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, group_size: int, w_zero: Tensor | None
) -> None:
    _check_x("w4a16_gemm", x)
    _check_packed("w4a16_gemm", x.shape[1], w_packed, w_scale, group_size)
    _check_bias("w4a16_gemm", w_packed.shape[0], bias)
    if w_zero is not None and (w_zero.shape != w_scale.shape or w_zero.dtype != torch.int8):
        raise ValueError(
            f"w4a16_gemm: w_zero must be {tuple(w_scale.shape)} int8, not {w_zero.dtype} {tuple(w_zero.shape)}"
        )


@torch.library.custom_op("lowprec::w4a16_gemm", mutates_args=())
def w4a16_gemm(
    x: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, group_size: int, w_zero: Tensor | None = None
) -> Tensor:
    """Float activations times grouped INT4 weights; see the table above."""
    _check_w4a16(x, w_packed, w_scale, bias, group_size, w_zero)
    return reference.w4a16_gemm(x, w_packed, w_scale, bias, group_size, w_zero)


@w4a16_gemm.register_fake
def _(
    x: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, group_size: int, w_zero: Tensor | None = None
) -> Tensor:
    _check_w4a16(x, w_packed, w_scale, bias, group_size, w_zero)
    return x.new_empty((x.shape[0], w_packed.shape[0]))


def _check_w4a8(
    op: str,
    x_codes: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> None:
    _check_codes(op, x_codes, x_scale, dtype)
    _check_packed(op, x_codes.shape[1], w_packed, w_scale, group_size)
    _check_bias(op, w_packed.shape[0], bias)


@torch.library.custom_op("lowprec::w4a8_int8_gemm", mutates_args=())
def w4a8_int8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """INT8 codes times grouped INT4 codes, one int32 sum per group; see the table above."""
    _check_w4a8("w4a8_int8_gemm", x_codes, x_scale, w_packed, w_scale, bias, group_size, torch.int8)
    return reference.w4a8_int8_gemm(x_codes, x_scale, w_packed, w_scale, bias, group_size, out_dtype)


@w4a8_int8_gemm.register_fake
def _(
    x_codes: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_w4a8("w4a8_int8_gemm", x_codes, x_scale, w_packed, w_scale, bias, group_size, torch.int8)
    return x_codes.new_empty((x_codes.shape[0], w_packed.shape[0]), dtype=out_dtype)


@torch.library.custom_op("lowprec::w4a8_fp8_gemm", mutates_args=())
def w4a8_fp8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """E4M3 codes times grouped INT4 codes; see the table above."""
    _check_w4a8("w4a8_fp8_gemm", x_codes, x_scale, w_packed, w_scale, bias, group_size, torch.float8_e4m3fn)
    return reference.w4a8_fp8_gemm(x_codes, x_scale, w_packed, w_scale, bias, group_size, out_dtype)


@w4a8_fp8_gemm.register_fake
def _(
    x_codes: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_w4a8("w4a8_fp8_gemm", x_codes, x_scale, w_packed, w_scale, bias, group_size, torch.float8_e4m3fn)
    return x_codes.new_empty((x_codes.shape[0], w_packed.shape[0]), dtype=out_dtype)


# (weights, activations) -> the op that multiplies them; bfloat16 weights are a plain matmul and have none.
GEMMS: dict[tuple[WeightKind, ActivationKind | None], str] = {
    ("int8", None): "w8a16_gemm",
    ("int8", "int8"): "w8a8_int8_gemm",
    ("fp8", "fp8"): "w8a8_fp8_gemm",
    ("int4", None): "w4a16_gemm",
    ("int4", "int8"): "w4a8_int8_gemm",
    ("int4", "fp8"): "w4a8_fp8_gemm",
}
OPS.update(
    {
        "quantize_per_token_int8": quantize_per_token_int8,
        "quantize_per_token_fp8": quantize_per_token_fp8,
        "w8a8_int8_gemm": w8a8_int8_gemm,
        "w8a8_fp8_gemm": w8a8_fp8_gemm,
        "w8a16_gemm": w8a16_gemm,
        "w4a16_gemm": w4a16_gemm,
        "w4a8_int8_gemm": w4a8_int8_gemm,
        "w4a8_fp8_gemm": w4a8_fp8_gemm,
    }
)
