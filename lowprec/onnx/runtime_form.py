"""The form for onnxruntime on CPUs: the canonical graph in onnxruntime's own operators, as few as will do.

    planned layers   `products`: MatMulNBits or, for w8a8-int8, MatMulIntegerToFloat; one for q, k, v, one for gate, up
    embeddings       `tables`: GatherBlockQuantized, codes shared with a tied head
    norms            `norms`: SkipSimplifiedLayerNormalization and its kin
    attention        `attention`: GroupQueryAttention with angles and cache inside, padding taken out by `padding`
    SiLU             `activations`: QuickGelu
    w4a8-two-level   `phases`: of decoders, another form of the whole graph for few rows
    KV cache         `coded_cache`: INT8 by channel

At decoding a small model spends as much time between nodes as in them. What cannot be rewritten stays in its plain
form, with the reason; a planned layer must be rewritten.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight, held_bits
from lowprec.formats.rows import MixedRows
from lowprec.onnx.activations import fuse_silu
from lowprec.onnx.attention import LONGEST, to_fused_attention
from lowprec.onnx.forms import level_of
from lowprec.onnx.graph import Graph, tidy
from lowprec.onnx.matching import Mismatch
from lowprec.onnx.nbits import DOMAIN, EXACT, FAST
from lowprec.onnx.norms import find_norms, settle_norms
from lowprec.onnx.notes import FLOAT_WEIGHTS, unrounded, widened
from lowprec.onnx.phases import MANY, in_phases
from lowprec.onnx.places import find_places
from lowprec.onnx.products import PHASES, Level, to_products
from lowprec.onnx.tables import to_coded_tables
from lowprec.onnx.token import unround
from lowprec.records import Scheme


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RuntimeForm:
    """A graph in onnxruntime's operators, and what stayed plain.

    Attributes:
        layers: those that read codes.
        dense: planned layers whose weights are in float32.
        tables: layer -> why its rows, which an embedding reads, are in float32.
        plain_attention: why a decoder's attention is in plain operators; None where it is not.
        positions: how many tokens a decoder's sequences may have; None where nothing says.
    """

    graph: Graph
    layers: tuple[str, ...]
    dense: tuple[str, ...]
    tables: Mapping[str, str]
    plain_attention: str | None
    positions: int | None


def to_runtime(
    graph: Graph,
    solved: Mapping[str, QuantizedWeight],
    levels: Mapping[str, Level],
    positions: int | None,
    coded_cache: bool = False,
) -> RuntimeForm:
    """Makes a traced graph onnxruntime's.

    Args:
        graph: as it was traced; not to be used afterwards.
        solved: layer -> its weight in codes; empty for a graph in float32.
        levels: layer -> how inputs are rounded.
        positions: how many tokens a decoder has places for; None: no decoder.
        coded_cache: whether its KV cache is to be in codes, for which fused attention needs both forms.

    Raises:
        UnsupportedError: planned layers that are not where they should be.
    """
    places = find_places(graph, solved)
    dense = to_products(graph, solved, places, levels)
    tables = to_coded_tables(graph, solved, places)
    tidy(graph)
    graph.model.graph.opset_imports[DOMAIN] = 1
    find_norms(graph.model)
    made, plain = graph, None
    if graph.kind == "decoder":
        made, plain = _with_attention(graph, positions)
    settle_norms(made.model)
    fuse_silu(made.model)
    RemoveUnusedNodesPass()(made.model)
    if made.kind == "decoder":
        made = in_phases(made, always=coded_cache and plain is None)
    layers = tuple(layer for layer, place in places.items() if place.products and layer not in dense)
    most = positions if plain or positions is None else min(positions, LONGEST)
    return RuntimeForm(graph=made, layers=layers, dense=dense, tables=tables, plain_attention=plain, positions=most)


def _with_attention(graph: Graph, positions: int | None) -> tuple[Graph, str | None]:
    """A decoder's graph with fused attention; or as it is, and why."""
    if positions is None:
        return graph, "its configuration does not say for how many tokens it has positions"
    # A copy: half of a rewrite is of no use.
    made = Graph(model=graph.model.clone(), kind=graph.kind, aliases=graph.aliases)
    try:
        to_fused_attention(made, positions)
    except Mismatch as reason:
        return graph, str(reason)
    return made, None


def levels_of(schemes: Mapping[str, Scheme], accuracy: str) -> dict[str, Level]:
    """Layer -> how inputs are rounded: as in its scheme where `accuracy` is "planned", else the same for all."""
    if accuracy != "planned":
        return dict.fromkeys(schemes, EXACT if accuracy == "exact" else FAST)
    return {layer: level_of(scheme) for layer, scheme in schemes.items()}


def positions_of(module: nn.Module) -> int | None:
    """How many tokens a transformers model has places for, None where it does not say."""
    return _told(module, "max_position_embeddings")


def layers_of(module: nn.Module) -> int | None:
    """How many layers a transformers model has, None where it does not say."""
    return _told(module, "num_hidden_layers")


def _told(module: nn.Module, name: str) -> int | None:
    config: Any = getattr(module, "config", None)
    found = None if config is None else getattr(config.get_text_config(), name, None)
    return None if found is None else int(found)


@contextlib.contextmanager
def exact_twin(file: Path) -> Iterator[Path]:
    """A copy of the graph at `file`, over the same weights, that rounds no input; only while open."""
    model = onnx.load(file, load_external_data=False)
    inner = [a.g for node in model.graph.node for a in node.attribute if a.HasField("g")]
    # From within: `unround` puts copies of the nodes into the place of a graph's own.
    for graph in (*inner, model.graph):
        for attribute in (a for node in graph.node for a in node.attribute):
            if attribute.name == "accuracy_level":
                attribute.i = EXACT
        unround(graph)
    twin = file.with_name("exact.onnx")
    onnx.save(model, twin)
    try:
        yield twin
    finally:
        twin.unlink()


def runtime_notes(schemes: Mapping[str, Scheme], levels: Mapping[str, Level], form: RuntimeForm) -> tuple[str, ...]:
    """What this form does otherwise than the artefact that was scored, and what in it is slow."""
    notes = []
    fast = [layer for layer in form.layers if levels[layer] == FAST]
    exact = [layer for layer in form.layers if levels[layer] == EXACT]
    if unscored := sorted({schemes[layer].name for layer in fast if level_of(schemes[layer]) != FAST}):
        notes.append(f"{', '.join(unscored)}: inputs are rounded to INT8 block by block, as they were not when scored")
    notes += unrounded(schemes[layer] for layer in (*exact, *form.dense))
    notes += widened(schemes.values())
    if phased := sorted({schemes[layer].name for layer in form.layers if levels[layer] == PHASES}):
        notes.append(
            f"{', '.join(phased)}: in calls of fewer than {MANY} tokens inputs are rounded in the blocks of "
            "the groups, which is finer than by token, as was scored; weights are the same, stored in 4 and in 8 bits"
        )
    if form.dense:
        notes.append(f"{_some(form.dense)}: weights are float32, because onnxruntime has no kernel for FP8 on CPUs")
    if slow := [layer for layer in exact if _has_int8(schemes[layer])]:
        notes.append(
            f"{_some(slow)}: onnxruntime has no kernel for INT8 weights and inputs in float32; it makes the weights "
            "float32 at each step, slowly"
        )
    notes += [
        f"{layer}: rows that an embedding reads are in float32: {reason}" for layer, reason in form.tables.items()
    ]
    if form.positions == LONGEST:
        notes.append(f"a sequence may have {LONGEST} tokens, for which rotary angles are stored")
    if form.graph.kind == "decoder" and form.positions is None:
        notes.append("no genai_config.json: the configuration does not say for how many tokens there are positions")
    if form.plain_attention is not None:
        notes.append(f"attention is in plain operators: {form.plain_attention}")
    notes.append(FLOAT_WEIGHTS)
    return tuple(notes)


def _has_int8(scheme: Scheme) -> bool:
    fmt = WEIGHT_FORMATS[str(scheme.weight)]
    return held_bits(fmt) == 8 or isinstance(fmt, MixedRows)


def _some(layers: Sequence[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"
