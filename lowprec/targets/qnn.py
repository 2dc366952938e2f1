"""Qualcomm's HTP through onnxruntime-qnn: whole graphs in integers, of fixed sizes, compiled ahead of time.

    a8w8    activations uint8, weights of products int8 per output channel
    a16w8   activations uint16, weights int8 per output channel
    a16w4   as a16w8, and int4 per output channel for layers that the plan has in 4 bits or fewer

Codes of the plan that have one scale per output channel are kept. HTP takes 4 bits in blocks only where the scales of a
row's blocks are integers over one scale (LPBQ), which the plan's are not, so 4 bits in blocks are rounded once more:
to 8 bits in a8w8 and a16w8, and to 4 in a16w4. What that and the ranges cost is measured and told; it is no part of the
verdict of the run.

Batch is 1, and a decoder's call has `sequence` tokens behind a cache of `past`; for prompts and for single tokens write
one graph each, and compile them into one context, where they share weights.

Sources: github.com/onnxruntime/onnxruntime-qnn, docs/execution_providers/QNN-ExecutionProvider.md (operators, model
requirements, LPBQ, context binaries, weight sharing), version 2.7.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowprec.artifacts import digests
from lowprec.errors import ArtifactError, ConfigError
from lowprec.targets.exporting import EXPORTERS, Exporter, Request, names, through_graph

if TYPE_CHECKING:
    from lowprec.onnx.dense import Bits
    from lowprec.onnx.folder import OnnxArtefact, Source
    from lowprec.onnx.graph import Graph
    from lowprec.onnx.targeted import Written
    from lowprec.onnx.windows import Text

SOURCE = "onnxruntime-qnn 2.7, supported ONNX operators"
OPERATORS = names(
    """Abs Add And ArgMax ArgMin Asin Atan AveragePool BatchNormalization Cast Ceil Clip Concat Conv ConvTranspose Cos
    CumSum DepthToSpace DequantizeLinear Div Einsum Elu Equal Exp Expand Flatten Floor Gather GatherElements GatherND
    Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish
    Identity InstanceNormalization Inverse IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    LpNormalization MatMul Max MaxPool Mean Min Mod Mul Neg NonZero Not Or PRelu Pad Pow QuantizeLinear RandomNormalLike
    RandomUniformLike Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu RMSNormalization
    Reshape Resize RoiAlign Round RotaryEmbedding STFT ScatterElements ScatterND Sigmoid Sign Sin Slice Softmax Softplus
    SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Unsqueeze Upsample
    Where"""
)
FORMS: "dict[str, tuple[int, Bits]]" = {"a16w8": (16, 8), "a8w8": (8, 8), "a16w4": (16, 4)}
VERIFIED = (
    "not verified on hardware: such graphs were tried with ONNX's checker, onnxruntime on the CPU and the compiler of "
    "onnxruntime-qnn"
)
PROVIDER = "QNNExecutionProvider"


def write(request: Request) -> "OnnxArtefact":
    """See the module's docstring."""
    return through_graph("qnn", request, partial(_quantize, request), VERIFIED)


def _quantize(request: Request, graph: "Graph", source: "Source", text: "Text", file: Path) -> "Written":
    import onnx

    from lowprec.artifacts.loading import read_back
    from lowprec.onnx.dense import place_dense
    from lowprec.onnx.fixed import fix_sizes
    from lowprec.onnx.operators import check_operators
    from lowprec.onnx.static_qdq import quantize_graph
    from lowprec.onnx.targeted import Written

    activations, weights = FORMS[request.form]
    sizes = request.sizes
    planned = place_dense(graph, read_back(source.path))
    fix_sizes(graph, sizes)
    made = quantize_graph(graph, planned, text, file, activation_bits=activations, weight_bits=weights)
    check_operators(onnx.load(file, load_external_data=False), "onnxruntime-qnn", OPERATORS, SOURCE)
    notes = [sizes.told(graph.kind)]
    notes.append(f"activations have {activations} bits, in ranges of the probe text, as they had not when scored")
    if again := [name.removesuffix(".dense") for name in made.again]:
        notes.append(
            f"{len(again)} weights ({again[0]}, ...) are rounded once more, to one scale per output channel, as they "
            "were not when scored"
        )
    return Written(
        layers=len([name for name in (*made.kept, *made.again) if name in planned]),
        notes=tuple(notes),
        rounds=True,
    )


def compile_htp(models: Sequence[str | Path], out: str | Path, *, htp_arch: str = "73", soc_model: str = "43") -> Path:
    """Compiles graphs for HTP ahead of time into one context, in which equal weights are stored once.

    No device is needed: onnxruntime-qnn (the extra `qnn`) brings the compiler for x86-64.

    Args:
        models: model.onnx of each export, whole graphs on HTP: what would fall back to the CPU is an error.
        out: the folder to write: a small ONNX file for each graph, and the context that all of them name.
        htp_arch: "68", "69", "73", "75", ...
        soc_model: of Qualcomm's list; 43 is the SM8550, whose HTP is a v73. Without one the compiler gives up.

    Returns:
        The context.

    Raises:
        ConfigError: onnxruntime-qnn is missing or has no compiler for this machine; a graph that is given twice.
        ArtifactError: a graph that does not compile, with the reason; a folder that is not empty.
    """
    try:
        import onnxruntime
        import onnxruntime_qnn
    except ImportError as error:
        raise ConfigError("compiling for HTP needs onnxruntime-qnn: pip install 'lowprec[qnn]'") from error
    if len({digests.sha256_of(Path(model)) for model in models}) < len(models):
        raise ConfigError("a graph is given twice: a context takes each once (the compiler crashes otherwise)")
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise ArtifactError(folder, "holds files already; choose an empty or a new folder")
    devices = _devices(onnxruntime, onnxruntime_qnn)
    folder.mkdir(parents=True, exist_ok=True)
    provider = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "htp_arch": htp_arch,
        "soc_model": soc_model,
        "offload_graph_io_quantization": "0",
    }
    # The context is that of the first session, and is written when the last one is made.
    sessions = []
    for number, model in enumerate(map(Path, models)):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        for key, value in _entries(folder / f"{number}.onnx", last=number == len(models) - 1).items():
            options.add_session_config_entry(key, value)
        options.add_provider_for_devices(devices, provider)
        try:
            sessions.append(onnxruntime.InferenceSession(str(model), options))
        except Exception as error:
            raise ArtifactError(model, f"does not compile for HTP ({str(error).partition(chr(10))[0]})") from error
    contexts = sorted(folder.glob("*.bin"))
    if len(contexts) != 1:
        raise ArtifactError(folder, f"has {len(contexts)} contexts where onnxruntime-qnn was to write one")
    return contexts[0]


def _devices(runtime: Any, plugin: Any) -> list[Any]:
    """What compiles; the plugin stays registered, as taking it away after a failure crashes the process at its end."""
    found = [device for device in runtime.get_ep_devices() if device.ep_name == PROVIDER]
    if not found:
        runtime.register_execution_provider_library(PROVIDER, plugin.get_library_path())
        found = [device for device in runtime.get_ep_devices() if device.ep_name == PROVIDER]
    if not found:
        raise ConfigError(f"onnxruntime-qnn {plugin.__version__} has no compiler for this machine")
    return found


def _entries(file: Path, last: bool) -> dict[str, str]:
    return {
        "session.disable_cpu_ep_fallback": "1",
        "ep.context_enable": "1",
        "ep.context_embed_mode": "0",
        "ep.context_file_path": str(file),
        "ep.share_ep_contexts": "1",
        "ep.stop_share_ep_contexts": "1" if last else "0",
    }


EXPORTERS.register("qnn", Exporter(name="qnn", forms=tuple(FORMS), write=write, fixed=tuple(FORMS)))
