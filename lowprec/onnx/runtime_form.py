"""The form for onnxruntime on CPUs: the canonical graph in onnxruntime's own operators, as few as will do.

    planned layers   `products`: MatMulNBits, one for q, k, v and one for gate, up
    embeddings       `tables`: GatherBlockQuantized, codes shared with a tied head
    norms            `norms`: SkipSimplifiedLayerNormalization and its kin
    attention        `attention`: GroupQueryAttention with angles and cache inside, padding taken out by `padding`
    SiLU             `activations`: QuickGelu

At decoding a small model spends as much time between nodes as in them. What cannot be rewritten stays in its plain
form, with the reason; a planned layer must be rewritten.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lowprec.formats import QuantizedWeight
from lowprec.onnx.activations import fuse_silu
from lowprec.onnx.attention import to_fused_attention
from lowprec.onnx.graph import Graph, tidy
from lowprec.onnx.matching import Mismatch
from lowprec.onnx.nbits import DOMAIN, AccuracyLevel
from lowprec.onnx.norms import find_norms, settle_norms
from lowprec.onnx.places import find_places
from lowprec.onnx.products import to_products
from lowprec.onnx.tables import to_coded_tables


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RuntimeForm:
    """A graph in onnxruntime's operators, and what stayed plain.

    Attributes:
        slow: layers whose weights onnxruntime multiplies in float32.
        tables: layer -> why its rows, which an embedding reads, are in float32.
        plain_attention: why attention is in plain operators; None where it is not.
    """

    graph: Graph
    layers: tuple[str, ...]
    slow: tuple[str, ...]
    tables: Mapping[str, str]
    plain_attention: str | None


def to_runtime(
    graph: Graph, solved: Mapping[str, QuantizedWeight], levels: Mapping[str, AccuracyLevel], positions: int | None
) -> RuntimeForm:
    """Makes a traced graph onnxruntime's.

    Args:
        graph: as it was traced; not to be used afterwards.
        solved: layer -> its weight in codes; empty for a graph in float32.
        levels: layer -> accuracy level.
        positions: how many tokens a decoder has places for; None: no decoder.

    Raises:
        UnsupportedError: planned layers that are not where they should be.
    """
    places = find_places(graph, solved)
    slow = to_products(graph, solved, places, levels)
    tables = to_coded_tables(graph, solved, places)
    tidy(graph)
    graph.model.graph.opset_imports[DOMAIN] = 1
    find_norms(graph.model)
    made, plain = graph, None
    if positions is not None:
        # A copy: half of a rewrite is of no use.
        made = Graph(model=graph.model.clone(), kind=graph.kind, aliases=graph.aliases)
        try:
            to_fused_attention(made, positions)
        except Mismatch as reason:
            made, plain = graph, str(reason)
    settle_norms(made.model)
    fuse_silu(made.model)
    tidy(made)
    layers = tuple(layer for layer, place in places.items() if place.products)
    return RuntimeForm(graph=made, layers=layers, slow=slow, tables=tables, plain_attention=plain)
