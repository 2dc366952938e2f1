"""AMD MIGraphX: graphs of fixed sizes at opset 19, 4 bits as MatMulNBits, 8 bits as DequantizeLinear per channel.

| plan        | in the graph                                                          |
|-------------|-----------------------------------------------------------------------|
| 4 and 3 bits| com.microsoft MatMulNBits of 4 bits, with or without zero points      |
| INT8, 6 bits| DequantizeLinear over INT8, one scale per output channel, then MatMul |
| FP8         | refused: its FP8 is E4M3FNUZ, and the plan's codes are E4M3FN         |

Expand, Range and their like take no free sizes there, so sizes are fixed and folded away. The list ends at opset 19,
which has no DequantizeLinear in blocks.

Sources: rocm.docs.amd.com/projects/AMDMIGraphX, "Supported ONNX Operators"; github.com/ROCm/AMDMIGraphX,
src/onnx/parse_matmulnbits.cpp.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowprec.errors import UnsupportedError
from lowprec.targets.exporting import EXPORTERS, Exporter, Request, names, through_graph

if TYPE_CHECKING:
    from lowprec.onnx.folder import OnnxArtefact, Source
    from lowprec.onnx.graph import Graph
    from lowprec.onnx.targeted import Written
    from lowprec.onnx.windows import Text

OPSET = 19
SOURCE = "MIGraphX, Supported ONNX Operators, and its parser of MatMulNBits"
OPERATORS = names(
    """Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil Celu
    Clip Concat Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear
    Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements
    GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization
    GRU HardSigmoid HardSwish Identity If InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax Loop LRN LSTM LpNormalization LpPool MatMul MatMulInteger Max MaxPool Mean
    MeanVarianceNormalization Min Mod Mul Multinomial Neg NonMaxSuppression NonZero Not OneHot Or Pad Pow PRelu
    QLinearAdd QLinearAveragePool QLinearConcat QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMatMul
    QLinearMul QLinearSigmoid QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range
    Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Scan ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice
    Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose
    Unsqueeze Where com.microsoft:MatMulNBits"""
)
VERIFIED = (
    "not verified on hardware or by MIGraphX's parser: operators are those that its documentation lists, and "
    "onnxruntime computed it on the CPU"
)


def write(request: Request) -> "OnnxArtefact":
    """See the module's docstring."""
    return through_graph("migraphx", request, partial(_make, request), VERIFIED)


def _make(request: Request, graph: "Graph", source: "Source", text: "Text", file: Path) -> "Written":
    import onnx
    import onnx_ir as ir

    from lowprec.artifacts.loading import read_back
    from lowprec.onnx.dense import code_dense, place_dense
    from lowprec.onnx.fixed import fix_sizes
    from lowprec.onnx.folder import DATA
    from lowprec.onnx.lowering import lower_opset
    from lowprec.onnx.nbits import DOMAIN
    from lowprec.onnx.notes import FLOAT_WEIGHTS, unrounded, widened
    from lowprec.onnx.operators import check_operators
    from lowprec.onnx.targeted import Written

    sizes = request.sizes
    planned = place_dense(graph, read_back(source.path))
    fix_sizes(graph, sizes)
    lower_opset(graph, OPSET)
    layers = code_dense(graph, planned, _product)
    graph.model.opset_imports[DOMAIN] = 1
    ir.save(graph.model, file, external_data=DATA)
    check_operators(onnx.load(file, load_external_data=False), "MIGraphX", OPERATORS, SOURCE)
    notes = [
        sizes.told(graph.kind),
        *unrounded(source.schemes.values()),
        *widened(source.schemes.values()),
        FLOAT_WEIGHTS,
    ]
    return Written(layers=len(layers), notes=tuple(notes), rounds=False)


def _product(graph: Any, x: Any, layer: str, weight: Any) -> list[Any]:
    import onnx_ir as ir

    from lowprec.formats import WEIGHT_FORMATS, held_bits
    from lowprec.onnx.canonical import dequantised
    from lowprec.onnx.nbits import EXACT, matmul_nbits

    fmt = WEIGHT_FORMATS[weight.format]
    if fmt.code_dtype.is_floating_point:
        raise UnsupportedError(
            f"MIGraphX has no {weight.format} weights",
            ("its FP8 is E4M3FNUZ: run lowprec calibrate --schemes int8,int4",),
        )
    if held_bits(fmt) == 8:
        codes = dequantised(graph, layer, weight)
        return [codes, ir.node("MatMul", [x, codes.outputs[0]])]
    return matmul_nbits(graph, x, layer, weight, EXACT)


EXPORTERS.register("migraphx", Exporter(name="migraphx", forms=("nbits",), write=write, fixed=("nbits",)))
