"""Weights of planned products in INT8 with one scale for all of one, as DequantizeLinear of opset 13 reads them."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lowprec.formats import QuantizedWeight
from lowprec.onnx.dense import coded
from lowprec.onnx.graph import Graph


def code_per_tensor(graph: Graph, planned: Mapping[str, QuantizedWeight]) -> tuple[str, ...]:
    """Puts codes into the place of the constants that `place_dense` made, in place; returns the products' new names."""
    inner = graph.model.graph
    products: list[str] = []
    for node in list(inner):
        value = node.inputs[1] if node.op_type == "MatMul" else None
        if value is None or value.name not in planned or value.const_value is None:
            continue
        name = f"{str(value.name).removesuffix('.dense')}.{len(products)}"
        made = coded(value.const_value.numpy(), planned[value.name], 8, per_tensor=True)
        arrays = {"codes": made.codes, "scale": made.scale[0], "zero_point": np.array(0, np.int8)}
        inputs = []
        for part, array in arrays.items():
            tensor = ir.tensor(np.asarray(array), name=f"{name}.{part}")
            inputs.append(
                ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            )
            inner.register_initializer(inputs[-1])
        codes = ir.node("DequantizeLinear", inputs)
        inner.insert_before(node, codes)
        node.replace_input_with(1, codes.outputs[0])
        node.name = name
        products.append(name)
        if not value.uses():
            del inner.initializers[str(value.name)]
    return tuple(products)
