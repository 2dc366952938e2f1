"""x * sigmoid(x) as one node: com.microsoft QuickGelu with alpha 1."""

import onnx_ir as ir

from lowprec.onnx.nbits import DOMAIN
from lowprec.onnx.places import replace_nodes


def fuse_silu(model: ir.Model) -> None:
    """Rewrites every SiLU of the graph, in place."""
    for node in [n for n in model.graph if n.op_type == "Sigmoid"]:
        x, gate = node.inputs[0], node.outputs[0]
        readers = [use.node for use in gate.uses()]
        if len(readers) == 1 and readers[0].op_type == "Mul" and set(readers[0].inputs) == {x, gate}:
            made = ir.node("QuickGelu", [x], {"alpha": 1.0}, domain=DOMAIN)
            replace_nodes(model.graph, readers[0], [made])
            model.graph.remove(node, safe=True)
