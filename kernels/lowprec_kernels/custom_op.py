"""How an op of namespace `lowprec` is made: of its reference, and of what checks operands and says the result's shape.

`define` registers three forms under the reference's name and signature. Each checks the operands first.

    fake     empty results of the right shape: torch.compile, export, meta tensors
    CUDA     the Triton launcher that `CUDA` names, imported at the first call
    others   the reference

On a CUDA tensor an op never runs the reference: without triton it raises RuntimeError, and what the launcher cannot
compute (float32 x times 16-bit kernels, groups that are no power of two, e4m3 before sm_89) is the launcher's error.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Shape and dtype of every tensor that an op returns.
Result = tuple[tuple[tuple[int, ...], torch.dtype], ...]
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OPS: dict[str, Any] = {}
# Op -> module:function of its launcher, whose first parameters are the op's.
CUDA = {
    "quantize_per_token_int8": "triton_cast:quantize_per_token_int8",
    "quantize_per_token_fp8": "triton_cast:quantize_per_token_fp8",
    "quantize_per_block_fp8": "triton_cast:quantize_per_block_fp8",
    "rms_norm_quantize": "triton_fused_cast:rms_norm_quantize",
    "add_rms_norm_quantize": "triton_fused_cast:add_rms_norm_quantize",
    "silu_mul_quantize": "triton_fused_cast:silu_mul_quantize",
    "w8a8_int8_gemm": "triton_w8a8:w8a8_int8_gemm",
    "w8a8_fp8_gemm": "triton_w8a8:w8a8_fp8_gemm",
    "w8a8_fp8_block_gemm": "triton_w8a8_block:w8a8_fp8_block_gemm",
    "w8a16_gemm": "triton_w8a16:w8a16_gemm",
    "w4a16_gemm": "triton_w4:w4a16_gemm",
    "w4a8_int8_gemm": "triton_w4:w4a8_int8_gemm",
    "w4a8_fp8_gemm": "triton_w4:w4a8_fp8_gemm",
    "nested_gemm": "triton_nested:nested_gemm",
    "moe_w8a8_int8_gemm": "triton_moe:moe_w8a8_int8_gemm",
    "moe_w8a8_fp8_gemm": "triton_moe:moe_w8a8_fp8_gemm",
    "moe_w8a8_fp8_block_gemm": "triton_moe:moe_w8a8_fp8_block_gemm",
    "moe_w4a16_gemm": "triton_moe:moe_w4a16_gemm",
}


@functools.cache
def launcher(op: str) -> Callable[..., Any]:
    """What computes an op on a CUDA device.

    Raises:
        RuntimeError: triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"lowprec::{op} on a GPU needs triton, which is not installed: pip install triton")
    module, _, function = CUDA[op].partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"lowprec_kernels.{module}"), function)
    return found


def expect(name: str, found: Tensor, shape: tuple[int | str, ...], *dtypes: torch.dtype) -> tuple[int, ...]:
    """The operand's shape, which must be `shape` (a letter stands for any size), of one of `dtypes`.

    Raises:
        ValueError: it is of another shape or dtype.
    """
    fits = found.ndim == len(shape) and all(
        isinstance(wanted, str) or wanted == size for wanted, size in zip(shape, found.shape, strict=True)
    )
    if not fits or found.dtype not in dtypes:
        allowed = "float" if dtypes == FLOATS else " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        wanted = f"[{', '.join(map(str, shape))}] {allowed}"
        raise ValueError(f"{name} must be {wanted}, not {found.dtype} {tuple(found.shape)}")
    return found.shape


def float_type(out_dtype: torch.dtype) -> torch.dtype:
    """A dtype that results may have, or ValueError."""
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype must be a float type, not {out_dtype}")
    return out_dtype


def groups(k: int, group_size: int) -> int:
    """Groups of columns in a row of K, or ValueError."""
    if group_size <= 0 or k % group_size:
        raise ValueError(f"K = {k} is not made of groups of {group_size}")
    return k // group_size


def define(reference: Callable[..., Any], result_of: Callable[..., Result]) -> Any:
    """The op of a reference; `result_of` its operands is the result's shapes and dtypes, or ValueError."""
    name = reference.__name__

    def checked(*operands: Any) -> Result:
        try:
            devices = {str(operand.device) for operand in operands if isinstance(operand, Tensor)}
            if len(devices) > 1:
                raise ValueError(f"operands lie on several devices: {', '.join(sorted(devices))}")
            return result_of(*operands)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    @functools.wraps(reference)
    def anywhere(*operands: Any) -> Any:
        checked(*operands)
        return reference(*operands)

    def on_cuda(*operands: Any) -> Any:
        checked(*operands)
        return launcher(name)(*operands)

    def fake(*operands: Any) -> Any:
        found = tuple(operands[0].new_empty(shape, dtype=dtype) for shape, dtype in checked(*operands))
        return found if len(found) > 1 else found[0]

    op = torch.library.custom_op(f"lowprec::{name}", anywhere, mutates_args=())
    op.register_kernel("cuda", on_cuda)
    op.register_fake(fake)
    OPS[name] = op
    return op
