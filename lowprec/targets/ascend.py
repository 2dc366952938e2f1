"""Huawei Ascend, three ways in.

    vllm   safetensors that vllm-ascend loads: INT8 layers as W8A8_DYNAMIC, all else in bfloat16 (language models)
    fp16   ONNX in float16 at opset 13, fixed sizes, for ATC and onnxruntime's CANN provider, which has nothing coded
    int8   ONNX in float32 at opset 13, fixed sizes, Q and DQ in INT8 around planned products, per tensor, as AMCT's
           converter takes them; it turns them into AscendQuant and AscendDequant, which ATC lists

In `vllm` codes of INT8 layers are the plan's, and inputs are rounded per token as w8a8-int8 was scored. In `int8` every
planned weight is rounded once more, to one scale for the whole tensor, and inputs have ranges of the probe text. What
`fp16` and `int8` cost is measured in onnxruntime and told; for `vllm` nothing computes here, so nothing is. 910B has no
FP8.

Sources: hiascend.com, CANN operator list (ONNX 1.12, opset 9 to 18) and AMCT, ONNX QAT model conversion;
github.com/vllm-project/vllm-ascend, vllm_ascend/quantization.
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

OPSET = 13
SOURCE = "CANN, list of ONNX operators"
OPERATORS = names(
    """Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift Cast Ceil Celu
    Clip Concat ConvTranspose CumSum Conv Compress Constant ConstantOfShape Cos Cosh Det DepthToSpace Div Dropout Elu
    Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherND GatherElements Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual HardSigmoid Hardmax HardSwish Identity If InstanceNormalization Less LeakyRelu
    LessOrEqual Log LogSoftmax LpNormalization LpPool LRN LSTM MatMul Max MaxPool MaxRoiPool MaxUnpool Mean
    MeanVarianceNormalization Min Mod Mul Multinomial Neg NonMaxSuppression NonZero Not OneHot Or RandomNormalLike
    RandomUniformLike RandomUniform Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMin ReduceMean
    ReduceProd ReduceSumSquare Resize Relu ReduceSum ReduceMax Reshape ReverseSequence RoiAlign Round PRelu Scatter
    ScatterElements ScatterND Shrink Selu Shape Sigmoid Slice Softmax Softsign Softplus SpaceToDepth Split Sqrt Squeeze
    Sub Sign Sin Sinh Size Sum Tanh TfIdfVectorizer Tile ThresholdedRelu TopK Transpose Pad Pow Unsqueeze Where Xor"""
)
CONVERTED = names("QuantizeLinear DequantizeLinear")
"""Not ATC's, but AMCT's, which puts AscendQuant and AscendDequant into their place."""
SINGLE = names("Pow ReduceMean Sqrt Reciprocal")
"""Stay in float32 in the form fp16, because squares of hidden states overflow."""
VERIFIED = (
    "not verified on hardware, by ATC or by AMCT: operators and opset are those that CANN's documentation lists, and "
    "onnxruntime computed it on the CPU"
)


def write(request: Request) -> "OnnxArtefact":
    """See the module's docstring."""
    if request.form == "vllm":
        from lowprec.targets.ascend_vllm import write_vllm

        return write_vllm(request.source, request.out)
    return through_graph("ascend", request, partial(_make, request), VERIFIED)


def _make(request: Request, graph: "Graph", source: "Source", text: "Text", file: Path) -> "Written":
    import onnx
    import onnx_ir as ir

    from lowprec.artifacts.loading import read_back
    from lowprec.onnx.dense import place_dense
    from lowprec.onnx.fixed import fix_sizes
    from lowprec.onnx.folder import DATA
    from lowprec.onnx.half import to_half
    from lowprec.onnx.hidden import HALF, hide_with
    from lowprec.onnx.lowering import lower_opset
    from lowprec.onnx.operators import check_operators
    from lowprec.onnx.rounded_inputs import round_inputs
    from lowprec.onnx.targeted import Written
    from lowprec.onnx.tensor_codes import code_per_tensor

    sizes = request.sizes
    planned = place_dense(graph, read_back(source.path))
    fix_sizes(graph, sizes)
    # ATC computes what is not in INT8 in float16.
    hide_with(graph, HALF)
    lower_opset(graph, OPSET)
    notes, layers = [sizes.told(graph.kind)], 0
    if request.form == "fp16":
        ir.save(to_half(graph.model, SINGLE), file, external_data=DATA)
        notes.append("weights have the values of their codes in float16; nothing is in codes")
    else:
        products = code_per_tensor(graph, planned)
        round_inputs(graph, dict.fromkeys(products, ir.DataType.INT8), text, file)
        ir.save(graph.model, file, external_data=DATA)
        layers = len(products)
        notes.append(
            f"{layers} products: weights are rounded once more, to one scale for each, and inputs to one range of the "
            "probe text, as they were not when scored"
        )
    check_operators(onnx.load(file, load_external_data=False), "CANN", OPERATORS | CONVERTED, SOURCE)
    return Written(layers=layers, notes=tuple(notes), rounds=True)


EXPORTERS.register(
    "ascend",
    Exporter(name="ascend", forms=("vllm", "fp16", "int8"), write=write, fixed=("fp16", "int8"), whole=("vllm",)),
)
