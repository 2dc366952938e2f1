"""onnxruntime's MatMulNBits, in its own environment: worker_onnxruntime.py MODEL CALIBRATION OUT BITS BLOCK SYM.

Each layer is a graph of its own. Nothing is calibrated.
"""

import logging
import sys

import numpy as np
import torch
from exchange import Clock, load_model, rounded_layers, save_weights


def graph_of(weight: np.ndarray):
    """x @ weight, [K, N]."""
    from onnx import TensorProto, helper, numpy_helper

    k, n = weight.shape
    return helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "weight"], ["y"], name="layer")],
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", n])],
            [numpy_helper.from_array(weight, "weight")],
        )
    )


def codes_of(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis, the first in the lowest bits."""
    codes = packed[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & (1 << bits) - 1
    return codes.reshape(*packed.shape[:-1], -1)


def decoded(model, bits: int) -> torch.Tensor:
    """[N, K] from the codes [N, blocks, bytes], scales and zero points of the graph's one node."""
    from onnx import numpy_helper

    node = model.graph.node[0]
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    packed, scales, *zero_points = (stored[name] for name in node.input[1:])
    n, blocks, _ = packed.shape
    zero = codes_of(zero_points[0].reshape(n, -1), bits)[:, :blocks, None] if zero_points else 1 << bits - 1
    values = (codes_of(packed, bits).astype(np.float32) - zero) * scales.reshape(n, blocks, 1)
    return torch.from_numpy(values.reshape(n, -1))


if __name__ == "__main__":
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.disable(logging.INFO)
    model_folder, _, out, bits, block, symmetric = sys.argv[1:]
    model, _ = load_model(model_folder)
    layers = rounded_layers(model)
    rounded = {}
    with Clock() as clock:
        for name, m in layers.items():
            quantizer = MatMulNBitsQuantizer(
                graph_of(m.weight.detach().float().numpy().T),
                bits=int(bits),
                block_size=int(block),
                is_symmetric=symmetric == "symmetric",
            )
            quantizer.process()
            rounded[name] = quantizer.model.model
    save_weights({f"{name}.weight": decoded(graph, int(bits)) for name, graph in rounded.items()}, out, clock)
