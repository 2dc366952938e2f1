"""Nested weights on CPUs: one storage, two levels, chosen by an argument of the call.

    level 4   y = sum_g s[n, g]           sum_{k in g} x[k] (q[n, k] - 8 - z[n, g])                       + b[n]
    level 8   the same, and               sum_g s[n, g] / m[n, g] sum_{k in g} x[k] (r[n, k] - 8)

q and r are the stored nibbles of the two planes (`packing.py`). Two forms, and neither makes a copy of a weight:

    native      few rows, in C++ (`cpu_nested.cpp`), built when it is first used (`native.py`). x is rounded to 16 bits
                with a scale for each row and group (2e-5 in relative error of normal values, bfloat16 has 2e-3), and
                taken apart into two signed bytes; each meets the unsigned nibbles in the instructions that processors
                have for that (VNNI, AVX2, NEON, or what the compiler makes of plain C++), all sums within a group
                exact. A row is computed alike, whatever the number of rows and threads.
    dequantize  many rows, and few where the native form cannot be had: upcasts a block of rows of the weight at a time,
                then multiplies, in float32 or, for x in bfloat16, in the faster of the two on this processor, as one
                measurement tells (`product_dtype`). For few rows it is many times slower; `few_rows_form` tells which
                one runs.

A row of x that holds NaN or infinity gives NaN in the native form. Left out: quantised activations.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec_kernels.native import NativeError, library
from lowprec_kernels.packing import CHUNK, PLANE, row_blocks, unpack_int4, words_for
from lowprec_kernels.reference import NESTED_LEVELS
from lowprec_kernels.timing import time_interleaved

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_nested.cpp")
# Beyond this many rows the matmul of upcast blocks is faster.
FEW_ROWS = 64
# Longest group whose integer sums fit 32 bits.
LONGEST_GROUP = 4096
BLOCK_WEIGHTS = 1 << 20
DEQUANTIZE = "dequantize"
# Rows and width of the product that tells which dtype is multiplied faster.
PROBE = (256, 512)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NestedOperands:
    """One layer's weight as it is stored.

    Attributes:
        base, residual: [N, words_for(K)] int32, the two planes.
        scale: [N, K/G] bfloat16, of level 4.
        ratio: [N, K/G] int8, steps of level 8 in one of level 4.
        zero: [N, K/G] int8, the code that stands for zero in each group; None for 0.
        bias: [N] float32 or None.
        group_size: G.
    """

    base: Tensor
    residual: Tensor
    scale: Tensor
    ratio: Tensor
    zero: Tensor | None
    bias: Tensor | None
    group_size: int

    def __post_init__(self) -> None:
        n, groups = self.scale.shape
        expected = {
            "base": (torch.int32, (n, words_for(self.k))),
            "residual": (torch.int32, (n, words_for(self.k))),
            "scale": (torch.bfloat16, (n, groups)),
            "ratio": (torch.int8, (n, groups)),
            "zero": (torch.int8, (n, groups)),
            "bias": (torch.float32, (n,)),
        }
        for name, (dtype, shape) in expected.items():
            found: Tensor | None = getattr(self, name)
            if found is not None and (found.dtype != dtype or found.shape != shape or not found.is_contiguous()):
                raise ValueError(f"{name} must be {dtype} {shape}, contiguous, not {found.dtype} {tuple(found.shape)}")

    @property
    def n(self) -> int:
        """Output width."""
        return self.scale.shape[0]

    @property
    def k(self) -> int:
        """Input width."""
        return self.scale.shape[1] * self.group_size


def native_reason(group_size: int) -> str | None:
    """None if the native form can run here, else why it cannot."""
    if group_size != PLANE and (group_size % CHUNK or group_size > LONGEST_GROUP):
        return f"groups must be {PLANE} columns, or a multiple of {CHUNK} up to {LONGEST_GROUP}, not {group_size}"
    found = _native()
    return found if isinstance(found, str) else None


def few_rows_form(group_size: int) -> str:
    """What computes few rows: "native-avx512-vnni", "native-avx2", ..., or "dequantize"."""
    if native_reason(group_size) is not None:
        return DEQUANTIZE
    found = _native()
    assert not isinstance(found, str)
    return f"native-{instructions_of(found)}"


def instructions_of(built: ctypes.CDLL) -> str:
    """The instructions that a built library uses."""
    return str(built.lowprec_nested_path().decode())


@functools.cache
def _native() -> ctypes.CDLL | str:
    """The library, or why there is none, which is logged once."""
    try:
        return typed(library(SOURCE))
    except NativeError as error:
        log.warning("nested weights run %s, many times slower for few rows: %s", DEQUANTIZE, error)
        return str(error)


def typed(built: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the signatures of its functions."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    built.lowprec_nested_path.restype = ctypes.c_char_p
    built.lowprec_nested_gemm.restype = None
    built.lowprec_nested_gemm.argtypes = [
        pointer, number, number, pointer, pointer, pointer, pointer, pointer, number, pointer, pointer, number,
        ctypes.c_bool,
    ]  # fmt: skip
    return built


def nested_gemm(operands: NestedOperands, x: Tensor, level: int) -> Tensor:
    """x [M, K] float32 or bfloat16 -> [M, N] in x's dtype, at level 4 or 8.

    Raises:
        ValueError: another level, width or dtype.
    """
    if level not in NESTED_LEVELS:
        raise ValueError(f"level must be one of {NESTED_LEVELS}, not {level}")
    if x.ndim != 2 or x.shape[1] != operands.k or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x must be [M, {operands.k}] float32 or bfloat16, not {x.dtype} {tuple(x.shape)}")
    if x.shape[0] == 0:
        return x.new_empty((0, operands.n))
    if x.shape[0] <= FEW_ROWS and native_reason(operands.group_size) is None:
        built = _native()
        assert not isinstance(built, str)
        return native(built, operands, x, level)
    return dequantizing(operands, x, level)


def native(built: ctypes.CDLL, operands: NestedOperands, x: Tensor, level: int) -> Tensor:
    """The native form, by a library of any instructions."""
    x = x.contiguous()
    y = torch.empty(x.shape[0], operands.n, dtype=x.dtype)
    built.lowprec_nested_gemm(
        x.data_ptr(),
        x.shape[0],
        operands.k,
        operands.base.data_ptr(),
        operands.residual.data_ptr() if level == 8 else None,
        operands.scale.data_ptr(),
        operands.ratio.data_ptr(),
        None if operands.zero is None else operands.zero.data_ptr(),
        operands.group_size,
        None if operands.bias is None else operands.bias.data_ptr(),
        y.data_ptr(),
        operands.n,
        x.dtype == torch.bfloat16,
    )
    return y


@functools.cache
def product_dtype(given: torch.dtype) -> torch.dtype:
    """What x of this dtype is multiplied in with many rows; measured once, for bfloat16."""
    if given != torch.bfloat16:
        return torch.float32
    x, w = torch.ones(*PROBE), torch.ones(PROBE[1], PROBE[1])
    made = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
    found = time_interleaved({name: _product(x, w, dtype) for name, dtype in made.items()}, seconds_per_candidate=0.03)
    return made[min(found, key=lambda name: found[name].p50_us)]


def _product(x: Tensor, w: Tensor, dtype: torch.dtype) -> Callable[[int], object]:
    """As `dequantizing` has it: x in the dtype already, the weight in float32."""
    values = x.to(dtype)
    return lambda copy: F.linear(values, w.to(dtype))


def dequantizing(operands: NestedOperands, x: Tensor, level: int) -> Tensor:
    """The form that upcasts blocks of rows of the weight."""
    dtype = product_dtype(x.dtype)
    values = x.to(dtype)
    blocks = row_blocks(operands.n, operands.k, BLOCK_WEIGHTS)
    parts = [F.linear(values, dense(operands, level, rows).to(dtype)) for rows in blocks]
    y = torch.cat(parts, dim=1).to(torch.float32)
    return (y if operands.bias is None else y.add_(operands.bias)).to(x.dtype)


def dense(operands: NestedOperands, level: int, rows: slice = slice(None)) -> Tensor:
    """Rows of the weight at a level, [R, K] float32: codes times scale, rounded once."""
    scale = operands.scale[rows].to(torch.float32)
    codes = unpack_int4(operands.base[rows], operands.k).to(torch.float32).view(*scale.shape, -1)
    if operands.zero is not None:
        codes = codes - operands.zero[rows, :, None]
    if level == 8:
        ratio = operands.ratio[rows]
        rest = unpack_int4(operands.residual[rows], operands.k).view(*scale.shape, -1)
        codes, scale = codes * ratio[..., None] + rest, scale / ratio
    return (codes * scale[..., None]).flatten(1)
