"""The canonical form of a planned layer: DequantizeLinear over its codes, feeding MatMul.

    weight  = (codes - zero_point) * scale      [K, N] float32, exactly `QuantizedWeight.dequantize` transposed
    output  = MatMul(x, weight) (+ bias)

| weights     | codes [K, N]  | scale [K / G, N] or [N] | zero_point [K / G, N] | attributes               |
|-------------|---------------|-------------------------|-----------------------|--------------------------|
| int4, int3  | INT4          | per block               | none                  | axis = 0, block_size = G |
| int4-asym   | UINT4         | per block               | UINT4                 | axis = 0, block_size = G |
| int8        | INT8          | per output channel      | none                  | axis = 1                 |
| fp8         | FLOAT8E4M3FN  | per output channel      | none                  | axis = 1                 |

Rows of two widths (`lowprec.formats.rows`) are two such products, put into the order of the vocabulary by Gather.
[K, N] with axis 0 is what onnxruntime fuses into MatMulNBits. Embeddings keep their weight in float32.

Source: onnx.ai/onnx/operators/onnx__DequantizeLinear.html (opset 21).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lowprec.errors import UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.asymmetric import offset_codes
from lowprec.formats.rows import MixedRows
from lowprec.onnx.graph import Graph, lazy_constant

UINT4_OFFSET = 8
"""From the signed codes that `offset_codes` gives to UINT4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """Layers whose MatMul reads codes now, and those whose rows are read as an embedding's, which stay in float32."""

    layers: tuple[str, ...]
    tables: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Place:
    """A weight in the graph: the nodes that multiply with it, and whether others read its rows."""

    products: list[ir.Node]
    rows: bool


def to_canonical(graph: Graph, solved: Mapping[str, QuantizedWeight]) -> Rewritten:
    """Puts codes into the place of the weights of all planned layers, in place.

    Raises:
        UnsupportedError: planned layers that are not where they should be; a reason for each, and nothing is changed.
    """
    found: dict[str, _Place] = {}
    reasons = []
    for layer, weight in solved.items():
        place = _place(graph, layer, weight)
        if isinstance(place, str):
            reasons.append(f"{layer}: {place}")
        else:
            found[layer] = place
    if reasons:
        raise UnsupportedError("planned layers cannot be rewritten in the graph", tuple(reasons))
    for layer, place in found.items():
        for number, node in enumerate(place.products):
            # Each MatMul gets a DequantizeLinear of its own: runtimes fuse pairs.
            _rewrite(graph.model.graph, node, f"{layer}.{number}" if number else layer, solved[layer])
    return Rewritten(
        layers=tuple(layer for layer, place in found.items() if place.products),
        tables=tuple(layer for layer, place in found.items() if place.rows),
    )


def _place(graph: Graph, layer: str, weight: QuantizedWeight) -> _Place | str:
    """Where the layer's weight is read; or why it cannot be rewritten."""
    if weight.exponents is not None:
        return "its columns are scaled by a layer before it that is not merged into the model"
    value = graph.weight(layer)
    if value is None or value.const_value is None:
        return "the graph has no weight of that name: no output depends on it"
    readers = list(_readers(value))
    for node, index, _ in readers:
        if reason := _refuses(node, index):
            return reason
    if not readers:
        return "no node reads its weight"
    stored, dense = value.const_value.numpy(), weight.dequantize().numpy()
    straight, across = np.array_equal(stored, dense), np.array_equal(stored, dense.T)
    for node, _, turned in readers:
        # MatMul multiplies with [K, N], and Gather reads rows of [N, K].
        if not (straight if turned or node.op_type == "Gather" else across):
            return f"{node.op_type} reads another weight than the one that its codes stand for"
    products = [node for node, _, _ in readers if node.op_type != "Gather"]
    return _Place(products=products, rows=len(products) < len(readers))


def _readers(value: ir.Value, turned: bool = False) -> Iterator[tuple[ir.Node, int, bool]]:
    """(node, number of its input, whether that is transposed) of all that read a weight."""
    for use in value.uses():
        node = use.node
        if node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]:
            yield from _readers(node.outputs[0], not turned)
        else:
            yield node, use.idx, turned != (node.op_type == "Gemm" and _attribute(node, "transB", 0) == 1)


def _refuses(node: ir.Node, index: int) -> str | None:
    """Why a node that reads a weight as its input `index` cannot read codes, None if it can."""
    if (node.op_type, index) in (("MatMul", 1), ("Gather", 0)):
        return None
    if (node.op_type, index) != ("Gemm", 1):
        return f"{node.op_type} reads its weight (input {index}), where MatMul or Gemm is expected"
    plain = _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1.0
    return None if plain and _attribute(node, "transA", 0) == 0 else "its Gemm scales or transposes what it multiplies"


def _attribute(node: ir.Node, name: str, default: float) -> float:
    found = node.attributes.get(name)
    return default if found is None else float(found.value)


def _rewrite(graph: ir.Graph, node: ir.Node, layer: str, weight: QuantizedWeight) -> None:
    x, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    assert x is not None
    made = _product(graph, x, layer, weight)
    if bias is not None:
        made.append(ir.node("Add", [made[-1].outputs[0], bias]))
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, [node.outputs[0]], [made[-1].outputs[0]])


def _product(graph: ir.Graph, x: ir.Value, layer: str, weight: QuantizedWeight) -> list[ir.Node]:
    """x W^T in codes; the last node has the result."""
    fmt = WEIGHT_FORMATS[weight.format]
    if not isinstance(fmt, MixedRows):
        codes = dequantised(graph, layer, weight)
        return [codes, ir.node("MatMul", [x, codes.outputs[0]])]
    rows, fine, coarse = fmt.split(weight)
    parts = [_product(graph, x, f"{layer}.{name}", part) for name, part in (("fine", fine), ("coarse", coarse))]
    order = torch.cat([rows.nonzero().flatten(), (~rows).nonzero().flatten()])
    place = lazy_constant(graph, f"{layer}.place", ir.DataType.INT64, order.shape, lambda: torch.argsort(order).numpy())
    joined = ir.node("Concat", [part[-1].outputs[0] for part in parts], {"axis": -1})
    return [*parts[0], *parts[1], joined, ir.node("Gather", [joined.outputs[0], place], {"axis": -1})]


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
    if fmt.bits == 8 and fmt.symmetric:
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
