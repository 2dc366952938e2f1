"""How each scheme is told to compressed-tensors, and what the runtimes that read the result can do with it.

| scheme            | `format`         | stored weight                          | input activations    |
|-------------------|------------------|----------------------------------------|----------------------|
| w4a16-g*          | pack-quantized   | int32 [N, K/8], eight codes each       | -                    |
| w3a16-g*          | pack-quantized   | int32 [N, 3K/32], 32 codes to three    | -                    |
| w6a16             | pack-quantized   | int32 [N, 3K/16], 16 codes to three    | -                    |
| w8a16             | pack-quantized   | int32 [N, K/4], four codes each        | -                    |
| w8a8-int8         | int-quantized    | int8 [N, K]                            | int8, dynamic, token |
| w8a8-fp8          | float-quantized  | float8_e4m3fn [N, K]                   | fp8, dynamic, token  |
| w8a8-*-static     | as above         | as above, plus input_scale [1]         | static, per tensor   |
| w4a8-int8-g*      | int-quantized    | int8 [N, K], codes in [-8, 7]          | int8, dynamic, token |
| w4a8-fp8-g*       | pack-quantized   | int32 [N, K/8]                         | fp8, dynamic, token  |

Scales are bfloat16 [N, groups]. The layouts of the two w4a8 are those that vLLM's loaders read (its W4A8-int8 takes a
byte for each 4-bit code). Activation order leaves no trace: codes are in the columns' own order, so there is no g_idx.
"""

from collections.abc import Iterable
from typing import Any, Final

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from lowprec.formats.base import ACTIVATION_FORMATS, WEIGHT_FORMATS
from lowprec.formats.schemes import ASYMMETRIC, TWO_LEVEL, for_tables, per_block
from lowprec.records import Scheme

MIXED: Final = "mixed-precision"
PACKED: Final = "pack-quantized"
CONVERTED_CLASSES = ("Linear",)

# Members that vLLM loads as one matrix; they must share one scheme.
FUSED_SUFFIXES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)


def storage_format(scheme: Scheme) -> str:
    """The compressed-tensors `format` that `scheme` is stored in."""
    if scheme.activation is None or (scheme.family == "int4" and scheme.activation.startswith("fp8")):
        return PACKED
    if per_block(scheme):
        # No checkpoint holds it, but a byte for a 4-bit code is what vLLM alone asks for.
        return PACKED
    return "float-quantized" if scheme.weight == "fp8" else "int-quantized"


def quantization_scheme(scheme: Scheme, targets: Iterable[str]) -> QuantizationScheme:
    """`scheme` in the library's words, for the layers `targets` (full names)."""
    if scheme.weight is None:
        raise ValueError(f"{scheme.name} has no quantised weight")
    weight = WEIGHT_FORMATS[scheme.weight]
    grouped = weight.group_size is not None
    activations = None
    if scheme.activation is not None:
        dynamic = ACTIVATION_FORMATS[scheme.activation].dynamic
        activations = QuantizationArgs(
            num_bits=8,
            type="float" if scheme.activation.startswith("fp8") else "int",
            symmetric=True,
            strategy="token" if dynamic else "tensor",
            dynamic=dynamic,
        )
    return QuantizationScheme(
        targets=list(targets),
        weights=QuantizationArgs(
            num_bits=weight.bits,
            type="float" if scheme.weight == "fp8" else "int",
            symmetric=True,
            strategy="group" if grouped else "channel",
            group_size=weight.group_size,
            dynamic=False,
        ),
        input_activations=activations,
        format=storage_format(scheme),
    )


def unsupported(module: Any, scheme: Scheme) -> str | None:
    """Why a layer cannot be stored in `scheme` as compressed-tensors, or None when it can.

    Args:
        module: the layer, its class, or its class's name.
        scheme: what it should be stored in.
    """
    if scheme.weight is None:
        return None
    kind = module if isinstance(module, type | str) else type(module)
    name = kind if isinstance(kind, str) else kind.__name__
    if name == "Conv1D":
        return (
            "transformers' Conv1D keeps its weight transposed and compressed-tensors quantises only nn.Linear and "
            "nn.Embedding: a loader would leave the layer with random weights; lowprec's own form holds it "
            "(lowprec.write_own_form), and lowprec.load_artefact loads that"
        )
    if name not in CONVERTED_CLASSES:
        return f"{name} is not nn.Linear, and a loader of compressed-tensors would leave it with random weights"
    if for_tables(scheme):
        return f"{scheme.name} has rows of two widths, and compressed-tensors knows one width for a tensor"
    if TWO_LEVEL in scheme.weight:
        return f"{scheme.name} has scales of two levels, and compressed-tensors does not say so of scales"
    if per_block(scheme):
        return f"{scheme.name} rounds inputs block by block, which no runtime that reads compressed-tensors does"
    if scheme.weight.endswith(ASYMMETRIC):
        # Seen with transformers 5.24 and compressed-tensors 0.20: `from_pretrained` ends in a size mismatch.
        return (
            f"{scheme.name} has zero points, which are packed in files but not in the modules that transformers makes"
        )
    if scheme.weight not in WEIGHT_FORMATS:
        return f"{scheme.name} has no group size yet: resolve it for the layer's K first"
    return None


def runtime_notes(schemes: Iterable[Scheme], quantized_head: bool) -> tuple[str, ...]:
    """What other runtimes than transformers refuse or do differently with these schemes, one sentence each."""
    notes = set()
    for scheme in schemes:
        if scheme.name == "w8a16":
            notes.add("w8a16: vLLM on a CPU does not load it; on a GPU it does")
        if scheme.name.startswith("w4a16"):
            notes.add(
                "w4a16: vLLM on a CPU with AMX rounds the layers' inputs to INT8 as well, which was not scored; "
                "VLLM_CPU_INT4_W4A8=0 prevents it"
            )
        if scheme.name.startswith("w3a16"):
            notes.add("w3a16: vLLM has no kernel for three bits; transformers loads it")
        if scheme.name == "w6a16":
            notes.add("w6a16: vLLM has no kernel for six bits; transformers loads it")
        if scheme.name.startswith("w4a8-int8"):
            notes.add("w4a8-int8: vLLM runs it on CPUs only, and stores a byte for each 4-bit code")
        if scheme.name.startswith("w4a8-fp8"):
            size = WEIGHT_FORMATS[scheme.weight].group_size if scheme.weight else None
            extra = "" if size == 128 else f", and only with groups of 128 (here {size})"
            notes.add(f"{scheme.name}: vLLM runs it on compute capability 9.0 only{extra}; it rounds the scales to FP8")
        if scheme.activation is not None and scheme.activation.startswith("int8"):
            notes.add(
                f"{scheme.name}: plain transformers divides activations by 127.5 where lowprec and vLLM divide by 127, "
                "and rounds a 2-D input per tensor; load with lowprec to get the scored numbers"
            )
    if quantized_head:
        notes.add("lm_head is quantised: vLLM 0.32 takes it, releases that only quantise linear layers refuse it")
    return tuple(sorted(notes))
