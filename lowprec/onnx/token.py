"""INT8 weights with inputs rounded token by token, the scheme w8a8-int8, in onnxruntime's integer product.

    amax = max |x| of each row                          Abs, ReduceMax
    q    = round(x / amax * 127) + 128, uint8           Div, QuantizeLinear
    y    = (q - 128) W^T * scale / 127, times amax      MatMulIntegerToFloat, Mul        (+ bias: Add)

DynamicQuantizeLinear, which onnxruntime's own dynamic quantisation uses, has one scale for the whole tensor: a single
outlier in a prompt spoils every token of it. Dividing each row by its own maximum first leaves QuantizeLinear, whose
scale is a constant, nothing to measure. A row of zeros gives 0 / 0, some code, and is multiplied by its maximum, 0.

u8 and s8 is the pair that AVX512-VNNI and its kin multiply directly; without them onnxruntime adds products in 16 bits
that saturate (`saturates`).

Source: github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, MatMulIntegerToFloat.
"""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from torch import Tensor

from lowprec.formats import QuantizedWeight
from lowprec.onnx.graph import constant, lazy_constant
from lowprec.onnx.nbits import DOMAIN

LARGEST, ZERO_POINT = 127, 128
TINY = 1e-30
PRODUCT = "MatMulIntegerToFloat"


def matmul_token(
    graph: ir.Graph, x: ir.Value, layer: str, weight: QuantizedWeight, bias: ir.Value | None = None
) -> list[ir.Node]:
    """The product of x [..., K], rounded by row, with INT8 codes [N, K]: nodes, the last of which gives [..., N].

    Products of one x share the rounding once equal nodes are merged, which onnxruntime does when it loads a graph.

    Args:
        graph: takes the initializers.
        layer: what their names begin with.
        weight: in the format int8, one scale for a row.
        bias: [N], added to it.
    """
    n, k = weight.codes.shape
    step = _scalar(graph, "token.step", ir.DataType.FLOAT, 1.0 / LARGEST)
    zero = _scalar(graph, "token.zero_point", ir.DataType.UINT8, ZERO_POINT)
    last = constant(graph, "token.axis", [-1])
    codes = lazy_constant(graph, f"{layer}.across", ir.DataType.INT8, (k, n), lambda: _across(weight.codes))
    scale = lazy_constant(graph, f"{layer}.scale", ir.DataType.FLOAT, (n,), lambda: weight.scale.float()[:, 0].numpy())
    size = ir.node("Abs", [x])
    largest = ir.node("ReduceMax", [size.outputs[0], last], {"keepdims": 1})
    share = ir.node("Div", [x, largest.outputs[0]])
    rounded = ir.node("QuantizeLinear", [share.outputs[0], step, zero])
    product = ir.node(PRODUCT, [rounded.outputs[0], codes, step, scale, zero], domain=DOMAIN, name=layer)
    whole = ir.node("Mul", [product.outputs[0], largest.outputs[0]])
    nodes = [size, largest, share, rounded, product, whole]
    return nodes if bias is None else [*nodes, ir.node("Add", [whole.outputs[0], bias])]


def unround(graph: onnx.GraphProto) -> None:
    """Makes every such product of a graph one with the input as it is, in float32, in place: to compare what it is."""
    producers = {output: node for node in graph.node for output in node.output}
    least = onnx.numpy_helper.from_array(np.array([TINY], np.float32), "token.least")
    graph.initializer.append(least)
    made = []
    for node in graph.node:
        if node.op_type != PRODUCT:
            made.append(node)
            continue
        share, (_, codes, _, scale, _) = producers[producers[node.input[0]].input[0]], node.input
        # A row of zeros would be 0 / 0, which a code hides and a float does not.
        share.input[1] = _raised(made, share, least.name)
        weight = f"{node.output[0]}.weight"
        # Not DequantizeLinear: onnxruntime would pack its codes anew, which it cannot where they are the outer graph's.
        made.append(onnx.helper.make_node("Cast", [codes], [f"{weight}.codes"], to=onnx.TensorProto.FLOAT))
        made.append(onnx.helper.make_node("Mul", [f"{weight}.codes", scale], [weight]))
        made.append(onnx.helper.make_node("MatMul", [share.output[0], weight], list(node.output)))
    del graph.node[:]
    graph.node.extend(made)


def _raised(made: list[onnx.NodeProto], share: onnx.NodeProto, least: str) -> str:
    """The name of the divisor of `share`, at least `least`, by a node that stands right before it."""
    name = f"{share.output[0]}.divisor"
    if share.input[1] != name:
        made.insert(made.index(share), onnx.helper.make_node("Max", [share.input[1], least], [name]))
    return name


def _scalar(graph: ir.Graph, name: str, kind: ir.DataType, number: float) -> ir.Value:
    return lazy_constant(graph, name, kind, (), lambda: np.array(number, dtype=kind.numpy()))


def _across(rows: Tensor) -> "np.ndarray[Any, Any]":
    return np.ascontiguousarray(rows.numpy().T)
