"""onnxruntime-web on WebGPU: products with 4 and 8 bits as MatMulNBits, which it has kernels for.

Codes are the plan's; inputs stay in float (accuracy level 1). FP8 has no kernel there: refused. Operators that WebGPU's
list lacks run on the CPU of the browser, which onnxruntime-web decides by itself; the notes name them.

Source: onnxruntime-web 1.30.0, docs/webgpu-operators.md.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lowprec.targets.exporting import EXPORTERS, Exporter, Request, names, through_graph

if TYPE_CHECKING:
    from lowprec.onnx.folder import OnnxArtefact, Source
    from lowprec.onnx.graph import Graph
    from lowprec.onnx.targeted import Written
    from lowprec.onnx.windows import Text

OPERATORS = names(
    """Abs Acos Acosh Add ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Clip Concat Conv
    ConvTranspose Cos Cosh CumSum DFT DepthToSpace DequantizeLinear Div Einsum Elu Equal Erf Exp Expand Flatten Floor
    Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample
    HardSigmoid HardSwish If InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log MatMul MaxPool Mul
    Neg Not Pad Pow Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ScatterND Shape Sigmoid SimplifiedLayerNormalization Sin
    Sinh Slice Softmax Split Sqrt Squeeze Sub Tan Tanh ThresholdedRelu Tile Transpose Unsqueeze Where
    com.microsoft:Attention com.microsoft:BiasAdd com.microsoft:BiasSplitGelu com.microsoft:FastGelu
    com.microsoft:FusedConv com.microsoft:GatherBlockQuantized com.microsoft:Gelu com.microsoft:GroupQueryAttention
    com.microsoft:MatMulNBits com.microsoft:MultiHeadAttention com.microsoft:QuickGelu com.microsoft:RotaryEmbedding
    com.microsoft:SkipLayerNormalization com.microsoft:SkipSimplifiedLayerNormalization"""
)
VERIFIED = (
    "not verified on a GPU: operators are those that onnxruntime-web lists for WebGPU, and onnxruntime computed it on "
    "the CPU"
)


def write(request: Request) -> "OnnxArtefact":
    """See the module's docstring."""
    return through_graph("webgpu", request, partial(_make, request), VERIFIED)


def _make(request: Request, graph: "Graph", source: "Source", text: "Text", file: Path) -> "Written":
    import onnx
    import onnx_ir as ir

    from lowprec.artifacts.loading import read_back
    from lowprec.onnx.each_product import replace_products
    from lowprec.onnx.folder import DATA
    from lowprec.onnx.graph import tidy
    from lowprec.onnx.nbits import DOMAIN, EXACT, matmul_nbits
    from lowprec.onnx.notes import FLOAT_WEIGHTS, unrounded, widened
    from lowprec.onnx.operators import name_of, nodes_of
    from lowprec.onnx.targeted import Written

    layers = replace_products(graph, read_back(source.path), partial(matmul_nbits, accuracy_level=EXACT))
    graph.model.opset_imports[DOMAIN] = 1
    tidy(graph)
    ir.save(graph.model, file, external_data=DATA)
    elsewhere = sorted({name_of(n) for n in nodes_of(onnx.load(file, load_external_data=False).graph)} - OPERATORS)
    notes = unrounded(source.schemes.values())
    if elsewhere:
        notes.append(f"{', '.join(elsewhere)}: not in WebGPU's list, so the CPU of the browser runs them")
    notes += [*widened(source.schemes.values()), FLOAT_WEIGHTS]
    return Written(layers=len(layers), notes=tuple(notes), rounds=False)


EXPORTERS.register("webgpu", Exporter(name="webgpu", forms=("nbits",), write=write))
