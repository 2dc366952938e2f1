"""Norms as one node each, with the addition before them: operators of onnxruntime.

    Pow, ReduceMean, Add, Sqrt, Reciprocal, Mul, Mul  ->  SimplifiedLayerNormalization        (RMSNorm)
    Add, then a norm                                  ->  Skip(Simplified)LayerNormalization  (sum and norm)
    an RMSNorm that follows no Add                    ->  BranchwiseRMSNorm

The pattern of the first is onnxscript's; its patterns of the second try every pair of nodes. BranchwiseRMSNorm stands
for SimplifiedLayerNormalization, which onnxruntime knows in ONNX's own domain, where ONNX's checker finds none.
"""

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization

from lowprec.onnx.nbits import DOMAIN
from lowprec.onnx.places import replace_nodes

RMS, LAYER = "SimplifiedLayerNormalization", "LayerNormalization"


def find_norms(model: ir.Model) -> None:
    """RMSNorms as SimplifiedLayerNormalization, in place; `settle_norms` makes of these what a file may hold."""
    fuse_rms_normalization(model)


def settle_norms(model: ir.Model) -> None:
    """Takes the additions before norms into them, in place."""
    for node in [n for n in model.graph if n.op_type in (RMS, LAYER)]:
        epsilon = {"epsilon": node.attributes["epsilon"].as_float()}
        added = _sum_of_like(node.inputs[0])
        if added is not None and _over_the_last_axis(node):
            inputs = [*added.inputs, *node.inputs[1:]]
            made = ir.node(f"Skip{node.op_type}", inputs, epsilon, num_outputs=4, domain=DOMAIN, name=node.name)
            total = added.outputs[0]
            made.outputs[3].shape, made.outputs[3].type = total.shape, total.type
            # Where the sum stood: others read it as well.
            model.graph.insert_before(added, made)
            for old, new in ((total, made.outputs[3]), (node.outputs[0], made.outputs[0])):
                ir.convenience.replace_all_uses_with(old, new)
            made.outputs[0].shape, made.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
            model.graph.remove([node, added], safe=True)
        elif node.op_type == RMS:
            replace_nodes(
                model.graph,
                node,
                [ir.node("BranchwiseRMSNorm", node.inputs[:2], epsilon, domain=DOMAIN, name=node.name)],
            )


def _sum_of_like(value: ir.Value | None) -> ir.Node | None:
    """The Add that makes a value of two of the same shape [batch, sequence, width]; None if none does."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Add" or any(i is None or i.shape is None for i in node.inputs):
        return None
    left, right = (list(i.shape) for i in node.inputs if i is not None and i.shape is not None)
    return node if left == right and len(left) == 3 else None


def _over_the_last_axis(node: ir.Node) -> bool:
    axis = node.attributes.get("axis")
    return axis is None or axis.as_int() in (-1, 2)
