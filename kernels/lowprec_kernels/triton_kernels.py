"""Forms of a linear layer on a CUDA device: the Triton kernels, and torch's own operators where it has some.

    form         weights        activations    what it does
    linear       bf16           -              torch's matmul (cuBLAS)
    triton       int8           -, int8        `triton_w8a16`, `triton_w8a8`
    triton       fp8            fp8            `triton_w8a8`
    triton       int4           -, int8, fp8   `triton_w4`, scales laid out anew so that rows of w are adjacent
    int-mm       int8           int8           torch._int_mm and the scaling after it (rows: more than 16)
    scaled-mm    fp8            fp8            torch._scaled_mm with one scale a row, fast sums

Activations are quantised by `triton_cast`; the sums of groups that e4m3 x INT4 needs come from the same pass. A fixed
(static) scale is applied by torch. Which form is fastest is measured, never assumed. Unquantised float32 activations
are rounded to bfloat16.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec_kernels import reference
from lowprec_kernels.kernel import ActivationKind, Kernel, Operands, State, WeightKind
from lowprec_kernels.triton_cast import quantize
from lowprec_kernels.triton_common import counters
from lowprec_kernels.triton_w4 import (
    scale_layout,
    unsupported,
    w4a8_fp8_gemm,
    w4a8_int8_gemm,
    w4a16_gemm,
    zero_layout,
)
from lowprec_kernels.triton_w8a8 import w8a8_fp8_gemm, w8a8_int8_gemm
from lowprec_kernels.triton_w8a16 import w8a16_gemm

Check = Callable[[int, int, int | None], str | None]
FP8_CAPABILITY = (8, 9)
# What torch's integer matmul asks of its operands.
INT_MM_ROWS = 17
INT_MM_MULTIPLE = 8
SCALED_MM_MULTIPLE = 16
# The longest groups that the cast sums.
MOST_SUMMED = 256


def _always(n: int, k: int, group_size: int | None) -> str | None:
    return None


def _has_fp8(n: int, k: int, group_size: int | None) -> str | None:
    if torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < FP8_CAPABILITY:
            return f"this device (sm_{capability[0]}{capability[1]}) has no FP8 matrix instructions (sm_89 has)"
    return None


def _int4_groups(n: int, k: int, group_size: int | None) -> str | None:
    return "INT4 weights need a group size" if group_size is None else unsupported(group_size)


def _fp8_groups(n: int, k: int, group_size: int | None) -> str | None:
    return _has_fp8(n, k, group_size) or _int4_groups(n, k, group_size)


def _multiple(of: int, name: str) -> Check:
    def check(n: int, k: int, group_size: int | None) -> str | None:
        if n % of or k % of:
            return f"torch.{name} needs N and K to be multiples of {of}, they are {n} and {k}"
        return None

    return check


def _scaled_mm_fits(n: int, k: int, group_size: int | None) -> str | None:
    if torch.version.hip is not None:
        return "torch._scaled_mm takes another 8-bit float on AMD's devices"
    return _has_fp8(n, k, group_size) or _multiple(SCALED_MM_MULTIPLE, "_scaled_mm")(n, k, group_size)


def _codes(state: State, x: Tensor, kind: ActivationKind) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes, scale [M, 1]."""
    codes, scale, _ = _codes_and_sums(state, x, kind, None)
    return codes, scale


def _codes_and_sums(
    state: State, x: Tensor, kind: ActivationKind, group_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [M, K] -> codes, scale [M, 1], sums of the codes over groups where they are wanted and come for nothing."""
    static = state.operands.activation_scale
    if static is not None:
        return reference.quantize_static(x, static, kind), static.expand(len(x), 1).contiguous(), None
    found = quantize(x, kind, group_size=group_size)
    return found.codes, found.scale, found.group_sums


def _half(x: Tensor) -> Tensor:
    """x as 16-bit kernels take it."""
    return x if x.dtype in (torch.bfloat16, torch.float16) else x.to(torch.bfloat16)


def _out_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.bfloat16, torch.float16) else torch.float32


def _linear(state: State, x: Tensor) -> Tensor:
    bias = state.operands.bias
    return F.linear(x.to(torch.bfloat16), state.tensors[0], None if bias is None else bias.to(torch.bfloat16))


def _w8a16(state: State, x: Tensor) -> Tensor:
    return w8a16_gemm(_half(x), state.tensors[0], state.operands.scales(), state.operands.bias)


def _w8a8_int8(state: State, x: Tensor) -> Tensor:
    codes, scale = _codes(state, x, "int8")
    o = state.operands
    return w8a8_int8_gemm(codes, scale, state.tensors[0], o.scales(), o.bias, _out_dtype(x))


def _w8a8_fp8(state: State, x: Tensor) -> Tensor:
    codes, scale = _codes(state, x, "fp8")
    o = state.operands
    return w8a8_fp8_gemm(codes, scale, state.tensors[0], o.scales(), o.bias, _out_dtype(x))


def _int_mm(state: State, x: Tensor) -> Tensor:
    codes, scale = _codes(state, x, "int8")
    rows = len(codes)
    if rows < INT_MM_ROWS:
        codes = F.pad(codes, (0, 0, 0, INT_MM_ROWS - rows))
    sums = torch._int_mm(codes, state.tensors[0].t())[:rows]
    y = sums.to(torch.float32) * scale * state.operands.scales().t()
    return y if state.operands.bias is None else y + state.operands.bias


def _scaled_mm(state: State, x: Tensor) -> Tensor:
    codes, scale = _codes(state, x, "fp8")
    y = torch._scaled_mm(
        codes,
        state.tensors[0].t(),
        scale_a=scale,
        scale_b=state.operands.scales().t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y if state.operands.bias is None else y + state.operands.bias


def _int4_layout(operands: Operands) -> tuple[Tensor, ...]:
    # Not first while a CUDA graph is captured.
    counters(operands.codes.device)
    scale = scale_layout(operands.scales())
    codes = operands.codes.contiguous()
    return (codes, scale) if operands.zero is None else (codes, scale, zero_layout(operands.zero, scale))


def _w4a16(state: State, x: Tensor) -> Tensor:
    codes, scale, *zero = state.tensors
    o = state.operands
    return w4a16_gemm(_half(x), codes, scale, o.bias, _group_size(o), zero[0] if zero else None)


def _w4a8_int8(state: State, x: Tensor) -> Tensor:
    x_codes, x_scale = _codes(state, x, "int8")
    codes, scale = state.tensors
    o = state.operands
    return w4a8_int8_gemm(x_codes, x_scale, codes, scale, o.bias, _group_size(o), _out_dtype(x))


def _w4a8_fp8(state: State, x: Tensor) -> Tensor:
    codes, scale = state.tensors
    o = state.operands
    group, out_dtype = _group_size(o), _out_dtype(x)
    # The cast gives sums of short groups with its one pass; those of others are taken afterwards.
    x_codes, x_scale, sums = _codes_and_sums(state, x, "fp8", group if group <= MOST_SUMMED else None)
    return w4a8_fp8_gemm(x_codes, x_scale, codes, scale, o.bias, group, out_dtype, sums)


def _group_size(operands: Operands) -> int:
    if operands.group_size is None:
        raise ValueError("INT4 weights need a group size")
    return operands.group_size


def _as_stored(operands: Operands) -> tuple[Tensor, ...]:
    # Not first while a CUDA graph is captured.
    counters(operands.codes.device)
    return (operands.codes.contiguous(),)


def _kernel(
    name: str,
    weight: WeightKind,
    activation: ActivationKind | None,
    bytes_per_weight: float,
    compute: Callable[[State, Tensor], Tensor],
    layout: Callable[[Operands], tuple[Tensor, ...]] = _as_stored,
    check: Check = _always,
) -> Kernel:
    return Kernel(
        name=name,
        weight=weight,
        activation=activation,
        device="cuda",
        bytes_per_weight=bytes_per_weight,
        check=check,
        layout=layout,
        compute=compute,
    )


KERNELS: tuple[Kernel, ...] = (
    _kernel("linear", "bf16", None, 2.0, _linear),
    _kernel("triton", "int8", None, 1.0, _w8a16),
    _kernel("triton", "int8", "int8", 1.0, _w8a8_int8),
    _kernel("int-mm", "int8", "int8", 1.0, _int_mm, check=_multiple(INT_MM_MULTIPLE, "_int_mm")),
    _kernel("triton", "fp8", "fp8", 1.0, _w8a8_fp8, check=_has_fp8),
    _kernel("scaled-mm", "fp8", "fp8", 1.0, _scaled_mm, check=_scaled_mm_fits),
    _kernel("triton", "int4", None, 0.5, _w4a16, _int4_layout, _int4_groups),
    _kernel("triton", "int4", "int8", 0.5, _w4a8_int8, _int4_layout, _int4_groups),
    _kernel("triton", "int4", "fp8", 0.5, _w4a8_fp8, _int4_layout, _fp8_groups),
)
