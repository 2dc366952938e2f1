"""Single layers in sessions of their own: to time products of onnxruntime, and to see what they compute.

The graph of a candidate has `copies` products, each with an input and a weight of its own, and every run goes through
all of them. So weights are cold when the copies of all candidates together are four times the last-level cache, the
cost of entering a session is spread, and that of entering a node is part of a product's time, as it is in a model.
Inputs and weights must differ: onnxruntime makes one of equal nodes, and equal tensors are stored once.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.onnx.graph import OPSET
from lowprec.onnx.nbits import DOMAIN
from lowprec.onnx.token import matmul_token
from lowprec_kernels.timing import Timing, copies_for, time_interleaved

Product = Callable[[ir.Graph, ir.Value, str, QuantizedWeight], list[ir.Node]]
Weight = QuantizedWeight | Tensor
Opened = Callable[[ir.Model, int], Any]
"""(graph, threads) -> a session."""
Bound = Callable[[Any, "np.ndarray[Any, Any]", int, int], Callable[[int], object]]
"""(session, x [M, K], N, copies) -> a run."""
FLOAT = ir.TensorType(ir.DataType.FLOAT)
# Layers so small that they need more stay in the cache in their model, too.
MOST_COPIES = 128


def layer_model(product: Product | None, weights: Sequence[Weight]) -> ir.Model:
    """A graph of one product for each weight [N, K]: inputs x0, x1, ... [rows, K], outputs y0, y1, ... [rows, N].

    Dense weights, which need no `product`, are multiplied with in float32.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name="layer")
    for number, weight in enumerate(weights):
        name = f"layer{number}"
        x = ir.Value(name=f"x{number}", type=FLOAT, shape=ir.Shape(("rows", _size(weight)[1])))
        graph.inputs.append(x)
        if isinstance(weight, Tensor):
            nodes = [_dense(graph, x, name, weight)]
        else:
            assert product is not None
            nodes = product(graph, x, name, weight)
        graph.extend(nodes)
        y = nodes[-1].outputs[0]
        y.name, y.type, y.shape = f"y{number}", FLOAT, ir.Shape(("rows", _size(weight)[0]))
        graph.outputs.append(y)
    return ir.Model(graph, ir_version=10)


def _size(weight: Weight) -> tuple[int, int]:
    n, k = (weight if isinstance(weight, Tensor) else weight.codes).shape
    return n, k


def _dense(graph: ir.Graph, x: ir.Value, name: str, weight: Tensor) -> ir.Node:
    tensor = ir.tensor(np.ascontiguousarray(weight.numpy().T), name=f"{name}.weight")
    value = ir.Value(name=tensor.name, type=FLOAT, shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return ir.node("MatMul", [x, value])


def timing_options(threads: int) -> Any:
    """Options of a session that stands beside others which are timed in turns."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Those of one session would take the cores from the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_layers(model: ir.Model, threads: int, optimised: Path | None = None) -> Any:
    """An onnxruntime session of a graph in memory; threads do not wait actively between its runs.

    Args:
        optimised: where the graph is written that onnxruntime makes of it.
    """
    options = timing_options(threads)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    with tempfile.TemporaryDirectory() as folder:
        # A message of protobuf ends at 2 GB, a head of a large model in float32 does not.
        path = Path(folder) / "layer.onnx"
        ir.save(model, path, external_data="layer.data")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_layer(product: Product, weight: QuantizedWeight, x: Tensor) -> Tensor:
    """What onnxruntime makes of x [M, K] and a weight [N, K]: [M, N]."""
    (y,) = open_layers(layer_model(product, [weight]), threads=1).run(None, {"x0": x.numpy()})
    return torch.from_numpy(y)


def random_weight(fmt: str, n: int, k: int, seed: int = 0) -> QuantizedWeight:
    """Random codes [n, k] with scales, in a format of one width."""
    generator, found = torch.Generator().manual_seed(seed), WEIGHT_FORMATS[fmt]
    limit = (1 << (found.bits - 1)) - 1
    codes = torch.randint(-limit, limit + 1, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(n, k // (found.group_size or k), generator=generator) / 64 + 1 / 128
    return QuantizedWeight(format=fmt, codes=codes, scale=found.store_scales(scale))


def time_products(
    candidates: Mapping[str, tuple[Product, str] | None],
    n: int,
    k: int,
    ms: Sequence[int],
    threads: int,
    seconds_per_candidate: float,
    opened: Opened | None = None,
    bound: Bound | None = None,
) -> dict[tuple[str, int], Timing]:
    """Microseconds of one product x[m, k] @ w[n, k]^T, all candidates interleaved, weights cold.

    Args:
        candidates: name -> product and weight format; None for float32.
        opened, bound: what opens a graph and what runs it, of another runtime than onnxruntime.
    """
    opened, bound = opened or open_layers, bound or _bound
    sizes = {name: _bytes(made, n, k) for name, made in candidates.items()}
    copies = min(copies_for(sum(sizes.values())), MOST_COPIES)
    sessions = {name: opened(_copied(made, n, k, copies), threads) for name, made in candidates.items()}
    found: dict[tuple[str, int], Timing] = {}
    for m in ms:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).numpy()
        runs = {name: bound(session, x, n, copies) for name, session in sessions.items()}
        timed = time_interleaved(runs, seconds_per_candidate=seconds_per_candidate, min_runs=5)
        for name, t in timed.items():
            found[name, m] = t.per(copies)
    return found


def _bytes(made: tuple[Product, str] | None, n: int, k: int) -> float:
    return 4.0 * n * k if made is None else n * WEIGHT_FORMATS[made[1]].bytes_per_row(k)


def _copied(made: tuple[Product, str] | None, n: int, k: int, copies: int) -> ir.Model:
    if made is None:
        dense = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
        return layer_model(None, [dense.roll(number) for number in range(copies)])
    weight = random_weight(made[1], n, k)
    return layer_model(made[0], [dataclasses.replace(weight, codes=weight.codes.roll(i)) for i in range(copies)])


def _bound(session: Any, x: "np.ndarray[Any, Any]", n: int, copies: int) -> Callable[[int], object]:
    """A run with input and outputs in place, so that nothing but the products is timed."""
    binding = session.io_binding()
    for number in range(copies):
        binding.bind_cpu_input(f"x{number}", x)
        room = onnxruntime.OrtValue.ortvalue_from_shape_and_type([len(x), n], np.float32)
        binding.bind_ortvalue_output(f"y{number}", room)
    return lambda _: session.run_with_iobinding(binding)


@cache
def saturates() -> bool:
    """Whether products of uint8 and int8 overflow, as on x86 processors without VNNI, which add them in 16 bits."""
    codes = torch.full((16, 128), 127, dtype=torch.int8)
    weight = QuantizedWeight(format="int8", codes=codes, scale=torch.ones(16, 1))
    y = run_layer(matmul_token, weight, torch.ones(4, 128))
    return bool((y / (127.0 * 128) - 1.0).abs().max() > 1e-3)
