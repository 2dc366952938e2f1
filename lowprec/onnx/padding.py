"""Rows of a batch without their padding: what GroupQueryAttention needs, made from the mask.

The operator knows no mask. It takes, for each row, how many of the tokens at hand are real and how many there are with
those in the cache, and wants the real ones first. So the tokens at hand are moved within their row,

    place[b, t] = number of real tokens before t               if t is real
                  number of real tokens + padding before t     if it is padding

and their last hidden states are moved back before the head. Padding never enters the cache: its rows hold the real
tokens of a row side by side, on whatever side padding stood and however the text was cut. Positions are places.

A row without a real token so far has one that is overwritten later: the operator wants at least one.

Beside `input_ids` and `attention_mask` the graph gets an input that may be left out, `logits_to_keep` [1]: of how many
last columns logits are wanted, 0 (its default) for all.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lowprec.onnx import KEEP
from lowprec.onnx.graph import Graph, constant, stored
from lowprec.onnx.matching import Mismatch, only_reader

HEADS = ("MatMul", "MatMulNBits", "Gemm")
ROUNDED = ("Abs", "Div")
"""What reads the input of a product by token (`lowprec.onnx.token`)."""
END = (1 << 63) - 1


class Rows:
    """The nodes that move tokens, put at the start of a decoder's graph.

    Attributes:
        seqlens: [B] int32, tokens of each row with those in the cache, less one.
        fresh: [B] int32, real tokens of each row at hand.
        total: int32, columns of the mask.
    """

    def __init__(self, graph: Graph) -> None:
        self._model, self._graph = graph.model, graph.model.graph
        self._ids, self._mask = (
            next(i for i in self._graph.inputs if i.name == name) for name in ("input_ids", "attention_mask")
        )
        self._made: list[ir.Node] = []
        one, last = self._constant("one", 1), self._constant("last", END)
        shape = self._node("Shape", [self._ids], start=1, end=2)
        at_hand = self._node("Slice", [self._mask, self._node("Neg", [shape]), last, one])
        known = self._node("ReduceSum", [self._mask, one], keepdims=0)
        self._real = self._node("ReduceSum", [at_hand, one], keepdims=0)
        some = self._node("Max", [known, one])
        self.seqlens = self._int32(self._node("Sub", [some, one]))
        self.fresh = self._int32(self._node("Add", [self._real, self._node("Sub", [some, known])]))
        self.total = self._int32(self._node("Squeeze", [self._node("Shape", [self._mask], start=1, end=2)]))
        self._before = self._node("Unsqueeze", [self._node("Sub", [known, self._real]), one])
        zero = self._scalar("zero", 0)
        self._columns = self._node("Range", [zero, self._node("Squeeze", [shape]), self._scalar("step", 1)])
        self._place = self._places(at_hand, one)
        self._moved = self._node("ScatterElements", [self._ids, self._place, self._ids], axis=1)

    def _places(self, at_hand: ir.Value, one: ir.Value) -> ir.Value:
        count = self._node("CumSum", [at_hand, self._scalar("axis", 1)])
        padding = self._node(
            "Sub", [self._node("Add", [self._node("Unsqueeze", [self._real, one]), self._columns]), count]
        )
        real = self._node("Cast", [at_hand], to=int(ir.DataType.BOOL))
        return self._node("Where", [real, self._node("Sub", [count, one]), padding])

    def finish(self) -> None:
        """Moves the tokens, and their hidden states back before the head.

        Raises:
            Mismatch: something still reads the mask, or what lies in the cache, in the old order.
        """
        positions = self._positions()
        for use in list(self._ids.uses()):
            if use.node.op_type != "Shape" and use.node not in self._made:
                use.node.replace_input_with(use.idx, self._moved)
        if positions is not None:
            ir.convenience.replace_all_uses_with(positions, self._node("Add", [self._before, self._columns]))
        self._move_back()
        self._graph.insert_before(self._graph[0], self._made)
        RemoveUnusedNodesPass()(self._model)
        self._check()

    def _positions(self) -> ir.Value | None:
        """The places of the tokens at hand, as `lowprec.onnx.graph.positions` has made them from the mask."""
        for use in self._mask.uses():
            if use.node.op_type == "CumSum" and use.node not in self._made:
                value = use.node.outputs[0]
                for kind in ("Sub", "Clip", "Slice"):
                    value = only_reader(value, kind).outputs[0]
                return value
        return None

    def _move_back(self) -> None:
        """Puts the last hidden states into the order of the input, those that logits are wanted of."""
        node = self._graph.outputs[0].producer()
        while node is not None and not _multiplies(node):
            source = node.inputs[0]
            node = None if source is None else source.producer()
        hidden = None if node is None else node.inputs[0]
        if hidden is None or hidden.shape is None or len(hidden.shape) != 3:
            raise Mismatch("its head reads no hidden states [batch, sequence, width]")
        keep = ir.Value(
            name=KEEP,
            shape=ir.Shape((1,)),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.tensor([0], dtype=ir.DataType.INT64, name=KEEP),
        )
        # An input that is an initializer, too, has that as its default.
        self._graph.register_initializer(keep)
        self._graph.inputs.append(keep)
        one = self._constant("one", 1)
        wanted = self._node("Slice", [self._place, self._node("Neg", [keep]), self._constant("last", END), one])
        index = self._node("Unsqueeze", [wanted, self._constant("end", -1)])
        readers = [use for use in hidden.uses() if use.node.op_type in (*HEADS, *ROUNDED)]
        moved = ir.node("GatherND", [hidden, index], {"batch_dims": 1}, name="rows.back")
        for use in readers:
            use.node.replace_input_with(use.idx, moved.outputs[0])
        producer = hidden.producer()
        assert producer is not None
        self._graph.insert_after(producer, moved)

    def _check(self) -> None:
        late = [use.node for use in self._mask.uses() if use.node not in self._made and not _is_size(use.node, 1)]
        for value in self._graph.inputs:
            if str(value.name).startswith("past_key_values."):
                readers = [use.node for use in value.uses() if use.node.op_type != "GroupQueryAttention"]
                late += [node for node in readers if not _is_size(node, 2)]
        if late:
            raise Mismatch(f"{late[0].op_type} reads the mask or the cache in the order of the input")

    def _node(self, kind: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
        node = ir.node(kind, inputs, attributes, name=f"rows.{len(self._made)}")
        self._made.append(node)
        return node.outputs[0]

    def _int32(self, value: ir.Value) -> ir.Value:
        return self._node("Cast", [value], to=int(ir.DataType.INT32))

    def _constant(self, name: str, number: int) -> ir.Value:
        return constant(self._graph, f"rows.{name}", [number])

    def _scalar(self, name: str, number: int) -> ir.Value:
        return stored(self._graph, f"rows.{name}", np.array(number, dtype=np.int64))


def _multiplies(node: ir.Node) -> bool:
    """Whether a node reads what a head multiplies with its weight."""
    if node.op_type == "Div":
        return all(use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses())
    return node.op_type in HEADS


def _is_size(node: ir.Node, length: int) -> bool:
    """Whether a node takes sizes alone, and not that of the axis `length`, which counts tokens."""
    if node.op_type != "Shape":
        return False
    bounds = [node.attributes.get(name) for name in ("start", "end")]
    start, end = (None if bound is None else bound.as_int() for bound in bounds)
    return length not in range(length + 1)[start or 0 : end]
