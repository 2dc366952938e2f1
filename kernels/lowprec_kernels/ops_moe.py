"""The contract of grouped matmuls of a mixture of experts; numbers: `reference_moe.py`, the method: `triton_moe.py`.

| op | operands | result |
|---|---|---|
| moe_w8a8_int8_gemm, moe_w8a8_fp8_gemm | x_codes[X,K], x_scale[X,1], w_codes[E,N,K], w_scale[E,N,1], R, out_dtype | y |
| moe_w8a8_fp8_block_gemm | x_codes, x_scale[X,K/128], w_codes, w_scale[E,N/128,K/128], R, out_dtype | y |
| moe_w4a16_gemm | x[X,K] float, w_packed[E,N,P] int32, w_scale[E,N,K/G], R, group_size | y in x's dtype |

y is [T,N]. R, the routing, all contiguous: offsets[E+1] int32, where each expert's rows of y begin; rows[T]? int32,
each row's row of x (None: x is sorted and T = X); row_weight[T]? float32, the router's. Numbers of blocks are rounded
up. Rows of y behind the last offset are not written on a GPU. Everything else is as in `ops.py`.
"""

import functools

import torch
from torch import Tensor

from lowprec_kernels import reference_moe
from lowprec_kernels.custom_op import FLOATS, Result, define, expect, float_type, groups
from lowprec_kernels.packing import words_for
from lowprec_kernels.reference import SCALE_BLOCK


def _rows(x: Tensor, experts: int, offsets: Tensor, rows: Tensor | None, row_weight: Tensor | None) -> int:
    """T, the rows of y."""
    expect("offsets", offsets, (experts + 1,), torch.int32)
    total = x.shape[0] if rows is None else expect("rows", rows, ("T",), torch.int32)[0]
    if row_weight is not None:
        expect("row_weight", row_weight, (total,), torch.float32)
    return total


def _w8a8(
    dtype: torch.dtype,
    block: int | None,
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    row_weight: Tensor | None,
    out_dtype: torch.dtype,
) -> Result:
    """`block`: the side of blocks that share a scale, None where whole rows do."""
    x_rows, k = expect("x_codes", x_codes, ("X", "K"), dtype)
    experts, n, _ = expect("w_codes", w_codes, ("E", "N", k), dtype)
    down, across = (n, 1) if block is None else (-(-n // block), -(-k // block))
    expect("x_scale", x_scale, (x_rows, across), torch.float32)
    expect("w_scale", w_scale, (experts, down, across), torch.float32)
    return (((_rows(x_codes, experts, offsets, rows, row_weight), n), float_type(out_dtype)),)


def _w4a16(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    row_weight: Tensor | None,
    group_size: int,
) -> Result:
    _, k = expect("x", x, ("X", "K"), *FLOATS)
    experts, n, _ = expect("w_packed", w_packed, ("E", "N", words_for(k)), torch.int32)
    expect("w_scale", w_scale, (experts, n, groups(k, group_size)), torch.float32)
    return (((_rows(x, experts, offsets, rows, row_weight), n), x.dtype),)


_of_int8 = functools.partial(_w8a8, torch.int8, None)
_of_fp8 = functools.partial(_w8a8, torch.float8_e4m3fn, None)
_of_fp8_blocks = functools.partial(_w8a8, torch.float8_e4m3fn, SCALE_BLOCK)

moe_w8a8_int8_gemm = define(reference_moe.moe_w8a8_int8_gemm, _of_int8)
moe_w8a8_fp8_gemm = define(reference_moe.moe_w8a8_fp8_gemm, _of_fp8)
moe_w8a8_fp8_block_gemm = define(reference_moe.moe_w8a8_fp8_block_gemm, _of_fp8_blocks)
moe_w4a16_gemm = define(reference_moe.moe_w4a16_gemm, _w4a16)
