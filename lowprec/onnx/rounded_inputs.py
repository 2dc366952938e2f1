"""Fixed ranges for the inputs of some products: QuantizeLinear and DequantizeLinear, per tensor, symmetric.

    x -> clamp(round(x / s)) s,   s = max |x| over the probe text / largest code (127 of INT8, 448 of E4M3FN)

Zero points are 0, because that is what runtimes with symmetric grids take.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lowprec.formats.integer import TINY
from lowprec.onnx.graph import Graph
from lowprec.onnx.windows import Text, ranges

LARGEST = {ir.DataType.INT8: 127.0, ir.DataType.FLOAT8E4M3FN: 448.0}


def round_inputs(graph: Graph, products: Mapping[str, ir.DataType], text: Text, file: Path) -> None:
    """Rounds what goes into products, in place.

    Args:
        products: name of a node whose first input is rounded -> what to.
        text: what ranges are measured on.
        file: where the graph may be written for that; nothing stays there.
    """
    nodes = [node for node in graph.model.graph if node.name in products]
    names = sorted({str(node.inputs[0].name) for node in nodes if node.inputs[0] is not None})
    inside = [name for name in names if name not in {v.name for v in graph.model.graph.inputs}]
    ir.save(graph.model, file)
    found = ranges(file, inside, text)
    file.unlink()
    for node in nodes:
        x = node.inputs[0]
        assert x is not None
        kind = products[str(node.name)]
        low, high = found[str(x.name)]
        scale = max(abs(low), abs(high), TINY) / LARGEST[kind]
        codes = ir.node("QuantizeLinear", [x, *_grid(graph.model.graph, str(node.name), kind, scale)])
        values = ir.node("DequantizeLinear", [codes.outputs[0], *codes.inputs[1:]])
        graph.model.graph.insert_before(node, [codes, values])
        node.replace_input_with(0, values.outputs[0])


def _grid(graph: ir.Graph, name: str, kind: ir.DataType, scale: float) -> Sequence[ir.Value]:
    arrays = {"input_scale": np.array(scale, np.float32), "input_zero_point": np.zeros((), kind.numpy())}
    made = []
    for part, array in arrays.items():
        tensor = ir.Tensor(array, dtype=ir.DataType.FLOAT if part == "input_scale" else kind, name=f"{name}.{part}")
        made.append(
            ir.Value(name=f"{name}.{part}", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
        graph.register_initializer(made[-1])
    return made
