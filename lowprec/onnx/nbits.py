"""com.microsoft MatMulNBits: onnxruntime's product with codes of 4 and 8 bits.

    y = x W^T (+ bias),   W[n, k] = (B[n, k] - zero_point[n, k / G]) * scale[n, k / G]

| weights    | bits | B [N, ceil(K/G), G bits/8] uint8     | scales [N, ceil(K/G)] | zero_points                |
|------------|------|--------------------------------------|-----------------------|----------------------------|
| int4, int3 | 4    | codes + 8, the even column low       | as they are           | none: 8                    |
| int4-asym  | 4    | codes from the smallest of the group | as they are           | [N, ceil(K/G/2)], even low |
| int8, int6 | 8    | codes + 128                          | the row's, repeated   | none: 128                  |

INT8 rows of one scale take any G that the operator has, exactly. Where G does not divide K the last block ends in 0.
What x is rounded to is the accuracy level: at 1 it stays in float32; at 4 each block of G of its values is rounded to
INT8, by its absolute maximum / 127, which is another scheme. At level 1 onnxruntime has no kernel for 8 bits: it writes
the whole weight out in float32 at every call.

Source: github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, MatMulNBits; mlas, sqnbitgemm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn.functional import pad

from lowprec.errors import UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight, held_bits
from lowprec.formats.asymmetric import offset_codes
from lowprec.formats.rows import MixedRows
from lowprec.onnx.graph import lazy_constant

DOMAIN = "com.microsoft"
AccuracyLevel = Literal[1, 4]
EXACT: AccuracyLevel = 1
FAST: AccuracyLevel = 4
INT8_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How a weight lies in MatMulNBits: bits of a code, columns of a block, whether zero points are stored."""

    bits: int
    size: int
    zeros: bool


def refuses_nbits(name: str) -> str | None:
    """Why weights of the format `name` cannot be MatMulNBits' operand, None if they can."""
    fmt = WEIGHT_FORMATS[name]
    if isinstance(fmt, MixedRows):
        return f"rows of two widths, as in {name}, are two products"
    if fmt.code_dtype.is_floating_point:
        return f"MatMulNBits takes integers, {name} is floating point"
    if held_bits(fmt) == 8 and fmt.symmetric and fmt.group_size is None:
        return None
    narrow = fmt.bits == 4 or (fmt.bits < 4 and fmt.symmetric)
    return None if narrow and fmt.group_size is not None else f"MatMulNBits has no form of {name}"


def blocks_of(name: str) -> Blocks:
    """How weights of the format `name` lie in MatMulNBits.

    Raises:
        UnsupportedError: not at all.
    """
    if reason := refuses_nbits(name):
        raise UnsupportedError(f"weights in {name} are no operand of MatMulNBits", (reason,))
    fmt = WEIGHT_FORMATS[name]
    return Blocks(bits=held_bits(fmt), size=fmt.group_size or INT8_BLOCK, zeros=not fmt.symmetric)


def matmul_nbits(
    graph: ir.Graph,
    x: ir.Value,
    layer: str,
    weight: QuantizedWeight,
    accuracy_level: AccuracyLevel,
    bias: ir.Value | None = None,
) -> list[ir.Node]:
    """The product of x [..., K] with the codes of `weight` [N, K]: nodes, the last of which gives [..., N].

    Args:
        graph: takes the initializers.
        layer: what their names begin with.
        weight: of one width; arrays are made when they are written.
        accuracy_level: 1 or 4, see above.
        bias: [N], added to it.

    Raises:
        UnsupportedError: codes that the operator does not take.
    """
    blocks = blocks_of(weight.format)
    (n, k), inputs = weight.codes.shape, [x, *packed(graph, layer, weight)]
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias]
    attributes = {
        "K": k, "N": n, "bits": blocks.bits, "block_size": blocks.size, "accuracy_level": accuracy_level
    }  # fmt: skip
    return [ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, name=layer)]


def packed(graph: ir.Graph, layer: str, weight: QuantizedWeight) -> list[ir.Value]:
    """B, scales and, of formats that have them, zero points of a weight, as constants of the graph.

    Asked again for a layer, they are those that the graph has.
    """
    blocks, (n, k) = blocks_of(weight.format), weight.codes.shape
    count = -(-k // blocks.size)
    kinds = ir.DataType.UINT8, ir.DataType.FLOAT
    made = [
        lazy_constant(
            graph, f"{layer}.codes", kinds[0], (n, count, blocks.size * blocks.bits // 8), lambda: _codes(weight)
        ),
        lazy_constant(graph, f"{layer}.scale", kinds[1], (n, count), lambda: scales(weight)),
    ]
    if blocks.zeros:
        made.append(lazy_constant(graph, f"{layer}.zero_point", kinds[0], (n, -(-count // 2)), lambda: _zeros(weight)))
    return made


def merged(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights [N_i, K] of one format as one [sum N_i, K], each row as it was."""
    first = weights[0]
    if any(w.format != first.format or w.exponents is not None for w in weights):
        raise ValueError(f"weights of {sorted({w.format for w in weights})} have no rows in common")
    return QuantizedWeight(
        format=first.format, codes=torch.cat([w.codes for w in weights]), scale=torch.cat([w.scale for w in weights])
    )


def _codes(weight: QuantizedWeight) -> np.ndarray[Any, Any]:
    blocks, (n, k) = blocks_of(weight.format), weight.codes.shape
    codes = offset_codes(weight)[0] if blocks.zeros else weight.codes
    offset = pad(codes, (0, -k % blocks.size)).to(torch.int16) + (1 << (blocks.bits - 1))
    return _bytes(offset.to(torch.uint8), blocks.bits).reshape(n, -1, blocks.size * blocks.bits // 8).numpy()


def scales(weight: QuantizedWeight) -> np.ndarray[Any, Any]:
    """[N, ceil(K / G)] float32."""
    blocks, (n, k) = blocks_of(weight.format), weight.codes.shape
    return weight.scale.float().expand(n, -(-k // blocks.size)).contiguous().numpy()


def zero_points(weight: QuantizedWeight) -> np.ndarray[Any, Any]:
    """[N, K / G] uint8, a byte for each, of a format that has them."""
    return (offset_codes(weight)[1] + 8).to(torch.uint8).numpy()


def _zeros(weight: QuantizedWeight) -> np.ndarray[Any, Any]:
    zeros = torch.from_numpy(zero_points(weight))
    return _bytes(pad(zeros, (0, zeros.shape[1] % 2)), 4).numpy()


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """[N, K] codes from 0 -> bytes, of 4 bits two in each, the first one low."""
    return codes if bits == 8 else codes[:, ::2] | (codes[:, 1::2] << 4)
