"""A model as a graph of standard operators, opset 21, weights in float32 under the names of the model's state dict.

    decoder    input_ids [batch, sequence], attention_mask [batch, past + sequence], past_key_values.N.key and .value
               [batch, heads, past, width]  ->  logits [batch, sequence, vocabulary], present.N.key and .value
    encoder    input_ids, attention_mask [batch, sequence]  ->  last_hidden_state (and pooler_output)
    module     its example inputs, the first dimension free  ->  output, or output_0, output_1, ...

Batch, sequence and past are free, zero past included. Positions are derived from the mask, so padding may stand on
either side. Caches of sliding windows are kept whole: the mask hides what lies outside of the window. Attention is
the model's own eager form, because a row whose keys are all hidden makes NaN in the fused one once it is decomposed.

Source: torch.onnx.export(dynamo=True); docs.pytorch.org/docs/stable/onnx_dynamo.html
"""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn
from transformers import DynamicCache

from lowprec.artifacts.ct_checks import makes_logits
from lowprec.artifacts.loading import quiet
from lowprec.errors import ConfigError, LowprecError, UnsupportedError
from lowprec.runtime.kvcache import cache_argument

OPSET = 21
# What is traced must be general: nothing of size 0 or 1, no two sizes alike, and padding in the mask.
BATCH, SEQUENCE, PAST, PADDING = 2, 3, 5, 2
REMEDY = "serve this model from its artefact with lowprec.load_artefact, or with vLLM"
Kind = Literal["decoder", "encoder", "module"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graph:
    """A model's graph.

    Attributes:
        model: the graph; its initializers have the names of the module's parameters.
        aliases: name of a parameter -> all names of the same tensor; the graph knows tied ones under one of them.
    """

    model: ir.Model
    kind: Kind
    aliases: Mapping[str, tuple[str, ...]]

    def weight(self, layer: str) -> ir.Value | None:
        """The weight of a layer, None where the graph has none of its names."""
        known = self.model.graph.initializers
        return next((known[name] for name in self.aliases.get(f"{layer}.weight", ()) if name in known), None)


class _Decoder(nn.Module):
    """A causal model whose cache goes in and out as tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.traced = model
        self._cache = cache_argument(model)
        self._positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Ids [B, T], mask [B, P + T], keys and values [B, heads, P, width] by turns -> logits, keys and values."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, layer)
        extra = {self._cache: cache}
        if self._positions:
            extra["position_ids"] = positions(attention_mask)[:, -input_ids.shape[1] :]
        out = self.traced(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **extra)
        return (out.logits, *_tensors(cache))


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.traced = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Ids and mask [B, T] -> hidden states [B, T, D], and what the pooler makes of them where there is one."""
        out = self.traced(input_ids=input_ids, attention_mask=attention_mask)
        pooled = getattr(out, "pooler_output", None)
        return (out.last_hidden_state,) if pooled is None else (out.last_hidden_state, pooled)


def positions(mask: Tensor) -> Tensor:
    """[B, T] mask -> [B, T] the place of each token among the real ones of its row; padding before them has 0."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def _tensors(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def graph_of(module: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Graph:
    """The graph of a transformers model, or of any module with example inputs.

    Args:
        module: in float32, in eval mode, on the CPU; not changed.
        inputs: name -> example, [batch, ...], of a module that is no transformers model.

    Raises:
        ConfigError: no example inputs, or a batch of one.
        UnsupportedError: an operator or architecture that cannot be exported, or an input that the trace has lost.
    """
    with _blamed(module), _eager(module), torch.no_grad():
        if inputs is not None:
            return _module_graph(module, inputs)
        if getattr(module, "config", None) is None:
            raise ConfigError(f"give example inputs of {type(module).__name__}, which is no model of transformers")
        return _decoder_graph(module) if makes_logits(type(module).__name__) else _encoder_graph(module)


def tidy(graph: Graph) -> None:
    """Folds constants and removes what nothing reads, in place; codes stay codes, and paths of this machine go."""
    optimize_ir(graph.model, should_fold=lambda node: False if node.op_type == "DequantizeLinear" else None)
    ClearMetadataAndDocStringPass()(graph.model)


def lazy_constant(
    graph: ir.Graph, name: str, kind: ir.DataType, shape: Sequence[int], make: Callable[[], np.ndarray[Any, Any]]
) -> ir.Value:
    """A constant that is made when it is written, so that one at a time is in memory; one name is one constant."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.LazyTensor(lambda: ir.Tensor(make(), dtype=kind, name=name), dtype=kind, shape=ir.Shape(shape))
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=tensor)
    graph.register_initializer(value)
    return value


def stored(graph: ir.Graph, name: str, numbers: np.ndarray[Any, Any]) -> ir.Value:
    """A constant that is at hand; one name is one constant."""
    return lazy_constant(graph, name, ir.DataType.from_numpy(numbers.dtype), numbers.shape, lambda: numbers)


def constant(graph: ir.Graph, name: str, numbers: Sequence[int]) -> ir.Value:
    """[N] int64; one name is one constant."""
    return stored(graph, name, np.array(numbers, dtype=np.int64))


def _decoder_graph(model: Any) -> Graph:
    past = [torch.zeros(BATCH, heads, PAST, width) for heads, width in _cache_shapes(model)]
    names = [f"{layer}.{part}" for layer in range(len(past) // 2) for part in ("key", "value")]
    mask = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.long)
    mask[0, :PADDING] = 0
    traced = _traced(
        _Decoder(model),
        {"input_ids": torch.ones(BATCH, SEQUENCE, dtype=torch.long), "attention_mask": mask, "past": past},
        {
            "input_ids": {0: "batch", 1: "sequence"},
            "attention_mask": {0: "batch", 1: "total"},
            "past": [{0: "batch", 2: "past"} for _ in past],
        },
        ["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names)],
    )
    return _whole(traced, model, "decoder")


def _cache_shapes(model: Any) -> list[tuple[int, int]]:
    """(heads, width) of each layer's keys and values by turns."""
    cache = DynamicCache()
    model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=True, **{cache_argument(model): cache})
    found = _tensors(cache)
    if len(found) != 2 * model.config.get_text_config().num_hidden_layers or any(t.ndim != 4 for t in found):
        raise _refusal(
            model, "its layers do not all keep keys and values of every token, as the cache of the graph does"
        )
    return [(tensor.shape[1], tensor.shape[3]) for tensor in found]


def _encoder_graph(model: Any) -> Graph:
    mask = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
    mask[0, PADDING:] = 0
    given = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
    wrapper = _Encoder(model)
    outputs = ["last_hidden_state", "pooler_output"][: len(wrapper(**given))]
    free = {0: "batch", 1: "sequence"}
    return _whole(_traced(wrapper, given, dict.fromkeys(given, free), list(given), outputs), model, "encoder")


def _module_graph(module: nn.Module, inputs: Mapping[str, Tensor]) -> Graph:
    if alone := [name for name, example in inputs.items() if example.ndim == 0 or len(example) < 2]:
        raise ConfigError(f"the example of {alone[0]} needs a first dimension of at least two, which then may vary")
    out = module(**inputs)
    parts = (out,) if isinstance(out, Tensor) else out
    if not isinstance(parts, tuple | list) or not all(isinstance(part, Tensor) for part in parts):
        raise _refusal(module, "its output is no tensor and no tuple of tensors")
    names = ["output"] if isinstance(out, Tensor) else [f"output_{i}" for i in range(len(parts))]
    traced = _traced(module, dict(inputs), {name: {0: "batch"} for name in inputs}, list(inputs), names)
    return Graph(model=traced, kind="module", aliases=_aliases(module))


def _traced(
    module: nn.Module,
    given: dict[str, Any],
    free: dict[str, Any],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> ir.Model:
    with _calm():
        program = torch.onnx.export(
            module,
            kwargs=given,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=free,
            input_names=inputs,
            output_names=outputs,
            # Would fold the transposes of weights into constants without names.
            optimize=False,
            verbose=False,
        )
    assert program is not None
    made: ir.Model = program.model
    if made.opset_imports.get("") != OPSET:
        raise _refusal(module, f"torch made a graph of opset {made.opset_imports.get('')}, not {OPSET}; update torch")
    return made


def _whole(traced: ir.Model, model: nn.Module, kind: Kind) -> Graph:
    """The graph of a wrapper as that of the model in it; what goes in must matter to what comes out."""
    for name, value in list(traced.graph.initializers.items()):
        value.name = name.removeprefix("traced.")
    if lost := sorted(unread_inputs(traced.graph)):
        raise _refusal(model, f"{lost[0]} does not reach {traced.graph.outputs[0].name}: the trace has lost it")
    return Graph(model=traced, kind=kind, aliases=_aliases(model))


def unread_inputs(graph: ir.Graph) -> set[str]:
    """Names of the inputs whose values the first output does not depend on."""
    seen: set[ir.Value] = set()
    waiting = [graph.outputs[0]]
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if value not in seen and producer is not None:
            waiting += [given for given in _values_read(producer) if given is not None]
        seen.add(value)
    return {str(value.name) for value in graph.inputs if value not in seen}


def inputs_of(values: Sequence[ir.Value]) -> set[ir.Value]:
    """The inputs of a graph that values are computed from, be it from their sizes alone."""
    seen, waiting = set(), list(values)
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if value not in seen and producer is not None:
            waiting += [given for given in producer.inputs if given is not None]
        seen.add(value)
    return {value for value in seen if value.is_graph_input()}


def _values_read(node: ir.Node) -> Sequence[ir.Value | None]:
    """The inputs of a node of which it takes more than shape and type."""
    taken: Sequence[ir.Value | None] = node.inputs
    if node.op_type in ("Shape", "Size"):
        return ()
    return taken[:1] if node.op_type == "CastLike" else taken


def _aliases(module: nn.Module) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(alike) for alike in names.values() for name in alike}


@contextlib.contextmanager
def _blamed(module: nn.Module) -> Iterator[None]:
    """Whatever torch's exporter or the model raises in this context is an UnsupportedError about the model."""
    try:
        yield
    except LowprecError:
        raise
    except Exception as error:
        raise _refusal(module, f"{type(error).__name__}: {_told(error)}") from error


def _refusal(module: nn.Module, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{type(module).__name__} cannot be exported to ONNX", (reason, REMEDY))


def _told(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error: torch wraps the reason in advice about itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


@contextlib.contextmanager
def _eager(module: Any) -> Iterator[None]:
    """Attention as plain operators while open."""
    before = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if before is None:
        yield
        return
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Silences what the exporter says about itself and about packages that are not needed; errors still pass."""
    logger = logging.getLogger("torch.onnx")
    disabled, logger.disabled = logger.disabled, True
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled
        registration.setLevel(level)
