"""What OpenVINO computes of a scheme, and single layers in models of their own: to time and to check products.

| scheme                          | product                                                  |
|---------------------------------|----------------------------------------------------------|
| bf16                            | FullyConnected in float32                                |
| w4a8-block64-g*, w8a8-block64   | the same with codes, inputs rounded to INT8 in blocks    |

Blocks have one size in all of a model, which must divide K and the groups of all weights: 64 divides what 32 does in
most models, and is faster. Left out: inputs that are not rounded, since a model that has both cannot be had and many
rows then take three times as long; FP8, which is multiplied in float32.

Source: docs.openvino.ai, "Optimize inference, dynamic quantization". The rule of rounding was found by comparing (it is
that of `lowprec.formats.block`, to the last bit of the sums).
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import openvino
import torch
from torch import Tensor

from lowprec.errors import UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.schemes import BLOCK, FIXED_BLOCK
from lowprec.onnx.canonical import dequantised
from lowprec.onnx.layers import layer_model
from lowprec.openvino.form import read_onnx
from lowprec.openvino.module import compiled
from lowprec.records import Scheme

ACTIVATION = f"int8{BLOCK}{FIXED_BLOCK}"


def refuses(scheme: Scheme) -> str | None:
    """Why OpenVINO does not compute a resolved `scheme`, None if it does."""
    if scheme.weight is None:
        return None
    if WEIGHT_FORMATS[scheme.weight].code_dtype.is_floating_point:
        return f"{scheme.name}: OpenVINO multiplies FP8 in float32"
    if scheme.activation != ACTIVATION:
        return (
            f"{scheme.name}: OpenVINO rounds the inputs of all weights in codes, in blocks of one size for the model: "
            f"w4a8{BLOCK}{FIXED_BLOCK}, w8a8{BLOCK}{FIXED_BLOCK}"
        )
    return None


def block_for(schemes: Mapping[str, Scheme]) -> int:
    """The size of the blocks that inputs are rounded in, one for the model; 0 where none are rounded.

    Args:
        schemes: layer -> resolved scheme, of the layers in codes.

    Raises:
        UnsupportedError: some are, and some are not or otherwise.
    """
    if all(scheme.activation is None for scheme in schemes.values()):
        return 0
    if reasons := [f"{layer}: {why}" for layer, scheme in schemes.items() if (why := refuses(scheme))]:
        remedy = "lowprec calibrate --target openvino makes a plan that it computes"
        raise UnsupportedError("OpenVINO does not compute these layers as they were scored", (*reasons, remedy))
    return FIXED_BLOCK


def product(graph: ir.Graph, x: ir.Value, layer: str, weight: QuantizedWeight) -> list[ir.Node]:
    """x W^T in codes, as the canonical graph has it; the last node has the result."""
    codes = dequantised(graph, layer, weight)
    return [codes, ir.node("MatMul", [x, codes.outputs[0]])]


def open_layers(model: ir.Model, threads: int) -> Any:
    """An OpenVINO request of a graph in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        ir.save(model, path, external_data="layer.data")
        return compiled(read_onnx(path), threads, str(FIXED_BLOCK)).create_infer_request()


def run_layer(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """What OpenVINO makes of x [M, K] and a weight [N, K]: [M, N]."""
    request = open_layers(layer_model(product, [weight]), threads=1)
    return torch.from_numpy(request.infer([x.numpy()])[0].copy())


def bound(request: Any, x: "np.ndarray[Any, Any]", n: int, copies: int) -> Callable[[int], object]:
    """A run with its inputs in place, so that nothing but the products is timed."""
    for number in range(copies):
        request.set_tensor(f"x{number}", openvino.Tensor(x, shared_memory=True))
    return lambda _: request.infer()
