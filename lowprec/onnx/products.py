"""Planned layers as onnxruntime's own products over codes, one for all layers that share input and scheme.

    q, k, v and gate, up  ->  one product of all their rows, then Split
    rows of two widths    ->  two products, put into the order of the rows by Gather
    FP8                   ->  MatMul with the weight in float32: onnxruntime would make it that at every step

One product over more rows starts the threads once and fills both of them, where K and V alone are too small to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import onnx_ir as ir

from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.rows import MixedRows
from lowprec.onnx.graph import Graph, constant, lazy_constant
from lowprec.onnx.nbits import AccuracyLevel, matmul_nbits, merged, refuses_nbits
from lowprec.onnx.phases import matmul_in_phases
from lowprec.onnx.places import Place, in_two_widths, replace_product, take_place
from lowprec.onnx.token import matmul_token

TOKEN: Literal["token"] = "token"
PHASES: Literal["phases"] = "phases"
Level = AccuracyLevel | Literal["token", "phases"]
"""How a product rounds its inputs: MatMulNBits' accuracy levels, INT8 by token, or either by how many rows there are
(`lowprec.onnx.token`, `lowprec.onnx.phases`)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """One node that multiplies with a planned weight."""

    node: ir.Node
    layer: str
    weight: QuantizedWeight
    level: Level

    @property
    def key(self) -> tuple[object, ...]:
        """What layers must have in common to be one product: the input and how it is multiplied."""
        alone = (self.node,) if len(self.node.inputs) > 2 or refuses_nbits(self.weight.format) else ()
        return (self.node.inputs[0], self.weight.format, self.level, *alone)


def to_products(
    graph: Graph,
    solved: Mapping[str, QuantizedWeight],
    places: Mapping[str, Place],
    levels: Mapping[str, Level],
) -> tuple[str, ...]:
    """Puts codes into the place of the weights of all planned layers, in place.

    Args:
        graph: as it was traced.
        solved, places: layer -> weight, and where it is read.
        levels: layer -> accuracy level.

    Returns:
        The layers whose weights became float32, because onnxruntime has no kernel for their codes.
    """
    parts: dict[tuple[object, ...], list[_Part]] = {}
    for layer, place in places.items():
        for number, node in enumerate(place.products):
            name = f"{layer}.{number}" if number else layer
            part = _Part(node=node, layer=name, weight=solved[layer], level=levels[layer])
            parts.setdefault(part.key, []).append(part)
    order = {node: number for number, node in enumerate(graph.model.graph)}
    for alike in parts.values():
        alike.sort(key=lambda part: order[part.node])
        if len(alike) == 1:
            made = partial(_product, level=alike[0].level)
            replace_product(
                graph.model.graph, alike[0].node, partial(made, layer=alike[0].layer, weight=alike[0].weight)
            )
        else:
            _replace_together(graph.model.graph, alike)
    return tuple(layer for layer, place in places.items() if place.products and _slow(solved[layer].format))


def _slow(fmt: str) -> bool:
    return not isinstance(WEIGHT_FORMATS[fmt], MixedRows) and refuses_nbits(fmt) is not None


def _product(graph: ir.Graph, x: ir.Value, layer: str, weight: QuantizedWeight, level: Level) -> list[ir.Node]:
    """x W^T; the last node has the result."""
    if isinstance(WEIGHT_FORMATS[weight.format], MixedRows):
        return in_two_widths(graph, x, layer, weight, partial(_product, level=level))
    if level != TOKEN and refuses_nbits(weight.format):
        n, k = weight.codes.shape
        across = lazy_constant(
            graph,
            f"{layer}.across",
            ir.DataType.FLOAT,
            (k, n),
            lambda: np.ascontiguousarray(weight.dequantize().numpy().T),
        )
        return [ir.node("MatMul", [x, across], name=layer)]
    return product_at(graph, x, layer, weight, level)


def product_at(graph: ir.Graph, x: ir.Value, layer: str, weight: QuantizedWeight, level: Level) -> list[ir.Node]:
    """x W^T of a weight of one width, x rounded as `level` says; the last node has the result."""
    if level == TOKEN:
        return matmul_token(graph, x, layer, weight)
    if level == PHASES:
        return matmul_in_phases(graph, x, layer, weight)
    return matmul_nbits(graph, x, layer, weight, level)


def _replace_together(graph: ir.Graph, parts: list[_Part]) -> None:
    """One product for layers that share their input, and Split."""
    x = parts[0].node.inputs[0]
    assert x is not None
    name = joined_name([p.layer for p in parts])
    made = product_at(graph, x, name, merged([p.weight for p in parts]), parts[0].level)
    sizes = constant(graph, f"{name}.sizes", [len(p.weight.codes) for p in parts])
    split = ir.node("Split", [made[-1].outputs[0], sizes], {"axis": -1}, num_outputs=len(parts))
    # Where the first stood: the others may not be read before their own places.
    graph.insert_before(parts[0].node, [*made, split])
    for part, output in zip(parts, split.outputs, strict=True):
        take_place(part.node.outputs[0], output)
        graph.remove(part.node, safe=True)


def joined_name(layers: list[str]) -> str:
    """a.b.q_proj, a.b.k_proj -> a.b.q_proj+k_proj."""
    return "+".join([layers[0], *(layer.rpartition(".")[2] for layer in layers[1:])])
