"""Where a graph reads the weights of planned layers, and how what reads them is replaced."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from lowprec.errors import UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.rows import MixedRows
from lowprec.onnx.graph import Graph, lazy_constant


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """What reads a weight: nodes that multiply with it (MatMul, Gemm), and nodes that take its rows (Gather)."""

    products: list[ir.Node]
    gathers: list[ir.Node]


def find_places(graph: Graph, solved: Mapping[str, QuantizedWeight]) -> dict[str, Place]:
    """The place of every planned layer; nothing is changed.

    Raises:
        UnsupportedError: planned layers that are not where they should be, a reason for each.
    """
    found: dict[str, Place] = {}
    reasons = []
    for layer, weight in solved.items():
        place = _place(graph, layer, weight)
        if isinstance(place, str):
            reasons.append(f"{layer}: {place}")
        else:
            found[layer] = place
    if reasons:
        raise UnsupportedError("planned layers cannot be rewritten in the graph", tuple(reasons))
    return found


def _place(graph: Graph, layer: str, weight: QuantizedWeight) -> Place | str:
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
    return Place(
        products=[node for node, _, _ in readers if node.op_type != "Gather"],
        gathers=[node for node, _, _ in readers if node.op_type == "Gather"],
    )


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


def replace_product(graph: ir.Graph, node: ir.Node, made: Callable[[ir.Graph, ir.Value], list[ir.Node]]) -> None:
    """Puts what `made` makes of the input x, the last node of which gives x W^T, into the place of a MatMul or Gemm."""
    x, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    assert x is not None
    nodes = made(graph, x)
    if bias is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias]))
    replace_nodes(graph, node, nodes)


def replace_nodes(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    """Puts nodes, the last of which gives what `node` gave, into its place."""
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [node.outputs[0]], [nodes[-1].outputs[0]])


def take_place(old: ir.Value, new: ir.Value) -> None:
    """Gives what reads `old`, be it the graph's own output, `new` under the old name."""
    name = old.name
    old.name = f"{name}.before"
    new.name, new.shape, new.type = name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def in_two_widths(
    graph: ir.Graph,
    x: ir.Value,
    layer: str,
    weight: QuantizedWeight,
    product: Callable[[ir.Graph, ir.Value, str, QuantizedWeight], list[ir.Node]],
) -> list[ir.Node]:
    """x W^T of rows of two widths: a product of each kind, put into the order of the rows by Gather."""
    fmt = WEIGHT_FORMATS[weight.format]
    assert isinstance(fmt, MixedRows)
    rows, fine, coarse = fmt.split(weight)
    parts = [product(graph, x, f"{layer}.{name}", part) for name, part in (("fine", fine), ("coarse", coarse))]
    order = torch.cat([rows.nonzero().flatten(), (~rows).nonzero().flatten()])
    place = lazy_constant(graph, f"{layer}.place", ir.DataType.INT64, order.shape, lambda: torch.argsort(order).numpy())
    joined = ir.node("Concat", [part[-1].outputs[0] for part in parts], {"axis": -1})
    return [*parts[0], *parts[1], joined, ir.node("Gather", [joined.outputs[0], place], {"axis": -1})]
