"""CPU kernels, all of them on torch's own operators. Which is fastest differs by processor, so it is measured.

    form              weights   activations    what it does
    linear-bf16       bf16      -              torch's bfloat16 matmul (fast with AMX or AVX512-BF16, slow without)
    linear-fp32-copy  bf16      -              float32 matmul from a second, upcast copy: twice the bytes
    dequantize-fp32   all       all            upcasts a block of rows per call, then float32 matmul; scales go on the
                                               block (int4) or on the output; reads the stored bytes only
    dequantize-bf16   int8, fp8, int4  all but int4 with quantised activations: the same in bfloat16
    int8pack          int8      -              _weight_int8pack_mm on bfloat16 activations
    int8pack-codes    int8      int8           the same operator fed with activation codes: integers up to 127 are
                                               exact in bfloat16, sums are float32, the output is rounded to bfloat16
    qlinear-u8        int8      int8           oneDNN u8 x s8, codes + 128 with zero point 128, exact int32 sums
    qlinear-split     int8      int8           oneDNN u8 x s8 on max(x, 0) and max(-x, 0): twice the rows, exact on
                                               processors whose 16-bit pair sums saturate
    int-mm            int8      int8           torch._int_mm, exact int32 sums
    int4pack          int4      -              _weight_int4pack_mm_for_cpu on bfloat16 activations
    int4pack-codes    int4      int8           the same operator fed with activation codes
    int-mm-rows       int4      int8           int-mm on INT8 codes that are made of a block of rows per call; for
                                               scales of two levels (`Operands.multiples`) alone

Without VNNI, oneDNN adds pairs of u8 x s8 products in 16 bits: 2 x 255 x 127 saturates, silently. `_saturates` asks
the processor once and `qlinear-u8` is then refused with that reason; 2 x 127 x 127 fits, hence the split form.
Traps that are kept out: _weight_int8pack_mm on tensors that do not begin on a cache line (with AVX-512 it crashes the
process), s8 activations in qlinear_pointwise and float32 activations in the pack operators (both fall to scalar code).
Left out: per-tensor dynamic quantisation, FP8 matmuls (the CPU ones are scalar: FP8 is computed by dequantising and so
loses by its measured time), and fp16.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec_kernels.kernel import ActivationKind, Kernel, Operands, State, WeightKind, quantize_activation
from lowprec_kernels.packing import row_blocks, unpack_int4, unpack_nibbles

# Most weights that one block of a dequantising form upcasts: 4 MiB in float32, so that the block stays in cache.
BLOCK_WEIGHTS = 1 << 20
UNSIGNED_ZERO = 128
CACHE_LINE = 64


def _always(n: int, k: int, group_size: int | None) -> str | None:
    return None


def _as_stored(operands: Operands) -> tuple[Tensor, ...]:
    return (operands.codes,)


def _finish(y: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """y [M, N], overwritten, times row scales [M, 1] and column scales [N], plus bias, in float32."""
    y = y.to(torch.float32)
    if column_scale is not None:
        y.mul_(column_scale)
    if row_scale is not None:
        y.mul_(row_scale)
    return y if bias is None else y.add_(bias)


def _linear_bf16(state: State, x: Tensor) -> Tensor:
    bias = state.operands.bias
    return F.linear(x.to(torch.bfloat16), state.tensors[0], None if bias is None else bias.to(torch.bfloat16))


def _upcast_copy(operands: Operands) -> tuple[Tensor, ...]:
    return (operands.codes.to(torch.float32),)


def _linear_fp32(state: State, x: Tensor) -> Tensor:
    bias = state.operands.bias
    return F.linear(x.to(torch.float32), state.tensors[0], None if bias is None else bias.to(torch.float32))


def _blocks(operands: Operands) -> list[slice]:
    """Rows, as many at a time as a block has."""
    return row_blocks(operands.n, operands.k, BLOCK_WEIGHTS)


def _block(operands: Operands, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows as a matrix to multiply with: scaled when scales are per group, bare codes otherwise."""
    codes = operands.codes[rows]
    if operands.weight != "int4" or operands.scale is None:
        return codes.to(dtype)
    scale = operands.scale[rows]
    values = unpack_int4(codes, operands.k).to(torch.float32).view(*scale.shape, -1)
    if operands.zero is not None:
        values = values - operands.zero[rows, :, None]
    return (values * scale[..., None]).flatten(1).to(dtype)


def _input(state: State, x: Tensor, activation: ActivationKind | None) -> tuple[Tensor, Tensor | None]:
    """The values to multiply, and the scale of each row (None when activations stay as they are)."""
    if activation is None:
        return x, None
    return quantize_activation(x, activation, state.operands.activation_scale)


def _column_scale(operands: Operands) -> Tensor | None:
    """[N] scales to apply to the output: those of per-channel formats."""
    return operands.scales().flatten() if operands.weight in ("int8", "fp8") else None


def _dequantizing(weight: WeightKind, activation: ActivationKind | None, dtype: torch.dtype) -> Kernel:
    def compute(state: State, x: Tensor) -> Tensor:
        operands = state.operands
        values, row_scale = _input(state, x, activation)
        values = values.to(dtype)
        parts = [F.linear(values, _block(operands, rows, dtype)) for rows in _blocks(operands)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return _finish(y, row_scale, _column_scale(operands), operands.bias)

    short = "fp32" if dtype == torch.float32 else "bf16"
    stored = {"bf16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5}[weight]
    return _kernel(f"dequantize-{short}", weight, activation, stored, compute)


def _needs_operator(namespace: str, name: str) -> str | None:
    if hasattr(getattr(torch.ops, namespace), name):
        return None
    return f"this torch ({torch.__version__}) has no operator {namespace}::{name}"


def _check_int8pack(n: int, k: int, group_size: int | None) -> str | None:
    return _needs_operator("aten", "_weight_int8pack_mm")


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor`, copied when it does not begin on a cache line: a slice, or memory-mapped from a file."""
    return tensor if tensor.data_ptr() % CACHE_LINE == 0 else tensor.clone()


def _int8pack_layout(operands: Operands) -> tuple[Tensor, ...]:
    return _aligned(operands.codes.contiguous()), operands.scales().flatten().to(torch.bfloat16)


def _int8pack(activation: ActivationKind | None) -> Kernel:
    def compute(state: State, x: Tensor) -> Tensor:
        values, row_scale = _input(state, x, activation)
        y = torch.ops.aten._weight_int8pack_mm(_aligned(values.to(torch.bfloat16)), *state.tensors)
        return _finish(y, row_scale, None, state.operands.bias)

    name = "int8pack" if activation is None else "int8pack-codes"
    return _kernel(name, "int8", activation, 1.0, compute, _int8pack_layout, _check_int8pack)


def _check_int4pack(n: int, k: int, group_size: int | None) -> str | None:
    missing = _needs_operator("aten", "_weight_int4pack_mm_for_cpu")
    if missing:
        return missing
    if n % 16:
        return f"_weight_int4pack_mm_for_cpu needs N to be a multiple of 16, it is {n}"
    if group_size not in (32, 64, 128, 256):
        return f"_weight_int4pack_mm_for_cpu takes groups of 32, 64, 128 or 256, not {group_size}"
    return None


def _int4pack_layout(operands: Operands) -> tuple[Tensor, ...]:
    # The operator reads (nibble - 8) * scale + zero, so a symmetric weight has zero 0; both come as [K/G, N, 2].
    nibbles = unpack_nibbles(operands.codes, operands.k).to(torch.int32).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    scale = operands.scales()
    zero = torch.zeros_like(scale) if operands.zero is None else -operands.zero * scale
    return packed, torch.stack((scale.t(), zero.t()), dim=-1).to(torch.bfloat16).contiguous()


def _int4pack(activation: ActivationKind | None) -> Kernel:
    def compute(state: State, x: Tensor) -> Tensor:
        packed, scale_and_zero = state.tensors
        values, row_scale = _input(state, x, activation)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            values.to(torch.bfloat16), packed, state.operands.group_size, scale_and_zero
        )
        return _finish(y, row_scale, None, state.operands.bias)

    name = "int4pack" if activation is None else "int4pack-codes"
    return _kernel(name, "int4", activation, 0.5, compute, _int4pack_layout, _check_int4pack)


def _qlinear_layout(operands: Operands) -> tuple[Tensor, ...]:
    packed = torch.ops.onednn.qlinear_prepack(operands.codes.contiguous(), None)
    return packed, operands.scales().flatten().contiguous(), torch.zeros(operands.n, dtype=torch.int32)


def _qlinear(unsigned: Tensor, zero_point: int, tensors: tuple[Tensor, ...]) -> Tensor:
    """unsigned [M, K] uint8 -> [M, N] float32: int32 sums of (unsigned - zero point) times codes, by column scales."""
    packed, scale, zeros = tensors
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, zero_point, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return result


@functools.cache
def _saturates() -> bool:
    """Whether u8 x s8 products of extreme codes come out wrong on this processor."""
    k = 64
    operands = Operands(weight="int8", codes=torch.full((16, k), 127, dtype=torch.int8), scale=torch.ones(16, 1))
    sums = _qlinear(torch.full((2, k), 255, dtype=torch.uint8), 0, _qlinear_layout(operands))
    return bool((sums != 255 * 127 * k).any())


def _check_onednn(n: int, k: int, group_size: int | None) -> str | None:
    return _needs_operator("onednn", "qlinear_pointwise") or _needs_operator("onednn", "qlinear_prepack")


def _check_qlinear_u8(n: int, k: int, group_size: int | None) -> str | None:
    missing = _check_onednn(n, k, group_size)
    if missing is None and _saturates():
        return "this processor has no VNNI: oneDNN's 16-bit sums of u8 x s8 products saturate"
    return missing


def _compute_qlinear_u8(state: State, x: Tensor) -> Tensor:
    codes, row_scale = _input(state, x, "int8")
    y = _qlinear((codes + UNSIGNED_ZERO).to(torch.uint8), UNSIGNED_ZERO, state.tensors)
    return _finish(y, row_scale, None, state.operands.bias)


def _compute_qlinear_split(state: State, x: Tensor) -> Tensor:
    codes, row_scale = _input(state, x, "int8")
    halves = torch.cat((codes.clamp_min(0), (-codes).clamp_min(0))).to(torch.uint8)
    positive, negative = _qlinear(halves, 0, state.tensors).chunk(2)
    return _finish(positive - negative, row_scale, None, state.operands.bias)


def _check_int_mm(n: int, k: int, group_size: int | None) -> str | None:
    return _needs_operator("aten", "_int_mm")


def _compute_int_mm(state: State, x: Tensor) -> Tensor:
    codes, row_scale = _input(state, x, "int8")
    sums = torch.ops.aten._int_mm(codes.to(torch.int8), state.tensors[0].t())
    return _finish(sums, row_scale, _column_scale(state.operands), state.operands.bias)


def _compute_int_mm_rows(state: State, x: Tensor) -> Tensor:
    operands = state.operands
    codes, row_scale = _input(state, x, "int8")
    left = codes.to(torch.int8)
    parts = [torch.ops.aten._int_mm(left, _in_rows(operands, rows).t()) for rows in _blocks(operands)]
    sums = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return _finish(sums, row_scale, state.tensors[0], operands.bias)


def _in_rows(operands: Operands, rows: slice) -> Tensor:
    """Rows of INT4 codes whose scales are of two levels, as INT8 codes [R, K]."""
    assert operands.multiples is not None
    multiples = operands.multiples[rows]
    codes = unpack_int4(operands.codes[rows], operands.k).view(*multiples.shape, -1)
    return (codes * multiples[..., None]).flatten(1)


def _steps_layout(operands: Operands) -> tuple[Tensor, ...]:
    return (operands.steps(),)


def _kernel(
    name: str,
    weight: WeightKind,
    activation: ActivationKind | None,
    bytes_per_weight: float,
    compute: Callable[[State, Tensor], Tensor],
    layout: Callable[[Operands], tuple[Tensor, ...]] = _as_stored,
    check: Callable[[int, int, int | None], str | None] = _always,
    by_rows: bool = False,
) -> Kernel:
    return Kernel(
        name=name,
        weight=weight,
        activation=activation,
        device="cpu",
        bytes_per_weight=bytes_per_weight,
        check=check,
        layout=layout,
        compute=compute,
        by_rows=by_rows,
    )


KERNELS: tuple[Kernel, ...] = (
    _kernel("linear-bf16", "bf16", None, 2.0, _linear_bf16),
    _kernel("linear-fp32-copy", "bf16", None, 4.0, _linear_fp32, _upcast_copy),
    _dequantizing("bf16", None, torch.float32),
    _dequantizing("int8", None, torch.float32),
    _dequantizing("int8", None, torch.bfloat16),
    _int8pack(None),
    _dequantizing("int8", "int8", torch.float32),
    _dequantizing("int8", "int8", torch.bfloat16),
    _int8pack("int8"),
    _kernel("qlinear-u8", "int8", "int8", 1.0, _compute_qlinear_u8, _qlinear_layout, _check_qlinear_u8),
    _kernel("qlinear-split", "int8", "int8", 1.0, _compute_qlinear_split, _qlinear_layout, _check_onednn),
    _kernel("int-mm", "int8", "int8", 1.0, _compute_int_mm, check=_check_int_mm),
    _dequantizing("fp8", "fp8", torch.float32),
    _dequantizing("fp8", "fp8", torch.bfloat16),
    _dequantizing("int4", None, torch.float32),
    _dequantizing("int4", None, torch.bfloat16),
    _int4pack(None),
    _dequantizing("int4", "int8", torch.float32),
    _int4pack("int8"),
    _kernel("int-mm-rows", "int4", "int8", 0.5, _compute_int_mm_rows, _steps_layout, _check_int_mm, by_rows=True),
    _dequantizing("int4", "fp8", torch.float32),
)
