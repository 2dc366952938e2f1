"""A graph for one size: batch 1, so many tokens, so many in the cache; what only free sizes need is folded away.

    encoder   input_ids, attention_mask [1, sequence]
    decoder   input_ids [1, sequence], attention_mask [1, past + sequence], past_key_values.N [1, heads, past, width];
              a cache that is not full yet begins with columns whose mask is 0, and goes on as present's last `past`
    module    the first dimension of its inputs is 1

One more rewrite, of what compilers for fixed sizes do not take: GatherND with constant places becomes Gather of the
flattened tensor. What hides a token stays as it is; forms that cannot hold it see to that (`lowprec.onnx.hidden`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.onnx.graph import Graph, Kind, tidy
from lowprec.onnx.places import replace_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Tokens of a call, and of the cache before it (of a decoder)."""

    sequence: int = 32
    past: int = 96

    def __post_init__(self) -> None:
        for name, value in (("sequence", self.sequence), ("past", self.past)):
            if value < 1:
                raise ConfigError(f"{name} {value}: give at least 1")

    def require_room(self, kind: Kind, positions: int | None) -> None:
        """Raises ConfigError where a model has positions for fewer tokens; None where it does not say."""
        total = self.sequence + (self.past if kind == "decoder" else 0)
        if positions is not None and kind != "module" and total > positions:
            sizes = f"sequence {self.sequence}" + (f" behind past {self.past}" if kind == "decoder" else "")
            raise ConfigError(f"{sizes}: the model has positions for {positions} tokens; give no more than that in all")

    def told(self, kind: Kind) -> str:
        """A note on it."""
        if kind == "module":
            return "of fixed sizes: batch 1"
        return f"of fixed sizes: batch 1, {self.sequence} tokens" + (
            f" behind {self.past}" if kind == "decoder" else ""
        )


def sizes_of(sequence: int | None, past: int | None) -> Sizes:
    """The sizes asked for, and the default where none was; ConfigError below 1."""
    default = Sizes()
    return Sizes(
        sequence=default.sequence if sequence is None else sequence, past=default.past if past is None else past
    )


def fix_sizes(graph: Graph, sizes: Sizes) -> None:
    """Makes the graph one of these sizes, in place, and folds what follows from them.

    Raises:
        UnsupportedError: sizes that stay free, or a GatherND whose places depend on values.
    """
    known = {"batch": 1, "sequence": sizes.sequence, "past": sizes.past, "total": sizes.sequence + sizes.past}
    inner = graph.model.graph
    for value in inner.inputs:
        assert value.shape is not None
        value.shape = ir.Shape([_size(d, known) for d in value.shape])
    for node in inner:
        for output in node.outputs:
            output.shape = None
    tidy(graph)
    for node in list(inner):
        if node.op_type == "GatherND":
            _flatten_gather(inner, node)
    tidy(graph)
    if free := [v.name for v in inner.outputs if v.shape is None or not all(isinstance(d, int) for d in v.shape)]:
        raise UnsupportedError(
            "the graph cannot be made one of fixed sizes", (f"{free[0]} has a size that stays free",)
        )


def _size(dimension: int | ir.SymbolicDim, known: Mapping[str, int]) -> int | ir.SymbolicDim:
    return known.get(str(dimension.value), dimension) if isinstance(dimension, ir.SymbolicDim) else dimension


def _flatten_gather(graph: ir.Graph, node: ir.Node) -> None:
    """data[indices] -> Gather(flat data, flat indices), in int32, as Gather of booleans is rarely taken."""
    data, places = node.inputs[0], node.inputs[1]
    constant = None if places is None else ir.convenience.get_const_tensor(places)
    if data is None or data.shape is None or constant is None or data.dtype is None:
        raise UnsupportedError("the graph cannot be made one of fixed sizes", (f"{node.name} gathers free places",))
    shape = [int(d) for d in data.shape]
    index = constant.numpy()
    if index.shape[-1] != len(shape):
        raise UnsupportedError("the graph cannot be made one of fixed sizes", (f"{node.name} gathers slices",))
    flat = np.ravel_multi_index(tuple(np.moveaxis(index, -1, 0)), shape).astype(np.int64)
    names = [f"{node.name}.{part}" for part in ("flat_shape", "flat_places")]
    arrays = (np.array([-1], np.int64), flat)
    made = [ir.Value(name=n, const_value=ir.tensor(a, name=n)) for n, a in zip(names, arrays, strict=True)]
    for value in made:
        graph.register_initializer(value)
    whole = ir.node("Cast", [data], {"to": ir.DataType.INT32})
    line = ir.node("Reshape", [whole.outputs[0], made[0]])
    taken = ir.node("Gather", [line.outputs[0], made[1]], {"axis": 0})
    back = ir.node("Cast", [taken.outputs[0]], {"to": data.dtype})
    replace_nodes(graph, node, [whole, line, taken, back])
