"""Embeddings that read their rows in codes: com.microsoft GatherBlockQuantized.

    row i  ->  (B[i] - zero_point[i]) * scale[i], blocks along the row      data [N, K / G, G bits / 8] uint8

A table that is tied to the head has its codes in the file once: the operator takes MatMulNBits' own layout as it is,
[N, K / G, ...] with the block as last axis, and gives [..., K / G, G], which Reshape makes a row of. Rows of two widths
are the sum of two such look-ups: a row that a table lacks has an index beyond its end, which reads as zeros.

Source: github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, GatherBlockQuantized.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.rows import MixedRows
from lowprec.onnx.graph import Graph, constant, lazy_constant, stored
from lowprec.onnx.nbits import DOMAIN, blocks_of, packed, refuses_nbits, scales, zero_points
from lowprec.onnx.places import Place, replace_nodes


def to_coded_tables(graph: Graph, solved: Mapping[str, QuantizedWeight], places: Mapping[str, Place]) -> dict[str, str]:
    """Puts codes into the place of the weights whose rows are read, in place.

    Returns:
        Layer -> why its rows stay in float32.
    """
    kept = {}
    for layer, place in places.items():
        if not place.gathers:
            continue
        if reason := _refuses(solved[layer]):
            kept[layer] = reason
            continue
        for node in place.gathers:
            ids = node.inputs[1]
            assert ids is not None
            replace_nodes(graph.model.graph, node, _rows(graph.model.graph, ids, layer, solved[layer]))
    return kept


def _refuses(weight: QuantizedWeight) -> str | None:
    fmt = WEIGHT_FORMATS[weight.format]
    return None if isinstance(fmt, MixedRows) else refuses_nbits(fmt.name)


def _rows(graph: ir.Graph, ids: ir.Value, layer: str, weight: QuantizedWeight) -> list[ir.Node]:
    """Rows of the weight; the last node has them, [..., K]."""
    fmt = WEIGHT_FORMATS[weight.format]
    if not isinstance(fmt, MixedRows):
        return _look_up(graph, ids, layer, weight)
    which, fine, coarse = fmt.split(weight)
    found = []
    for name, part, rows in (("fine", fine, which), ("coarse", coarse, ~which)):
        place = np.where(rows.numpy(), rows.numpy().cumsum() - 1, len(part.codes))
        index = stored(graph, f"{layer}.{name}.index", place)
        moved = ir.node("Gather", [index, ids], {"axis": 0})
        found.append([moved, *_look_up(graph, moved.outputs[0], f"{layer}.{name}", part)])
    return [*found[0], *found[1], ir.node("Add", [nodes[-1].outputs[0] for nodes in found])]


def _look_up(graph: ir.Graph, ids: ir.Value, layer: str, weight: QuantizedWeight) -> list[ir.Node]:
    blocks, (n, k) = blocks_of(weight.format), weight.codes.shape
    codes = packed(graph, layer, weight)[0]
    width = -(-k // blocks.size)
    # The operator wants all of one rank, so scales and zero points get an axis of length 1 beside the block's.
    inputs = [
        codes,
        ids,
        lazy_constant(graph, f"{layer}.row_scale", ir.DataType.FLOAT, (n, width, 1), lambda: scales(weight)[..., None]),
    ]
    if blocks.zeros:
        inputs.append(
            lazy_constant(
                graph,
                f"{layer}.row_zero_point",
                ir.DataType.UINT8,
                (n, width, 1),
                lambda: zero_points(weight)[..., None],
            )
        )
    attributes = {"bits": blocks.bits, "block_size": blocks.size, "gather_axis": 0, "quantize_axis": 2}
    found = ir.node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN, name=f"{layer}.rows")
    shape = constant(graph, f"{layer}.row_shape", [0, 0, width * blocks.size])
    nodes = [found, ir.node("Reshape", [found.outputs[0], shape])]
    if width * blocks.size > k:
        bounds = [
            constant(graph, f"{layer}.row_{name}", [value]) for name, value in (("start", 0), ("end", k), ("axis", -1))
        ]
        nodes.append(ir.node("Slice", [nodes[-1].outputs[0], *bounds]))
    return nodes
