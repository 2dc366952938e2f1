"""The canonical form of a planned layer: DequantizeLinear over its codes, feeding MatMul.

    weight  = (codes - zero_point) * scale      [K, N] float32, exactly `QuantizedWeight.dequantize` transposed
    output  = MatMul(x, weight) (+ bias)

| weights     | codes [K, N]  | scale [K / G, N] or [N] | zero_point [K / G, N] | attributes               |
|-------------|---------------|-------------------------|-----------------------|--------------------------|
| int4, int3  | INT4          | per block               | none                  | axis = 0, block_size = G |
| int4-asym   | UINT4         | per block               | UINT4                 | axis = 0, block_size = G |
| int8, int6  | INT8          | per output channel      | none                  | axis = 1                 |
| fp8         | FLOAT8E4M3FN  | per output channel      | none                  | axis = 1                 |

Rows of two widths (`lowprec.formats.rows`) are two such products, put into the order of the vocabulary by Gather.
[K, N] with axis 0 is what onnxruntime fuses into MatMulNBits. Embeddings keep their weight in float32.

Source: onnx.ai/onnx/operators/onnx__DequantizeLinear.html (opset 21).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lowprec.errors import UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight, held_bits
from lowprec.formats.asymmetric import offset_codes
from lowprec.formats.rows import MixedRows
from lowprec.onnx.graph import Graph, lazy_constant
from lowprec.onnx.places import find_places, in_two_widths, replace_product

UINT4_OFFSET = 8
"""From the signed codes that `offset_codes` gives to UINT4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """Layers whose MatMul reads codes now, and those whose rows are read as an embedding's, which stay in float32."""

    layers: tuple[str, ...]
    tables: tuple[str, ...]


def to_canonical(graph: Graph, solved: Mapping[str, QuantizedWeight]) -> Rewritten:
    """Puts codes into the place of the weights of all planned layers, in place.

    Raises:
        UnsupportedError: planned layers that are not where they should be; a reason for each, and nothing is changed.
    """
    found = find_places(graph, solved)
    for layer, place in found.items():
        for number, node in enumerate(place.products):
            # Each MatMul gets a DequantizeLinear of its own: runtimes fuse pairs.
            name = f"{layer}.{number}" if number else layer
            replace_product(graph.model.graph, node, partial(_product, layer=name, weight=solved[layer]))
    return Rewritten(
        layers=tuple(layer for layer, place in found.items() if place.products),
        tables=tuple(layer for layer, place in found.items() if place.gathers),
    )


def _product(graph: ir.Graph, x: ir.Value, layer: str, weight: QuantizedWeight) -> list[ir.Node]:
    """x W^T in codes; the last node has the result."""
    fmt = WEIGHT_FORMATS[weight.format]
    if not isinstance(fmt, MixedRows):
        codes = dequantised(graph, layer, weight)
        return [codes, ir.node("MatMul", [x, codes.outputs[0]])]
    return in_two_widths(graph, x, layer, weight, _product)


def dequantised(graph: ir.Graph, layer: str, weight: QuantizedWeight) -> ir.Node:
    """DequantizeLinear with the codes of `weight` [N, K]: its output is the weight [K, N].

    Args:
        graph: takes the initializers.
        layer: what their names begin with.
        weight: of one width; arrays are made when they are written.
    """
    n, k = weight.codes.shape
    groups = weight.scale.shape[1]
    grouped = WEIGHT_FORMATS[weight.format].group_size is not None
    kind, zero = onnx_type(weight.format), not WEIGHT_FORMATS[weight.format].symmetric
    scales = (groups, n) if grouped else (n,)
    parts = [
        lazy_constant(graph, f"{layer}.codes", kind, (k, n), lambda: _codes(weight, kind)),
        lazy_constant(
            graph, f"{layer}.scale", ir.DataType.FLOAT, scales, lambda: _across(weight.scale.float()).reshape(scales)
        ),
    ]
    if zero:
        parts.append(lazy_constant(graph, f"{layer}.zero_point", kind, scales, lambda: _zeros(weight, kind)))
    attributes = {"axis": 0, "block_size": k // groups} if grouped else {"axis": 1}
    made = ir.node("DequantizeLinear", parts, attributes)
    made.outputs[0].name = f"{layer}.dequantized"
    return made


def onnx_type(name: str) -> ir.DataType:
    """The ONNX type of the codes of a weight format of one width.

    Raises:
        UnsupportedError: there is none.
    """
    fmt = WEIGHT_FORMATS[name]
    if fmt.code_dtype == torch.float8_e4m3fn:
        return ir.DataType.FLOAT8E4M3FN
    if held_bits(fmt) == 8 and fmt.symmetric:
        return ir.DataType.INT8
    if fmt.bits == 4 or (fmt.bits < 4 and fmt.symmetric):
        return ir.DataType.INT4 if fmt.symmetric else ir.DataType.UINT4
    raise UnsupportedError(f"codes of {name} have no type in ONNX", (f"{fmt.bits} bits, symmetric: {fmt.symmetric}",))


def _codes(weight: QuantizedWeight, kind: ir.DataType) -> np.ndarray[Any, Any]:
    if kind == ir.DataType.FLOAT8E4M3FN:
        return _across(weight.codes.view(torch.uint8)).view(kind.numpy())
    codes = offset_codes(weight)[0] + UINT4_OFFSET if kind == ir.DataType.UINT4 else weight.codes
    return _across(codes).astype(kind.numpy())


def _zeros(weight: QuantizedWeight, kind: ir.DataType) -> np.ndarray[Any, Any]:
    return _across(offset_codes(weight)[1] + UINT4_OFFSET).astype(kind.numpy())


def _across(rows: Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(rows.numpy().T)
