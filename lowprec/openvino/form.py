"""The canonical ONNX graph as OpenVINO runs it fastest on a CPU, with nothing rounded that the plan does not round.

1. *Codes* stay codes: OpenVINO reads DequantizeLinear and MatMul as one product of 4- or 8-bit weights.
2. *Attention*, which the graph spells out, becomes ScaledDotProductAttention.
3. *The cache* becomes state of the model: what goes in and out as past and present stays where it is, and `beam_idx`
   says which row goes on with which; OpenVINO fuses attention with a cache that is reordered, and with no other.
4. *Runtime options* go into the file: inputs of products of codes are rounded to INT8 in blocks of `block` values
   (`lowprec.formats.block`), or not at all, and the cache keeps the precision of what is written to it. Left alone,
   OpenVINO rounds in blocks of 32 and keeps the cache in INT8, which nobody has scored.

That option is one for the whole model, so schemes that round inputs and schemes that do not cannot be mixed.

Source: docs.openvino.ai, "Stateful models and State API"; CPU device, "Runtime options"; opset 13.
"""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation

from lowprec.errors import ArtifactError

PAST, PRESENT, BEAM = "past_key_values", "present", "beam_idx"
BLOCK_OPTION, CACHE_OPTION = "DYNAMIC_QUANTIZATION_GROUP_SIZE", "KV_CACHE_PRECISION"
OPTIONS = "runtime_options"


def read_onnx(path: Path) -> Any:
    """The model of an ONNX file.

    Raises:
        ArtifactError: OpenVINO does not read it.
    """
    try:
        return openvino.Core().read_model(str(path))
    except Exception as error:
        reason = str(error).strip().splitlines()[-1]
        raise ArtifactError(path, f"does not load in OpenVINO {openvino.__version__} ({reason})") from error


def to_openvino(model: Any, block: int) -> tuple[str, ...]:
    """Rewrites a model that was read from a canonical graph, in place.

    Args:
        block: how many inputs of a product of codes share a scale when they are rounded; 0: they are not rounded.

    Returns:
        What could not be made faster, one reason each.
    """
    notes = []
    if decodes(model):
        spelled = [node for node in model.get_ops() if node.get_type_name() == "Softmax"]
        reasons = {reason for node in spelled if (reason := _fuse_attention(node)) is not None}
        notes = [f"attention is in plain operators, which is slower: {reason}" for reason in sorted(reasons)]
        _keep_cache(model)
    model.set_rt_info(str(block), [OPTIONS, BLOCK_OPTION])
    model.set_rt_info("f32", [OPTIONS, CACHE_OPTION])
    return tuple(notes)


def decodes(model: Any) -> bool:
    """Whether the model has a cache."""
    return any(name.startswith(PAST) for value in model.inputs for name in value.get_names())


def block_of(model: Any) -> str:
    """The runtime option of `to_openvino`."""
    return str(model.get_rt_info([OPTIONS, BLOCK_OPTION]).astype(str))


def _fuse_attention(softmax: Any) -> str | None:
    """softmax(q k^T * scale + mask) v as one operator; or why this softmax is something else."""
    added = softmax.input_value(0).get_node()
    readers = list(softmax.output(0).get_target_inputs())
    if added.get_type_name() != "Add" or len(readers) != 1 or readers[0].get_node().get_type_name() != "MatMul":
        return "a softmax that is not between an added mask and a product"
    scaled, mask = (added.input_value(i) for i in range(2))
    scaled = scaled.get_node()
    if scaled.get_type_name() != "Multiply" or scaled.input_value(1).get_node().get_type_name() != "Constant":
        return "scores that are not scaled by a constant"
    scores, scale = scaled.input_value(0).get_node(), scaled.input_value(1)
    turned = scores.input_value(1).get_node()
    if scores.get_type_name() != "MatMul" or turned.get_type_name() != "Transpose":
        return "scores that are no product with transposed keys"
    order, rank = turned.input_value(1).get_node(), turned.get_output_partial_shape(0).rank.get_length()
    last_two = [*range(rank - 2), rank - 1, rank - 2]
    if order.get_type_name() != "Constant" or [int(i) for i in order.data.flatten()] != last_two:
        return "keys that are turned otherwise than in their last two axes"
    if softmax.get_attributes()["axis"] not in (-1, rank - 1):
        return "a softmax over something else than keys"
    product = readers[0].get_node()
    attention = ops.scaled_dot_product_attention(
        scores.input_value(0), turned.input_value(0), product.input_value(1), mask, scale, causal=False
    )
    attention.set_friendly_name(product.get_friendly_name())
    for reader in product.output(0).get_target_inputs():
        reader.replace_source_output(attention.output(0))
    return None


def _keep_cache(model: Any) -> None:
    """Makes the cache state: empty at first, for as many rows as there are in the input."""
    beam = ops.parameter([-1], dtype=np.int32, name=BEAM)
    beam.output(0).get_tensor().add_names({BEAM})
    pairs: dict[str, str] = {}
    for value in model.inputs:
        if not (name := value.get_any_name()).startswith(PAST):
            continue
        pairs[name] = name.replace(PAST, PRESENT)
        readers = value.get_target_inputs()
        ordered = ops.gather(value, beam, ops.constant(0, dtype=np.int64))
        for reader in readers:
            reader.replace_source_output(ordered.output(0))
    model.add_parameters([beam])
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, pairs)
    size = ops.shape_of(model.input("input_ids"), output_type="i64")
    rows = ops.gather(size, ops.constant([0], dtype=np.int64), ops.constant(0, dtype=np.int64))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, *rest = node.get_output_partial_shape(0)
            sizes = [np.array([0 if one.is_dynamic else one.get_length()], dtype=np.int64) for one in rest]
            shape = ops.concat([rows, *(ops.constant(one) for one in sizes)], 0)
            node.set_arguments([ops.broadcast(ops.constant(0.0, dtype=np.float32), shape)])
    model.validate_nodes_and_infer_types()
