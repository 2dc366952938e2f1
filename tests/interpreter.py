"""Triton's interpreter, made right for bfloat16 and e4m3: kernels run on CPU tensors and can be judged.

Importing this module (`conftest.py` does, in every pytest process) switches the interpreter on and mends it. The switch
is read where `@triton.jit` decorates a function, so it must be set before the first kernel is imported. With
`TRITON_INTERPRET=0` in the environment nothing is switched or mended and the same tests run on a GPU; they put their
tensors on `DEVICE`.

What is wrong in the interpreter of triton 3.6.0 and 3.9.0, seen by comparing each with torch (`test_interpreter.py`):

1. A bfloat16 dot multiplies the bit patterns as integers: `tl.dot` of ones gives 16256^2 per term.
2. So do +, -, *, /, minimum and maximum of bfloat16 tensors; comparisons order negative numbers the wrong way round.
   The largest and the smallest of a tensor go through fp32 in Triton itself and are right.
3. fp32 -> bfloat16 truncates, int -> bfloat16 writes the integer as bits, and a bfloat16 constant is truncated (3.9.0)
   or an AttributeError (3.6.0).
4. fp32 -> e4m3 rounds half up and drops the carry out of the mantissa (1.97 becomes 1), and overflow gives NaN or
   garbage; the hardware (`cvt.rn.satfinite`) rounds half to even and saturates at 448. The code of NaN reads as 480.

Every defect is looked for before it is mended: where one is gone, this module raises instead of mending what is right.
What stays wrong raises when a kernel uses it: sums, scans, fma, clamp, unary functions and atomics of bfloat16. e5m2
was not looked at.

The GPU does not warn when a number overflows or is NaN; numpy does, so its warnings are off while a kernel runs.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"

E4M3_MAX = 448.0
TYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
BITS = {1: torch.uint8, 2: torch.uint16}
ARITHMETIC = (np.add, np.subtract, np.multiply, np.divide, np.minimum, np.maximum, np.fmin, np.fmax)
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
REFUSED = (
    (InterpreterBuilder, ("create_fma", "create_clampf", "unary_op", "create_atomic_rmw")),
    (interpreter.ReduceOps, ("sum",)),
    (interpreter.ScanOps, ("cumsum", "cumprod")),
)

Array = NDArray[Any]
Handle = Any
Original = Callable[..., Any]


def is_bfloat16(value: Any) -> bool:
    """Whether the elements of a tensor or its handle (not what they point to) are bfloat16."""
    handle = value.handle if isinstance(value, tl.tensor) else value
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def convert(data: Array, source: tl.dtype, target: tl.dtype) -> Array:
    """Rounds to nearest even, as the hardware does; bfloat16 and e4m3 are kept as their bits."""
    # A copy, because torch wants to be able to write; ascontiguousarray would make a vector of a scalar.
    values = torch.from_numpy(np.array(data, order="C")).view(TYPES[source])
    if target == tl.float8e4nv:
        values = values.to(torch.float32).clamp(-E4M3_MAX, E4M3_MAX)  # NaN stays NaN
    converted = values.to(TYPES[target])
    return (converted.view(BITS[converted.itemsize]) if target in (tl.bfloat16, tl.float8e4nv) else converted).numpy()


def widened(handle: Handle) -> Handle:
    """The same numbers with fp32 in the place of bfloat16."""
    if not is_bfloat16(handle):
        return handle
    return TensorHandle(convert(handle.data, tl.bfloat16, tl.float32), tl.float32)


def narrowed(handle: Handle) -> Handle:
    """fp32 -> bfloat16."""
    return TensorHandle(convert(handle.data, tl.float32, tl.bfloat16), tl.bfloat16)


def convert_float(original: Original, data: Array, source: tl.dtype, target: tl.dtype, mode: Any) -> Array:
    """Defects 3 and 4; other types and rounding modes are left to the original."""
    source, target = source.scalar, target.scalar
    if source in TYPES and target in TYPES and mode in (None, interpreter._ir.ROUNDING_MODE.RTNE):
        return convert(data, source, target)
    return original(data, source, target, mode)


def cast_impl(original: Original, self: Any, handle: Handle, target: tl.dtype) -> Handle:
    """Defect 3: all that is not fp32 goes through it."""
    if target.scalar == tl.bfloat16 and handle.dtype.scalar != tl.float32:
        return narrowed(original(self, handle, tl.float32))
    if is_bfloat16(handle) and target.scalar != tl.float32:
        return original(self, widened(handle), target)
    return original(self, handle, target)


def binary_op(original: Original, self: Any, left: Handle, right: Handle, op: Any) -> Handle:
    """Defect 2."""
    if not is_bfloat16(left) and not is_bfloat16(right):
        return original(self, left, right, op)
    if op in COMPARISONS:
        return TensorHandle(op(widened(left).data, widened(right).data), tl.int1)
    if op in ARITHMETIC:
        return narrowed(original(self, widened(left), widened(right), op))
    raise NotImplementedError(f"the interpreter cannot compute {op} of bfloat16: use fp32")


def create_dot(original: Original, self: Any, left: Handle, right: Handle, total: Handle, *options: Any) -> Handle:
    """Defect 1."""
    return original(self, widened(left), widened(right), total, *options)


def get_bf16(self: Any, value: float) -> Handle:
    """Defect 3, constants."""
    return narrowed(self.get_fp32(value))


def refuse(original: Original, self: Any, *arguments: Any) -> Handle:
    """Says that a function would be wrong instead of computing it."""
    if any(map(is_bfloat16, arguments)):
        raise NotImplementedError(f"the interpreter cannot compute {original.__name__} of bfloat16: use fp32")
    return original(self, *arguments)


def silent(original: Original, self: Any, *arguments: Any, **options: Any) -> None:
    """Runs a kernel with numpy's warnings off."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        original(self, *arguments, **options)


def _handle(value: float, dtype: tl.dtype) -> Handle:
    data = np.array([[value]], np.float32)
    return TensorHandle(convert(data, tl.float32, dtype) if dtype in TYPES else data.astype(np.int8), dtype)


def defects() -> dict[str, bool]:
    """Which of the defects this triton has, each by one number and the bits that it should give."""
    builder = InterpreterBuilder()
    one, two, minus_one = (_handle(value, tl.bfloat16) for value in (1, 2, -1))
    halfway = 1 + 3 / 256  # between 1 + 2/256 and 1 + 4/256; the latter is even
    nearest = interpreter._ir.ROUNDING_MODE.RTNE
    nan = np.array([[0x7F]], np.uint8)
    checks: dict[str, tuple[Callable[[], Array], int]] = {
        "bfloat16 dot": (lambda: builder.create_dot(one, one, _handle(0, tl.float32), None, 0).data, 1),
        "bfloat16 addition": (lambda: builder.create_fadd(one, two).data, 0x4040),
        "bfloat16 comparison": (lambda: builder.create_fcmpOLT(minus_one, one).data, True),
        "fp32 -> bfloat16": (lambda: builder.cast_impl(_handle(halfway, tl.float32), tl.bfloat16).data, 0x3F82),
        "int -> bfloat16": (lambda: builder.cast_impl(_handle(1, tl.int8), tl.bfloat16).data, 0x3F80),
        "bfloat16 constant": (lambda: builder.get_bf16(halfway).data, 0x3F82),
        "fp32 -> e4m3": (
            lambda: interpreter._convert_float(_handle(1.97, tl.float32).data, tl.float32, tl.float8e4nv, nearest),
            0x40,
        ),
        "NaN of e4m3": (
            lambda: np.isnan(interpreter._convert_float(nan, tl.float8e4nv, tl.float16, None).view(np.float16)),
            True,
        ),
    }
    return {name: not _gives(compute, bits) for name, (compute, bits) in checks.items()}


def _gives(compute: Callable[[], Array], bits: int) -> bool:
    try:
        return bool(np.ravel(compute())[0] == bits)
    except AttributeError:  # get_bf16 is missing from 3.6.0
        return False


def _replace(owner: Any, name: str, mended: Original) -> None:
    original = getattr(owner, name)  # AttributeError: this triton is built otherwise

    @functools.wraps(original)
    def call(*arguments: Any, **options: Any) -> Any:
        return mended(original, *arguments, **options)

    setattr(owner, name, call)


def mend() -> None:
    """Replaces what is wrong.

    Raises:
        RuntimeError: this triton does not have one of the defects.
    """
    gone = [name for name, found in defects().items() if not found]
    if gone:
        raise RuntimeError(f"triton {triton.__version__} is right where it was wrong, drop the mend: {', '.join(gone)}")
    _replace(interpreter, "_convert_float", convert_float)
    for function in (cast_impl, binary_op, create_dot):
        _replace(InterpreterBuilder, function.__name__, function)
    for owner, names in REFUSED:
        for name in names:
            _replace(owner, name, refuse)
    _replace(interpreter.GridExecutor, "__call__", silent)
    InterpreterBuilder.get_bf16 = get_bf16


if INTERPRETED:
    mend()
