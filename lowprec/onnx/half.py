"""A graph in float16, inputs and outputs included; some operators, and the angles of rotary positions, stay in float32.

A value has the type of the node that makes it; a Cast stands wherever a node of the other type reads it. Angles are
position times frequency, which float16 rounds by up to half a radian from position 1024 on: what leads from a
Cast to Sin and Cos stays, and so do they.
"""

from collections.abc import Set

import numpy as np
import onnx
import onnx_ir as ir

from lowprec.errors import UnsupportedError

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LIMIT_BYTES = 2**31 - 2**24
LARGEST = float(np.finfo(np.float16).max)


def refuse_large(model: ir.Model) -> None:
    """Raises UnsupportedError when a model is too large for ONNX's shape inference, which ends at 2 GB."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    if size > LIMIT_BYTES:
        raise UnsupportedError(
            "the graph is too large for ONNX's shape inference", (f"{size / 1e9:.1f} GB in float32",)
        )


def to_half(model: ir.Model, single: Set[str]) -> ir.Model:
    """The model in float16.

    Args:
        single: operators that stay in float32.

    Raises:
        UnsupportedError: more than 2 GB in float32.
    """
    refuse_large(model)
    made = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True))
    graph = made.graph
    kept = {node for node in graph if node.op_type in single} | _angles(graph)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        # What float32 operators alone read, frequencies of positions for example, is not rounded before.
        alone = value.const_value is not None and all(use.node in kept for use in value.uses())
        if value.dtype == FLOAT and not alone:
            _make_half(value)
    for node in list(graph):
        own = FLOAT if node in kept else HALF
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (FLOAT, HALF) and value.dtype != own:
                node.replace_input_with(index, _cast(graph, node, value, own, casts))
        _retype(node, own)
    for index, value in enumerate(graph.outputs):
        if value.dtype == FLOAT:
            last = ir.node("Cast", [value], {"to": HALF})
            last.outputs[0].name, value.name = value.name, f"{value.name}.float"
            last.outputs[0].type, last.outputs[0].shape = ir.TensorType(HALF), value.shape
            graph.append(last)
            graph.outputs[index] = last.outputs[0]
    return made


def _angles(graph: ir.Graph) -> set[ir.Node]:
    """What leads from a Cast to Sin and Cos, both included."""
    found: set[ir.Node] = set()
    waiting = [node for node in graph if node.op_type in ("Sin", "Cos")]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if node.op_type != "Cast":
            makers = [value.producer() for value in node.inputs if value is not None and value.dtype == FLOAT]
            waiting += [maker for maker in makers if maker is not None]
    return found


def _make_half(value: ir.Value) -> None:
    if value.const_value is not None:
        array = np.clip(value.const_value.numpy(), -LARGEST, LARGEST).astype(np.float16)
        value.const_value = ir.tensor(array, name=value.name)
    value.type = ir.TensorType(HALF)


def _cast(
    graph: ir.Graph,
    reader: ir.Node,
    value: ir.Value,
    to: ir.DataType,
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
) -> ir.Value:
    if (value, to) not in casts:
        node = ir.node("Cast", [value], {"to": to})
        made = node.outputs[0]
        made.name, made.type, made.shape = f"{value.name}.{to.name.lower()}", ir.TensorType(to), value.shape
        graph.insert_before(reader, node)
        casts[value, to] = made
    return casts[value, to]


def _retype(node: ir.Node, own: ir.DataType) -> None:
    for output in node.outputs:
        if output.dtype == FLOAT:
            output.type = ir.TensorType(own)
    if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", own)
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
        if tensor.dtype == FLOAT and own == HALF:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float16)))
