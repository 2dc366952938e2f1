"""A graph in the operators of an older opset: what is newer is written out, what cannot be is an error.

| operator           | since | becomes                                                             |
|--------------------|-------|---------------------------------------------------------------------|
| Gelu               | 20    | x (1 + erf(x / sqrt 2)) / 2, or its tanh form                       |
| LayerNormalization | 17    | (x - mean) / sqrt(mean square + epsilon) * scale + bias             |
| ReduceMean, -Max   | 18    | axes as an attribute                                                |
| Split              | 18    | sizes as an input instead of num_outputs                            |
| Reshape            | 14    | without allowzero                                                   |

All else that the exporter writes has the same meaning at 13 as at 21; ONNX's checker passes over the result.

Source: onnx.ai/onnx/operators, version history of each.
"""

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from lowprec.errors import UnsupportedError
from lowprec.onnx.graph import Graph
from lowprec.onnx.places import replace_nodes

Rewrite = Callable[[ir.Graph, ir.Node], None]


def lower_opset(graph: Graph, opset: int) -> None:
    """Makes the graph one of `opset`, in place.

    Raises:
        UnsupportedError: operators that it does not have and that are not written out here.
    """
    inner = graph.model.graph
    for node in list(inner):
        since, rewrite = REWRITES.get(node.op_type, (0, None))
        if node.domain in ("", "ai.onnx") and rewrite is not None and since > opset:
            rewrite(inner, node)
    if missing := sorted({n.op_type for n in inner if n.domain in ("", "ai.onnx") and NEWER.get(n.op_type, 0) > opset}):
        raise UnsupportedError(f"opset {opset} does not have operators of this model", tuple(missing))
    graph.model.opset_imports[""] = opset
    inner.opset_imports[""] = opset


def float_cumsum(graph: Graph) -> None:
    """CumSum of integers through float32, in place, for runtimes that add up floats alone; exact below 2^24."""
    for node in [n for n in graph.model.graph if n.op_type == "CumSum"]:
        x = node.inputs[0]
        assert x is not None
        if x.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
            continue
        made = [ir.node("Cast", [x], {"to": ir.DataType.FLOAT})]
        made.append(ir.node("CumSum", [made[0].outputs[0], node.inputs[1]], dict(node.attributes)))
        made.append(ir.node("Cast", [made[1].outputs[0]], {"to": x.dtype}))
        replace_nodes(graph.model.graph, node, made)


def _constant(graph: ir.Graph, node: ir.Node, what: str, value: float) -> ir.Value:
    name = f"{node.name or node.outputs[0].name}.{what}"
    made = ir.Value(name=name, const_value=ir.tensor(np.array(value, np.float32), name=name))
    graph.register_initializer(made)
    return made


def _gelu(graph: ir.Graph, node: ir.Node) -> None:
    x = node.inputs[0]
    assert x is not None

    def constant(what: str, value: float) -> ir.Value:
        return _constant(graph, node, what, value)

    def op(kind: str, *inputs: ir.Value) -> ir.Value:
        made.append(ir.node(kind, list(inputs)))
        return made[-1].outputs[0]

    made: list[ir.Node] = []
    approximate = node.attributes.get("approximate")
    if approximate is not None and approximate.as_string() == "tanh":
        cube = op("Mul", op("Mul", op("Mul", x, x), x), constant("cubic", 0.044715))
        bent = op("Tanh", op("Mul", op("Add", x, cube), constant("slope", math.sqrt(2 / math.pi))))
    else:
        bent = op("Erf", op("Mul", x, constant("slope", math.sqrt(0.5))))
    op("Mul", op("Mul", x, constant("half", 0.5)), op("Add", bent, constant("one", 1.0)))
    replace_nodes(graph, node, made)


def _layer_norm(graph: ir.Graph, node: ir.Node) -> None:
    x, scale = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    last = x is not None and x.shape is not None and axis in (-1, len(x.shape) - 1)
    if not last or len(node.outputs) > 1:
        raise UnsupportedError(
            "LayerNormalization cannot be written out", (f"{node.name}: axis {axis}, or statistics",)
        )
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    made: list[ir.Node] = []

    def op(kind: str, *inputs: ir.Value | None, **attributes: list[int]) -> ir.Value:
        made.append(ir.node(kind, list(inputs), attributes))
        return made[-1].outputs[0]

    centred = op("Sub", x, op("ReduceMean", x, axes=[-1]))
    square = op("ReduceMean", op("Mul", centred, centred), axes=[-1])
    deviation = op("Sqrt", op("Add", square, _constant(graph, node, "epsilon", epsilon)))
    scaled = op("Mul", op("Div", centred, deviation), scale)
    if bias is not None:
        op("Add", scaled, bias)
    replace_nodes(graph, node, made)


def _reduce(graph: ir.Graph, node: ir.Node) -> None:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    constant = None if axes is None else ir.convenience.get_const_tensor(axes)
    if axes is not None and constant is None:
        raise UnsupportedError(f"{node.op_type} cannot be written out", (f"{node.name}: its axes are computed",))
    kept = {k: a for k, a in node.attributes.items() if k != "noop_with_empty_axes"}
    if constant is not None:
        kept["axes"] = ir.AttrInt64s("axes", constant.numpy().flatten().tolist())
    replace_nodes(graph, node, [ir.node(node.op_type, [node.inputs[0]], kept)])


def _split(graph: ir.Graph, node: ir.Node) -> None:
    node.attributes.pop("num_outputs", None)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return
    x = node.inputs[0]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    whole = None if x is None or x.shape is None else x.shape[axis]
    if not isinstance(whole, int):
        raise UnsupportedError("Split cannot be written out", (f"{node.name}: what it splits has a free size",))
    # As num_outputs means it: equal parts, the last one smaller where they do not go up.
    part = -(-whole // len(node.outputs))
    sizes = [min(part, whole - part * i) for i in range(len(node.outputs))]
    name = f"{node.name}.sizes"
    value = ir.Value(name=name, const_value=ir.tensor(np.array(sizes, np.int64), name=name))
    graph.register_initializer(value)
    node.resize_inputs(2)
    node.replace_input_with(1, value)


def _reshape(graph: ir.Graph, node: ir.Node) -> None:
    node.attributes.pop("allowzero", None)


REWRITES: dict[str, tuple[int, Rewrite]] = {
    "Gelu": (20, _gelu),
    "LayerNormalization": (17, _layer_norm),
    "ReduceMean": (18, _reduce),
    "ReduceMax": (18, _reduce),
    "Split": (18, _split),
    "Reshape": (14, _reshape),
}
NEWER = {
    "CastLike": 15,
    "Trilu": 14,
    "HardSwish": 14,
    "Mish": 18,
    "GridSample": 16,
    "Gelu": 20,
    "LayerNormalization": 17,
}
