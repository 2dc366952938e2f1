"""Two forms of one decoder in one file: one for few rows at a time (decode), one for many (prefill).

    rows = batch * sequence;    rows < MANY ? few : many        Size, Less, If

INT4 weights with scales of two levels (`lowprec.formats.two_level`) are INT8 with one scale for a row as well, to the
bit. With few rows the time goes into reading them: MatMulNBits reads four bits a weight. With many it goes into
multiplying: MatMulIntegerToFloat over the INT8 codes is several times as fast. Both are in the file, and a decoder has
two forms. What they round inputs to differs: by token with many rows, as is scored; with few in the blocks of the
groups, which is finer, since a row's largest value spoils its own block alone.

Tried on SmolLM2-135M with all layers and the head so (two threads of an AMD EPYC with VNNI, tokens a second in decode
and prefill of 512, one run in turns): float32 84 and 1,468, onnxruntime-genai's float32 92 and 1,183 and its INT4 193
and 1,083; this 219 and 2,388, and in onnxruntime-genai 220 and 1,922. MatMulNBits alone, 224 and 1,482. So decode is
2.4 times float32's at most with this operator, and attention, a third of the time, keeps prefill below twice.

A KV cache in codes (`lowprec.onnx.coded_cache`) has both forms, too.

The choice is made once a step, not once a product: entering a branch costs about as long as ten small operators.
Constants that both forms have are stored once. Graphs that are no decoders have the form for many alone.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lowprec.formats import QuantizedWeight
from lowprec.formats.two_level import in_rows
from lowprec.onnx.graph import Graph, stored
from lowprec.onnx.nbits import FAST, matmul_nbits
from lowprec.onnx.places import take_place
from lowprec.onnx.token import PRODUCT, matmul_token

MANY = 16
"""Rows from which on a call counts as prefill."""
FEW = "lowprec.few"
"""Under this key a product has, as long as the graph is in memory, what makes it with few rows: (graph, x) -> nodes."""


def matmul_in_phases(graph: ir.Graph, x: ir.Value, layer: str, weight: QuantizedWeight) -> list[ir.Node]:
    """The product of x [..., K] with INT4 codes of two levels [N, K], as it is with many rows; see `matmul_token`."""
    # The layer's own names are for the INT4 codes, which an embedding may read as well.
    nodes = matmul_token(graph, x, f"{layer}.rows", in_rows(weight))
    product = next(node for node in nodes if node.op_type == PRODUCT)
    product.meta[FEW] = partial(matmul_nbits, layer=layer, weight=weight, accuracy_level=FAST)
    return nodes


def in_phases(graph: Graph, always: bool = False) -> Graph:
    """A decoder's graph with a form for few rows beside its own; one that needs none as it is.

    Args:
        graph: not to be used afterwards.
        always: whether it needs one though none of its products does.
    """
    if not always and not any(FEW in node.meta for node in graph.model.graph):
        return graph
    few = graph.model.clone()
    for node in [node for node in few.graph if FEW in node.meta]:
        _by_block(few.graph, node)
    RemoveUnusedNodesPass()(few)
    forms = {"few": few.graph, "many": graph.model.graph}
    inputs, outputs = ([_fresh(v) for v in values] for values in (forms["many"].inputs, forms["many"].outputs))
    outer = ir.Graph(
        inputs, outputs, nodes=[], opset_imports=dict(forms["many"].opset_imports), name=forms["many"].name
    )
    for value in inputs:
        if value.const_value is not None:
            outer.register_initializer(value)
    for name, form in forms.items():
        _enter(form, {str(value.name): value for value in inputs})
        for value in form.outputs:
            value.name = f"{name}.{value.name}"
    _share(outer, forms)
    outer.extend(_choice(outer, forms, outputs))
    return Graph(model=ir.Model(outer, ir_version=graph.model.ir_version), kind=graph.kind, aliases=graph.aliases)


def _by_block(form: ir.Graph, product: ir.Node) -> None:
    """Puts the product for few rows into the place of one by token and of what rounds its input."""
    share = _input(_input(product).producer()).producer()
    (whole,) = [use.node for use in product.outputs[0].uses()]
    made = product.meta[FEW](form, _input(share))
    form.insert_before(whole, made)
    take_place(whole.outputs[0], made[-1].outputs[0])


def _input(node: ir.Node | None) -> ir.Value:
    assert node is not None
    value = node.inputs[0]
    assert value is not None
    return value


def _choice(outer: ir.Graph, forms: Mapping[str, ir.Graph], outputs: list[ir.Value]) -> list[ir.Node]:
    rows = ir.node("Size", [next(value for value in outer.inputs if value.name == "input_ids")])
    small = ir.node("Less", [rows.outputs[0], stored(outer, "phases.many", np.array(MANY, np.int64))])
    # Names that no branch has: those that are given when a file is written are unique in one graph alone.
    rows.outputs[0].name, small.outputs[0].name = "phases.rows", "phases.few"
    branches = [ir.AttrGraph("then_branch", forms["few"]), ir.AttrGraph("else_branch", forms["many"])]
    return [rows, small, ir.Node("", "If", small.outputs, branches, outputs=outputs)]


def _fresh(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)


def _enter(form: ir.Graph, inputs: Mapping[str, ir.Value]) -> None:
    """Makes a graph one without inputs, which reads those of the graph around it."""
    for value in list(form.inputs):
        ir.convenience.replace_all_uses_with(value, inputs[str(value.name)])
        form.initializers.pop(str(value.name), None)
    form.inputs.clear()


def _share(outer: ir.Graph, forms: Mapping[str, ir.Graph]) -> None:
    """Moves constants that both forms have out of them."""
    few, many = forms["few"].initializers, forms["many"].initializers
    for name in few.keys() & many.keys():
        if _same(few[name], many[name]):
            value = many.pop(name)
            ir.convenience.replace_all_uses_with(few.pop(name), value)
            outer.register_initializer(value)


def _same(a: ir.Value, b: ir.Value) -> bool:
    x, y = a.const_value, b.const_value
    assert x is not None
    assert y is not None
    return x.dtype == y.dtype and x.shape == y.shape and bool(np.array_equal(x.numpy(), y.numpy()))
