"""The slow truth of the grouped matmuls of a mixture of experts, by name in `REFERENCES`.

    y[i, n] = row_weight[i] * sum_k x[rows[i], k] w[e, n, k]     where offsets[e] <= i < offsets[e + 1]

A loop over the experts in float64, rounded once. Scales, codes and values that are not finite are those of
`reference.py`, with an E in front of the weights' shapes. Rows behind the last offset are 0.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowprec_kernels.packing import unpack_int4
from lowprec_kernels.reference import per_element


def _by_expert(
    x: Tensor, w: Tensor, offsets: Tensor, rows: Tensor | None, row_weight: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """x [X, K], w [E, N, K] float64 -> [T, N]."""
    x = x if rows is None else x[rows.long()]
    y = x.new_zeros(len(x), w.shape[1])
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        y[begin:end] = x[begin:end] @ w[expert].t()
    return (y if row_weight is None else y * row_weight.to(torch.float64)[:, None]).to(out_dtype)


def moe_w8a8_int8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    row_weight: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """[X, K] int8, [X, 1], [E, N, K] int8, [E, N, 1], [E + 1], [T] or None, [T] or None -> [T, N] `out_dtype`."""
    x = x_codes.to(torch.float64) * x_scale.to(torch.float64)
    w = w_codes.to(torch.float64) * w_scale.to(torch.float64)
    return _by_expert(x, w, offsets, rows, row_weight, out_dtype)


def moe_w8a8_fp8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    row_weight: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The same of e4m3 codes."""
    return moe_w8a8_int8_gemm(x_codes, x_scale, w_codes, w_scale, offsets, rows, row_weight, out_dtype)


def moe_w8a8_fp8_block_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    row_weight: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The same with x_scale [X, ceil(K/128)], w_scale [E, ceil(N/128), ceil(K/128)]."""
    x = x_codes.to(torch.float64) * per_element(x_scale, x_codes.shape, 1)
    w = w_codes.to(torch.float64) * per_element(w_scale, w_codes.shape, 2)
    return _by_expert(x, w, offsets, rows, row_weight, out_dtype)


def moe_w4a16_gemm(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    row_weight: Tensor | None,
    group_size: int,
) -> Tensor:
    """[X, K] float, [E, N, words_for(K)] int32, [E, N, K/G], [E + 1], [T] or None, [T] or None -> [T, N], x's dtype."""
    codes = unpack_int4(w_packed, x.shape[1]).to(torch.float64)
    w = codes * w_scale.to(torch.float64).repeat_interleave(group_size, 2)
    return _by_expert(x.to(torch.float64), w, offsets, rows, row_weight, x.dtype)


REFERENCES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (moe_w8a8_int8_gemm, moe_w8a8_fp8_gemm, moe_w8a8_fp8_block_gemm, moe_w4a16_gemm)
}
