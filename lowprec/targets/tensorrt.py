"""NVIDIA TensorRT 10: explicit quantisation, Q and DQ with zero points of 0, for its strongly typed networks.

| plan              | in the graph                                                             |
|-------------------|--------------------------------------------------------------------------|
| 4 and 3 bits      | DequantizeLinear of INT4 in blocks, weights alone (what it has INT4 for) |
| INT8, 6 bits, FP8 | weights per output channel; inputs in the same type, one fixed range     |
| 4 bits, zero point| refused                                                                  |

TensorRT has no product of INT8 or FP8 weights with inputs in float, so those layers' inputs get ranges of the probe
text, where the plan left them in float, too; what that costs is measured and told. It adds up (CumSum) floats alone.

Sources: github.com/onnx/onnx-tensorrt, docs/operators.md (TensorRT 10.15); docs.nvidia.com/deeplearning/tensorrt,
"Working with Quantized Types" and "Explicit Quantization".
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lowprec.errors import UnsupportedError
from lowprec.targets.exporting import EXPORTERS, Exporter, Request, names, through_graph

if TYPE_CHECKING:
    from lowprec.onnx.folder import OnnxArtefact, Source
    from lowprec.onnx.graph import Graph
    from lowprec.onnx.targeted import Written
    from lowprec.onnx.windows import Text

SOURCE = "onnx-tensorrt docs/operators.md, TensorRT 10.15"
OPERATORS = names(
    """Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization
    BlackmanWindow Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
    DeformConv DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor
    Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual
    GridSample GroupNormalization GRU HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LRN LSTM
    LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression
    NonZero Not OneHot Or Pad Pow PRelu QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike
    Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RMSNormalization RNN RoiAlign RotaryEmbedding
    Round STFT Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
    Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu
    Unsqueeze Upsample Where Xor"""
)
VERIFIED = (
    "not verified on hardware or by TensorRT's parser: operators and types are those that its documentation lists, and "
    "onnxruntime computed it on the CPU"
)


def write(request: Request) -> "OnnxArtefact":
    """See the module's docstring."""
    return through_graph("tensorrt", request, partial(_make, request), VERIFIED)


def _make(request: Request, graph: "Graph", source: "Source", text: "Text", file: Path) -> "Written":
    import onnx
    import onnx_ir as ir

    from lowprec.artifacts.loading import read_back
    from lowprec.formats import WEIGHT_FORMATS
    from lowprec.onnx.canonical import to_canonical
    from lowprec.onnx.folder import DATA
    from lowprec.onnx.graph import tidy
    from lowprec.onnx.lowering import float_cumsum
    from lowprec.onnx.notes import FLOAT_WEIGHTS, unrounded, widened
    from lowprec.onnx.operators import check_operators
    from lowprec.onnx.rounded_inputs import LARGEST, round_inputs
    from lowprec.onnx.targeted import Written

    solved = read_back(source.path)
    if crooked := [n for n, w in solved.items() if not WEIGHT_FORMATS[w.format].symmetric]:
        raise UnsupportedError(
            "TensorRT takes zero points of 0 alone",
            (f"{crooked[0]} and {len(crooked) - 1} more have others: run lowprec calibrate without int4-asym",),
        )
    rewritten = to_canonical(graph, solved)
    float_cumsum(graph)
    tidy(graph)
    rounded = {}
    for number, node in enumerate(graph.model.graph):
        read = node.inputs[1] if node.op_type == "MatMul" else None
        maker = None if read is None else read.producer()
        if maker is not None and maker.op_type == "DequantizeLinear":
            codes = maker.inputs[0]
            node.name = str(maker.outputs[0].name).removesuffix(".dequantized") or f"product.{number}"
            if codes is not None and codes.dtype in LARGEST:
                rounded[str(node.name)] = codes.dtype
    round_inputs(graph, rounded, text, file)
    ir.save(graph.model, file, external_data=DATA)
    check_operators(onnx.load(file, load_external_data=False), "TensorRT", OPERATORS, SOURCE)
    notes = []
    if rounded:
        notes.append(
            f"{len(rounded)} products with INT8 or FP8 weights round inputs to one fixed range of the probe text, "
            "as they did not when scored"
        )
    notes += unrounded(s for s in source.schemes.values() if str(s.weight).startswith("int4"))
    notes += [*widened(source.schemes.values()), FLOAT_WEIGHTS]
    return Written(layers=len(rewritten.layers), notes=tuple(notes), rounds=bool(rounded))


EXPORTERS.register("tensorrt", Exporter(name="tensorrt", forms=("qdq",), write=write))
