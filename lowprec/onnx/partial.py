"""What a part of a graph computes, by running that part: masks and rotary angles are asked, not guessed from names.

A pattern of nodes may look like a causal mask and hide something else; its values cannot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from lowprec.onnx.graph import inputs_of, stored
from lowprec.onnx.matching import Array, Mismatch


def values_of(model: ir.Model, values: Sequence[ir.Value], tokens: int, mask: Array) -> list[Array]:
    """Values of a decoder's graph for the last `tokens` columns of mask [B, T], after a cache of the others.

    Token ids and what is in the cache are zeros: what is asked for must not depend on them.

    Raises:
        ValueError: it does depend on more than sizes and the mask.
    """
    needed = inputs_of(values)
    graph = ir.convenience.extract(model.graph, [i for i in model.graph.inputs if i in needed], list(values))
    part = ir.Model(graph, ir_version=model.ir_version)
    part.graph.opset_imports.update(model.graph.opset_imports)
    session = onnxruntime.InferenceSession(
        ir.to_proto(part).SerializeToString(), _options(), providers=["CPUExecutionProvider"]
    )
    found: list[Array] = session.run(None, _feeds(session, tokens, mask))
    return found


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def _feeds(session: Any, tokens: int, mask: Array) -> Mapping[str, Array]:
    batch, total = mask.shape
    feeds: dict[str, Array] = {}
    for given in session.get_inputs():
        if given.name == "attention_mask":
            feeds[given.name] = mask.astype(np.int64)
        elif given.name == "input_ids":
            feeds[given.name] = np.zeros((batch, tokens), dtype=np.int64)
        else:
            # Only its size is read, so that no memory is touched.
            feeds[given.name] = np.zeros((batch, given.shape[1], total - tokens, given.shape[3]), dtype=np.float32)
    return feeds


def window_of(model: ir.Model, mask: ir.Value, positions: int) -> int | str:
    """Keys that a query sees, itself included, in an additive mask [B, 1, T, P + T]; 0 for all before it.

    Returns:
        Or why it is no mask that hides padding, what comes later, and what is further back than a window.
    """
    (last,) = values_of(model, [mask], 1, np.ones((1, positions)))
    seen = int((last == 0).sum())
    window = 0 if seen == positions else seen
    length = (window or 8) + 9
    padded = np.ones((3, length))
    padded[1, :3], padded[2, length - 6 : length - 4] = 0, 0
    (found,) = values_of(model, [mask], 5, padded)
    if found.ndim != 4 or found.shape[1] != 1:
        return f"its mask differs from head to head (shape {list(found.shape)})"
    query, key = np.arange(length - 5, length)[:, None], np.arange(length)
    near = (key <= query) & ((query - key < window) if window else True)
    expected = near & (padded[:, None] > 0)
    found = np.broadcast_to(found[:, 0], expected.shape)
    if not np.array_equal(found == 0, expected) or not (found[~expected] < -1e4).all():
        return "its mask hides something else than padding, what comes later and what lies outside of a window"
    return window


def rotary_table(model: ir.Model, cos: ir.Value, sin: ir.Value, positions: int) -> tuple[Array, Array] | str:
    """Cosines and sines [positions, width / 2] of rotary angles, or why they are no table."""
    whole = values_of(model, [cos, sin], positions, np.ones((1, positions)))
    # A threshold may lie anywhere: beyond it all angles are others.
    for length in (1 << n for n in range((positions - 1).bit_length())):
        start = values_of(model, [cos, sin], length, np.ones((1, length)))
        if any(not np.array_equal(w[:, :length], s) for w, s in zip(whole, start, strict=True)):
            return "its rotary angles depend on the length of the text"
    halves = [np.split(w.reshape(positions, -1), 2, axis=-1) for w in whole]
    if any(not np.array_equal(left, right) for left, right in halves):
        return "the halves of a head turn by different angles"
    return halves[0][0], halves[1][0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forms:
    """What masks hide and how far heads turn, each asked of the graph once.

    Attributes:
        positions: how many tokens the model has places for.
    """

    model: ir.Model
    positions: int
    windows: dict[ir.Value, int] = field(default_factory=dict)
    tables: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    def window(self, mask: ir.Value) -> int:
        """Keys that a query sees, 0 for all; Mismatch if it is no such mask."""
        if mask not in self.windows:
            found = window_of(self.model, mask, self.positions)
            if isinstance(found, str):
                raise Mismatch(found)
            self.windows[mask] = found
        return self.windows[mask]

    def table(self, cos: ir.Value, sin: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Constants with cosines and sines [positions, D / 2]; Mismatch if angles do not depend on position alone."""
        if cos not in self.tables:
            found = rotary_table(self.model, cos, sin, self.positions)
            if isinstance(found, str):
                raise Mismatch(found)
            number, graph = len(self.tables), self.model.graph
            self.tables[cos] = (
                stored(graph, f"rotary.{number}.cos", found[0]),
                stored(graph, f"rotary.{number}.sin", found[1]),
            )
        return self.tables[cos]
