"""A decoder's KV cache in INT8 by channel (`lowprec.formats.cache_int8_channel`), in onnxruntime's own attention.

    few rows     GroupQueryAttention over codes: it rounds what it stores and reads a byte a value
    many rows    past = codes[:P] * scales;   GroupQueryAttention in float32;   codes[:P+T] = round(present / scales)

At decoding a third of a small model's time goes into reading keys and values, in float32 four bytes each. In prefill
the operator over codes takes several times as long as the one in float32 (onnxruntime 1.32: 235 ms instead of 65 for
512 tokens of SmolLM2-135M on two cores), so there it is given numbers, and codes are made of what it stored. A prompt
that is read at once sees its own keys and values as they are, which loses less than was scored; what comes after it
sees codes.

Works on the finished file: one with both forms (`lowprec.onnx.phases`), which was compared with the artefact before,
while its cache was in float32.

Source: github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, GroupQueryAttention.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.helper import make_attribute, make_node

from lowprec.records import CachePart, CachePlace, RoundedPart

FORMAT = "kv8-channel-int8"
CODES = {
    "kv_cache_bit_width": 8,
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
}
PAST, PRESENT, SCALES = (3, 4), (1, 2), (12, 13)
"""Which inputs and outputs of the operator are keys and values of the cache, and their scales."""
NAMES: Mapping[CachePart, str] = {"keys": "key", "values": "value"}
END = (1 << 63) - 1


def refuses(parts: Sequence[RoundedPart], layers: int | None) -> str | None:
    """Why a decoder of so many layers cannot keep its cache as `parts` say, None if it can."""
    if {part.format for part in parts} != {FORMAT}:
        return f"onnxruntime's attention computes with {FORMAT}, not {parts[0].format}"
    if layers is None:
        return "its configuration does not say how many layers it has"
    if {(part.layer, part.part) for part in parts} != {(n, p) for n in range(layers) for p in NAMES}:
        return "onnxruntime's attention has all of a model's keys and values in codes, or none"
    return None


def refuses_heads(places: Sequence[CachePlace]) -> str | None:
    """Why the operator cannot have codes of heads like these, None if it can."""
    by_layer: dict[int, set[tuple[int, int]]] = {}
    for place in places:
        by_layer.setdefault(place.layer, set()).add((place.heads, place.width))
    for sizes in by_layer.values():
        if len(sizes) > 1:
            return "onnxruntime's attention wants keys and values of one size"
        ((_, width),) = sizes
        if width % 8:
            return f"onnxruntime's attention wants heads of 8, 16, ... values, these have {width}"
    return None


def keep_in_codes(model: ModelProto, parts: Sequence[RoundedPart]) -> None:
    """Makes the cache of a decoder with fused attention in two forms one of codes, in place.

    Args:
        parts: keys and values of all layers; see `refuses`.

    Raises:
        ValueError: a graph of one form; scales that are not as many as a layer has channels.
    """
    choices = [node for node in model.graph.node if node.op_type == "If"]
    if len(choices) != 1:
        raise ValueError(f"a decoder in two forms has one choice between them, not {len(choices)}")
    (choice,) = choices
    few, many = (form.g for form in sorted(choice.attribute, key=lambda a: a.name != "then_branch"))
    add_scales(model.graph, {(part.layer, part.part): part.scales for part in parts})
    store_as_int8(model.graph)
    for form in (few, many):
        store_as_int8(form)
    read_codes(few)
    quantize_around(many)


def scale_name(past: str) -> str:
    """What the scales of an input `past_key_values.N.key` are called."""
    return f"{past}.scale"


def add_scales(graph: GraphProto, scales: Mapping[tuple[int, CachePart], Sequence[float]]) -> None:
    """Stores the scales of each layer's keys and values as [1, heads, 1, width]."""
    heads = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    for (layer, part), numbers in scales.items():
        past = f"past_key_values.{layer}.{NAMES[part]}"
        shape = (1, heads[past][1], 1, heads[past][3])
        array = np.array(numbers, np.float32).reshape(shape)
        graph.initializer.append(onnx.numpy_helper.from_array(array, scale_name(past)))


def store_as_int8(graph: GraphProto) -> None:
    """Makes what a graph takes, gives, and says of its cache INT8."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        if "past_key_values." in value.name or "present." in value.name:
            value.type.tensor_type.elem_type = TensorProto.INT8


def read_codes(graph: GraphProto) -> None:
    """Gives the graph's attention the cache in codes."""
    for node in _attention(graph):
        inputs = [*node.input, *[""] * (max(SCALES) + 1 - len(node.input))]
        for scale, past in zip(SCALES, PAST, strict=True):
            inputs[scale] = scale_name(inputs[past])
        node.input[:] = inputs
        node.attribute.extend(make_attribute(name, value) for name, value in CODES.items())


def quantize_around(graph: GraphProto) -> None:
    """Gives the graph's attention numbers in the place of codes, and makes codes of what it stores."""
    made = _sizes(graph)
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            made.append(node)
            continue
        before, after = [], []
        for past, present in zip(PAST, PRESENT, strict=True):
            stored = node.input[past]
            before += _dequantized(node, past)
            after += _quantized(node, present, stored)
        made += [*before, node, *after]
    del graph.node[:]
    graph.node.extend(made)


def _attention(graph: GraphProto) -> list[NodeProto]:
    return [node for node in graph.node if node.op_type == "GroupQueryAttention"]


def _sizes(graph: GraphProto) -> list[NodeProto]:
    """How many tokens there are, and how many of them are in the cache already: cache.all and cache.before, [1]."""
    constants = {
        "cache.start": np.array([0], np.int64),
        "cache.end": np.array([END], np.int64),
        "cache.axis": np.array([2], np.int64),
        "cache.step": np.array(1.0, np.float32),
        "cache.zero_point": np.array(0, np.int8),
    }
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    return [
        make_node("Shape", ["attention_mask"], ["cache.all"], start=1, end=2),
        make_node("Shape", ["input_ids"], ["cache.at_hand"], start=1, end=2),
        make_node("Sub", ["cache.all", "cache.at_hand"], ["cache.before"]),
    ]


def _dequantized(node: NodeProto, index: int) -> list[NodeProto]:
    """What is in the cache, in float32, for an input of attention."""
    past = node.input[index]
    node.input[index] = f"{past}.numbers"
    return [
        make_node("Slice", [past, "cache.start", "cache.before", "cache.axis"], [f"{past}.filled"]),
        make_node("Cast", [f"{past}.filled"], [f"{past}.float"], to=TensorProto.FLOAT),
        make_node("Mul", [f"{past}.float", scale_name(past)], [f"{past}.numbers"]),
    ]


def _quantized(node: NodeProto, index: int, past: str) -> list[NodeProto]:
    """Codes of what attention stored, before the room that the cache still has."""
    present = node.output[index]
    node.output[index] = f"{present}.numbers"
    return [
        make_node("Div", [f"{present}.numbers", scale_name(past)], [f"{present}.shares"]),
        make_node("QuantizeLinear", [f"{present}.shares", "cache.step", "cache.zero_point"], [f"{present}.filled"]),
        make_node("Slice", [past, "cache.all", "cache.end", "cache.axis"], [f"{present}.room"]),
        make_node("Concat", [f"{present}.filled", f"{present}.room"], [present], axis=2),
    ]
