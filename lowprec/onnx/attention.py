"""Attention as one node a layer: com.microsoft GroupQueryAttention, rotary angles and cache inside.

    q [B, T, H D], k, v [B, T, H_kv D] (or all three, packed)  ->  [B, T, H D], keys and values for the cache

What is matched is a layer of eager attention, from its keys and values outwards:

    present = Concat(past, rotated k);   Softmax(q present^T * scale + mask) present_v

All layers or none are rewritten: the operator wants the real tokens of a row side by side (`lowprec.onnx.padding`), and
the masks of a plain layer know nothing of that.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from lowprec.onnx.graph import Graph
from lowprec.onnx.matching import Mismatch, constant_of, made_by, only_reader, scalar
from lowprec.onnx.nbits import DOMAIN
from lowprec.onnx.padding import Rows
from lowprec.onnx.partial import Forms

SWAPPED = (0, 2, 1, 3)
LONGEST = 1 << 17
"""No longer table of rotary angles is written: at 64 of them it takes 64 MB."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rotary:
    """Angles [B, T, D] of each token."""

    cos: ir.Value
    sin: ir.Value


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Heads:
    """Queries or keys before they are turned: a layer's output [B, T, heads * width], and the norm of each head."""

    value: ir.Value
    count: int
    norm: ir.Node | None
    rotary: Rotary | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """One layer of attention as it was found; `out` reshapes its result to [B, T, H D] or [B * T, H D]."""

    q: Heads
    k: Heads
    v: ir.Value
    width: int
    scale: float
    mask: ir.Value
    out: ir.Node


def to_fused_attention(graph: Graph, positions: int) -> None:
    """Rewrites all layers of a decoder, in place.

    Args:
        graph: with folded constants, and norms as SimplifiedLayerNormalization.
        positions: how many tokens the model has places for.

    Raises:
        Mismatch: why they stay as they are; the graph is then of no further use.
    """
    layers = find_layers(graph)
    forms = Forms(model=graph.model, positions=min(positions, LONGEST))
    known = [
        (forms.window(x.mask), forms.table(x.q.rotary.cos, x.q.rotary.sin) if x.q.rotary else None) for x in layers
    ]
    rows = Rows(graph)
    for number, (layer, (window, table)) in enumerate(zip(layers, known, strict=True)):
        _rewrite(graph.model.graph, number, layer, window, table, rows)
    rows.finish()


def _rewrite(
    graph: ir.Graph,
    number: int,
    layer: Layer,
    window: int,
    table: tuple[ir.Value, ir.Value] | None,
    rows: Rows,
) -> None:
    if table is not None and layer.width % 16:
        raise Mismatch(
            f"layer {number}: GroupQueryAttention turns heads of 16, 32, ... values, these have {layer.width}"
        )
    packed = _packed(layer)
    nodes, turned = ([], [packed, None, None]) if packed is not None else _apart(layer)
    names = [f"present.{number}.{part}" for part in ("key", "value")]
    past = [i for name in names for i in graph.inputs if i.name == name.replace("present", "past_key_values")]
    inputs = [*turned, *past, rows.seqlens, rows.total, *(table or (None, None)), *[None] * 7, rows.fresh]
    made = ir.node(
        "GroupQueryAttention",
        inputs,
        {
            "num_heads": layer.q.count,
            "kv_num_heads": layer.k.count,
            "scale": layer.scale,
            "do_rotary": int(table is not None),
            "local_window_size": window or -1,
        },
        num_outputs=3,
        domain=DOMAIN,
        name=f"attention.{number}",
    )
    graph.insert_before(layer.out, [*nodes, made])
    for old, new in zip([x for x in graph.outputs if x.name in names], made.outputs[1:], strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}.plain"
        graph.outputs[list(graph.outputs).index(old)] = new
    flat = layer.out.outputs[0]
    if flat.shape is not None and len(flat.shape) == 3:
        ir.convenience.replace_all_uses_with(flat, made.outputs[0])
    else:
        layer.out.replace_input_with(0, made.outputs[0])


def _packed(layer: Layer) -> ir.Value | None:
    """Queries, keys and values in one, if a Split has cut them out of it and nothing was done to them since."""
    node = layer.q.value.producer()
    parts = [layer.q.value, layer.k.value, layer.v]
    if layer.q.norm or layer.k.norm or node is None or node.op_type != "Split" or list(node.outputs) != parts:
        return None
    return node.inputs[0]


def _apart(layer: Layer) -> tuple[list[ir.Node], list[ir.Value | None]]:
    """Queries, keys and values as three, the norms of heads applied."""
    nodes: list[ir.Node] = []
    found: list[ir.Value | None] = []
    for heads in (layer.q, layer.k):
        if heads.norm is None:
            found.append(heads.value)
        else:
            epsilon = heads.norm.attributes["epsilon"].as_float()
            attributes = {"num_branches": heads.count, "epsilon": epsilon}
            # Norms each head without its axis: no Reshape before and after.
            nodes.append(ir.node("BranchwiseRMSNorm", [heads.value, heads.norm.inputs[1]], attributes, domain=DOMAIN))
            found.append(nodes[-1].outputs[0])
    return nodes, [*found, layer.v]


def find_layers(graph: Graph) -> list[Layer]:
    """Every layer of attention of a decoder, in order.

    Raises:
        Mismatch: a layer that is none that can be rewritten.
    """
    outputs = {str(value.name): value for value in graph.model.graph.outputs}
    count = sum(name.startswith("present.") for name in outputs) // 2
    found = []
    for number in range(count):
        try:
            found.append(_layer(outputs[f"present.{number}.key"], outputs[f"present.{number}.value"]))
        except Mismatch as reason:
            raise Mismatch(f"layer {number}: {reason}") from reason
    return found


def _layer(key: ir.Value, value: ir.Value) -> Layer:
    joined_k, joined_v = made_by(key, "Concat"), made_by(value, "Concat")
    width, kv_heads = int(key.shape[3]), int(key.shape[1])
    transposed = only_reader(_repeated(key), "Transpose")
    if list(transposed.attributes["perm"].as_ints()) != [0, 1, 3, 2]:
        raise Mismatch("its keys are not multiplied as they lie in the cache")
    scores = only_reader(transposed.outputs[0], "MatMul")
    scale, mask, weights = _scores(scores.outputs[0])
    mixed = only_reader(weights, "MatMul")
    if mixed.inputs[1] is not _repeated(value):
        raise Mismatch("its values are not those of the cache")
    swapped = only_reader(mixed.outputs[0], "Transpose")
    out = only_reader(swapped.outputs[0], "Reshape")
    q, k = _heads(scores.inputs[0], None), _heads(joined_k.inputs[1], kv_heads)
    v = _heads(joined_v.inputs[1], kv_heads)
    if v.norm is not None or v.rotary is not None:
        raise Mismatch("its values are normed or turned")
    if (q.rotary is None) != (k.rotary is None) or (q.rotary and k.rotary and q.rotary.cos is not k.rotary.cos):
        raise Mismatch("queries and keys are turned by different angles")
    return Layer(q=q, k=k, v=v.value, width=width, scale=scale, mask=mask, out=out)


def _repeated(value: ir.Value) -> ir.Value:
    """Keys or values of the cache after each head was repeated for the queries that share it."""
    readers = [use.node for use in value.uses()]
    if len(readers) == 1 and readers[0].op_type == "Unsqueeze":
        if constant_of(readers[0].inputs[1]).tolist() != [2]:
            raise Mismatch("its heads are repeated in another order than one after the other")
        return only_reader(only_reader(readers[0].outputs[0], "Expand").outputs[0], "Reshape").outputs[0]
    return value


def _scores(value: ir.Value) -> tuple[float, ir.Value, ir.Value]:
    """Scale, mask and softmax of what queries times keys gives."""
    scale, mask = 1.0, None
    while True:
        node = only_reader(value, "Mul", "Div", "Add", "Softmax")
        other = next((i for i in node.inputs if i is not value), None)
        if node.op_type == "Softmax":
            if mask is None:
                raise Mismatch("it has no mask")
            return scale, mask, node.outputs[0]
        assert other is not None
        if node.op_type == "Add":
            if mask is not None:
                raise Mismatch("something besides one mask is added to its scores")
            mask = other
        elif mask is not None:
            raise Mismatch("its scores are scaled after the mask")
        else:
            scale = scale * scalar(other) if node.op_type == "Mul" else scale / scalar(other)
        value = node.outputs[0]


def _heads(value: ir.Value | None, count: int | None) -> Heads:
    """Back from heads [B, heads, T, width] to the layer that made them."""
    assert value is not None
    rotary, value = _turned(value)
    norm = None
    while True:
        node = made_by(value, "Transpose", "SimplifiedLayerNormalization", "Reshape")
        source = node.inputs[0]
        assert source is not None
        if node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) != SWAPPED:
            raise Mismatch("its heads do not lie side by side")
        if node.op_type == "SimplifiedLayerNormalization":
            norm = node
        if node.op_type == "Reshape":
            shape = node.outputs[0].shape
            if source.shape is None or len(source.shape) != 3 or shape is None or not isinstance(shape[2], int):
                raise Mismatch("its heads are no part of [batch, sequence, heads * width]")
            if count is not None and count != shape[2]:
                raise Mismatch(f"it makes {shape[2]} heads of keys or values, its cache has {count}")
            return Heads(value=source, count=shape[2], norm=norm, rotary=rotary)
        value = source


def _turned(value: ir.Value) -> tuple[Rotary | None, ir.Value]:
    """x cos + rotate_half(x) sin -> angles and x; a value that is no such sum as it is."""
    node = value.producer()
    if node is None or node.op_type != "Add":
        return None, value
    products = [made_by(i, "Mul") for i in node.inputs]
    for straight, crossed in (products, products[::-1]):
        for turned, sin in _both(crossed):
            half = turned.producer() if turned is not None else None
            if half is None or half.op_type != "Concat":
                continue
            upper, lower = made_by(made_by(half.inputs[0], "Neg").inputs[0], "Slice"), made_by(half.inputs[1], "Slice")
            x = lower.inputs[0]
            assert x is not None
            middle = constant_of(lower.inputs[2])[0]
            rest = constant_of(upper.inputs[1])[0]
            whole = x.shape is not None and 2 * int(middle) == x.shape[3] and middle == rest
            for same, cos in _both(straight):
                if same is x and upper.inputs[0] is x and whole:
                    return Rotary(cos=_per_token(cos), sin=_per_token(sin)), x
    raise Mismatch("its heads are turned otherwise than by halves, or only in part")


def _both(node: ir.Node) -> Iterator[tuple[ir.Value | None, ir.Value | None]]:
    yield node.inputs[0], node.inputs[1]
    yield node.inputs[1], node.inputs[0]


def _per_token(value: ir.Value | None) -> ir.Value:
    """[B, 1, T, D] -> the [B, T, D] that it was made from."""
    source = made_by(value, "Unsqueeze").inputs[0]
    assert source is not None
    return source
