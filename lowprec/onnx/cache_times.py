"""Times attention over the KV cache in onnxruntime, in float32 and over codes, as decoders have it.

The graph has `copies` nodes, each with a cache of its own that is input and output at once, and every run goes through
all of them: so each cache is cold, as it is when the whole model has run in between.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from lowprec.onnx.binding import empty_cache
from lowprec.onnx.coded_cache import NAMES, add_scales, quantize_around, read_codes, store_as_int8
from lowprec.onnx.graph import OPSET
from lowprec.onnx.layers import timing_options
from lowprec.onnx.nbits import DOMAIN
from lowprec.onnx.phases import MANY
from lowprec.records import CachePlace
from lowprec_kernels.timing import Timing, copies_for, time_interleaved

LIMIT_BYTES = 256 << 20
MOST_COPIES = 32


def time_attention(
    place: CachePlace,
    coded: Sequence[bool],
    batch: int,
    added: int,
    held: int,
    threads: int,
    seconds_per_candidate: float,
) -> dict[bool, Timing]:
    """Whether the cache is in codes -> microseconds of one layer's attention.

    Args:
        place: heads and width of keys and values, and how many heads ask.
        batch, added, held: sequences, tokens at hand, tokens in the cache before.
    """
    size = sum(2.0 * batch * (held + added) * place.heads * place.width * (1 if codes else 4) for codes in coded)
    copies = min(copies_for(size, limit_bytes=LIMIT_BYTES), MOST_COPIES)
    queries = place.queries or place.heads
    given = {
        "input_ids": np.zeros((batch, added), np.int64),
        "attention_mask": np.ones((batch, held + added), np.int64),
        "lengths": np.full(batch, held + added - 1, np.int32),
        "total": np.array(held + added, np.int32),
        "x": np.random.default_rng(0).standard_normal(
            (batch, added, (queries + 2 * place.heads) * place.width), np.float32
        ),
    }
    runs = {}
    for codes in coded:
        session = _opened(place, queries, codes, batch * added < MANY, copies, threads)
        runs[str(codes)] = _bound(session, given, batch, held + added)
    found = time_interleaved(runs, seconds_per_candidate=seconds_per_candidate, min_runs=5)
    return {codes: found[str(codes)].per(copies) for codes in coded}


def _opened(place: CachePlace, queries: int, codes: bool, few: bool, copies: int, threads: int) -> Any:
    """A session of `copies` layers."""
    sizes = {"input_ids": TensorProto.INT64, "attention_mask": TensorProto.INT64, "lengths": TensorProto.INT32}
    inputs = [make_tensor_value_info(name, kind, None) for name, kind in sizes.items()]
    inputs += [
        make_tensor_value_info("total", TensorProto.INT32, []),
        make_tensor_value_info("x", TensorProto.FLOAT, None),
    ]
    outputs, nodes = [], []
    for number in range(copies):
        stored = [f"{number}.{name}" for name in NAMES.values()]
        shape = ["batch", place.heads, None, place.width]
        inputs += [make_tensor_value_info(f"past_key_values.{x}", TensorProto.FLOAT, shape) for x in stored]
        names = [f"y.{number}", *(f"present.{x}" for x in stored)]
        outputs += [make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        past = [f"past_key_values.{x}" for x in stored]
        nodes.append(
            make_node(
                "GroupQueryAttention", ["x", "", "", *past, "lengths", "total"], names, domain=DOMAIN,
                num_heads=queries, kv_num_heads=place.heads,
            )
        )  # fmt: skip
    graph = make_graph(nodes, "attention", inputs, outputs)
    if codes:
        ones = (1.0 / 64,) * (place.heads * place.width)
        add_scales(graph, {(number, part): ones for number in range(copies) for part in NAMES})
        store_as_int8(graph)
        (read_codes if few else quantize_around)(graph)
    model = make_model(graph, opset_imports=[make_opsetid("", OPSET), make_opsetid(DOMAIN, 1)])
    model.ir_version = 10
    return onnxruntime.InferenceSession(
        model.SerializeToString(), timing_options(threads), providers=["CPUExecutionProvider"]
    )


def _bound(session: Any, given: dict[str, Any], batch: int, capacity: int) -> Callable[[int], object]:
    """A run with everything in place, each cache input and output at once."""
    binding = session.io_binding()
    known = {i.name: i for i in session.get_inputs()}
    for name, array in given.items():
        # One that only the form for many rows reads is no input of the other.
        if name in known:
            binding.bind_cpu_input(name, array)
    for name, told in known.items():
        if name not in given:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(empty_cache(told, batch, capacity))
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
    for output in session.get_outputs():
        if output.name.startswith("y."):
            binding.bind_output(output.name)
    return lambda _: session.run_with_iobinding(binding)
