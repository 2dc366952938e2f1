"""Norms as one node each, with the addition before them: operators of onnxruntime.

    Pow, ReduceMean, Add, Sqrt, Reciprocal, Mul, Mul  ->  SimplifiedLayerNormalization        (RMSNorm)
    Add, then a norm                                  ->  Skip(Simplified)LayerNormalization  (sum and norm)
    an RMSNorm that follows no Add                    ->  BranchwiseRMSNorm

The patterns are onnxscript's. BranchwiseRMSNorm stands for SimplifiedLayerNormalization, which onnxruntime knows in
ONNX's own domain, where ONNX's checker finds no such operator.
"""

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import (
    fuse_skip_layer_normalization,
    fuse_skip_rms_normalization,
)

from lowprec.onnx.nbits import DOMAIN
from lowprec.onnx.places import replace_nodes


def find_norms(model: ir.Model) -> None:
    """RMSNorms as SimplifiedLayerNormalization, in place; `settle_norms` makes of these what a file may hold."""
    fuse_rms_normalization(model)


def settle_norms(model: ir.Model) -> None:
    """Takes the additions before norms into them, in place."""
    fuse_skip_layer_normalization(model)
    fuse_skip_rms_normalization(model)
    for node in [n for n in model.graph if n.op_type == "SimplifiedLayerNormalization"]:
        epsilon = {"epsilon": node.attributes["epsilon"].as_float()}
        made = ir.node("BranchwiseRMSNorm", node.inputs[:2], epsilon, domain=DOMAIN, name=node.name)
        replace_nodes(model.graph, node, [made])
