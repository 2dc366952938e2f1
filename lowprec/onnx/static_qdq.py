"""A whole graph in QuantizeLinear and DequantizeLinear with fixed ranges: what compilers for integer hardware take.

Every activation has one range, the least and largest value that it took over the artefact's probe text; weights of
products are the plan's codes where one scale per output channel holds them (`lowprec.onnx.dense`); what hides a token
lies where the range of scores ends (`lowprec.onnx.hidden`). onnxruntime's quantizer, in its configuration for QNN,
decides where Q and DQ stand; scales of weights are given to it, and that it wrote those codes is checked.

Source: onnxruntime.quantization.execution_providers.qnn; onnxruntime.ai/docs, QNN execution provider, "Generating a
quantized model".
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize
from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

from lowprec.errors import UnsupportedError
from lowprec.formats import QuantizedWeight
from lowprec.onnx.dense import Bits, Coded, coded
from lowprec.onnx.graph import Graph
from lowprec.onnx.hidden import hide_in_grid
from lowprec.onnx.windows import Feed, Text, calls, plain_session

# onnxruntime's quantizer makes copies of protobuf messages, which end at 2 GB.
LIMIT_BYTES = 2**31 - 2**24
WIDTHS = {4: QuantType.QInt4, 8: QuantType.QInt8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Names of the constants of products: in the plan's codes, and rounded once more."""

    kept: tuple[str, ...]
    again: tuple[str, ...]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: list[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def quantize_graph(
    graph: Graph,
    planned: Mapping[str, QuantizedWeight],
    text: Text,
    file: Path,
    *,
    activation_bits: int,
    weight_bits: Bits,
) -> Weights:
    """Writes the graph, of fixed sizes, in integers to `file`.

    Args:
        planned: what `place_dense` returned.
        activation_bits: 8 or 16, unsigned.
        weight_bits: 4 leaves what the plan has in 4 bits there; all else has 8.

    Raises:
        UnsupportedError: more than 2 GB in float32, or attention scores that activations cannot hold.
    """
    if (size := sum(v.const_value.nbytes for v in graph.model.graph.initializers.values() if v.const_value)) > (
        LIMIT_BYTES
    ):
        raise UnsupportedError(
            "the graph is too large for onnxruntime's quantizer", (f"{size / 1e9:.1f} GB in float32, 2.1 are possible",)
        )
    hide_in_grid(graph, text, file, activation_bits)
    plain = file.with_name("plain.onnx")
    _name_nodes(graph.model.graph)
    ir.save(graph.model, plain)
    try:
        found = _weights(graph.model.graph, planned, weight_bits)
        feeds = [feed for feed, _ in calls(plain_session(plain), text)]
        with _silent():
            config = get_qnn_qdq_config(
                plain,
                _Reader(feeds),
                activation_type=QuantType.QUInt16 if activation_bits == 16 else QuantType.QUInt8,
                weight_type=QuantType.QUInt8,
                init_overrides={name: _override(weight, axis) for name, (weight, axis) in found.items()},
            )
            quantize(plain, file, config)
    finally:
        plain.unlink()
    _check_codes(file, found)
    return Weights(
        kept=tuple(name for name, (weight, _) in found.items() if weight.kept),
        again=tuple(name for name, (weight, _) in found.items() if not weight.kept),
    )


def _weights(graph: ir.Graph, planned: Mapping[str, QuantizedWeight], bits: Bits) -> dict[str, tuple[Coded, int]]:
    """Name of each constant that a product reads -> its codes [K, N], and the axis of its output channels."""
    found: dict[str, tuple[Coded, int]] = {}
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        value = node.inputs[1]
        assert value is not None
        if value.const_value is None or len(value.const_value.shape) != 2:
            continue
        turned = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        array = value.const_value.numpy()
        name = str(value.name)
        found[name] = (coded(array.T if turned else array, planned.get(name), bits), 0 if turned else 1)
    return found


def _override(weight: Coded, axis: int) -> list[dict[str, Any]]:
    kind = WIDTHS[weight.bits]
    zero = np.array(0, np.int8)
    channels = [{"quant_type": kind, "scale": np.array(s, np.float32), "zero_point": zero} for s in weight.scale]
    channels[0] |= {"axis": axis}
    return channels


def _check_codes(file: Path, weights: Mapping[str, tuple[Coded, int]]) -> None:
    """That the quantizer's codes are ours."""
    model = onnx.load(file)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, (weight, axis) in weights.items():
        codes = numpy_helper.to_array(stored[f"{name}_quantized"]).astype(np.int8)
        if not np.array_equal(codes, weight.codes.T if axis == 0 else weight.codes):
            raise UnsupportedError("onnxruntime's quantizer wrote other codes than the plan's", (name,))


def _name_nodes(graph: ir.Graph) -> None:
    """The quantizer tells nodes apart by their names."""
    for number, node in enumerate(graph):
        node.name = f"{node.name or node.op_type}.{number}"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the advice to preprocess, which `fix_sizes` has done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
