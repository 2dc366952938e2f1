"""What hides a token: a constant that is added to its attention scores, or takes their place, before a Softmax.

Models take the least float32. Beside it a score is nothing, so that it hides a token whatever the scores are; float32
graphs keep it. Where it does not fit, what stands there must lie below every score by MARGIN, and grids with fixed
ranges must hold both:

    float16    HALF: half the range, so that no score up to 30,000 leaves it when added, and a row is never all -inf
    integers   least score - largest score - MARGIN, over the artefact's text: one range of scores for all layers

Scores of an integer graph end at the ends of their range, so that this hides tokens of any text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lowprec.errors import UnsupportedError
from lowprec.onnx.graph import Graph, stored
from lowprec.onnx.windows import Text, calls, plain_session

HUGE = -1e30
HALF = -3e4
MARGIN = 20.0
"""Nats; exp(-20) is 2e-9."""
STEP = 1.0
"""Nats between neighbours on a grid of scores; wider ones make attention weights wrong by up to 65 %."""
MOVES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Slice", "Cast", "Identity")
ENDS = ("MatMul", "Gemm", "Conv", "Softmax", "LayerNormalization")

Use = tuple[ir.Node, int]


@dataclass(slots=True, kw_only=True, eq=False)
class Hiding:
    """How the attention of a graph hides tokens.

    Attributes:
        uses: node and number of its input that is such a constant.
        scores: what it is added to, and what goes into the Softmax.
    """

    uses: set[Use] = field(default_factory=set)
    scores: dict[str, ir.Value] = field(default_factory=dict)


def find_hiding(graph: Graph) -> Hiding:
    """What hides tokens in the graph, of folded constants; other constants, however small, are none of it."""
    found = Hiding()
    for node in graph.model.graph:
        if node.op_type == "Softmax" and node.inputs[0] is not None:
            before = len(found.uses), len(found.scores)
            _visit(node.inputs[0], found)
            if (len(found.uses), len(found.scores)) != before:
                found.scores[str(node.inputs[0].name)] = node.inputs[0]
    return found


def hide_with(graph: Graph, value: float) -> None:
    """Puts `value` into the place of what hides tokens, in place."""
    _replace(graph, find_hiding(graph), value)


def hide_in_grid(graph: Graph, text: Text, file: Path, bits: int) -> None:
    """Puts a value there that grids of activations hold beside the scores, in place.

    Args:
        text: what scores are measured on.
        file: where the graph may be written for that; nothing stays there.
        bits: of an activation.

    Raises:
        UnsupportedError: scores run so far that steps of the grid are wider than `STEP`.
    """
    hiding = find_hiding(graph)
    if not hiding.uses:
        return
    ir.save(graph.model, file)
    low, high = _range(file, list(hiding.scores), text)
    file.unlink()
    hidden = low - high - MARGIN
    step = (high - low - hidden) / (2**bits - 1)
    if not step <= STEP:
        raise UnsupportedError(
            f"activations of {bits} bits cannot hold this model's attention scores",
            (
                f"they run from {low:.4g} to {high:.4g} on the probe text: with what hides a token their grid has "
                f"steps of {step:.2g}, where {STEP:g} at most are of use; take a form of 16-bit activations",
            ),
        )
    _replace(graph, hiding, hidden)


def _range(file: Path, names: list[str], text: Text) -> tuple[float, float]:
    """Least and largest score that is not hidden."""
    low, high = np.inf, -np.inf
    for _, outputs in calls(plain_session(file, names), text):
        for array in outputs[len(outputs) - len(names) :]:
            seen = array[array > HUGE]
            low, high = min(low, float(seen.min(initial=np.inf))), max(high, float(seen.max(initial=-np.inf)))
    return low, high


def _visit(value: ir.Value, found: Hiding) -> None:
    """Adds what hides tokens in scores to what was found."""
    node = value.producer()
    while node is not None and node.op_type in MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type not in ("Add", "Where"):
        return
    sides = (0, 1) if node.op_type == "Add" else (1, 2)
    inputs = {side: node.inputs[side] for side in sides}
    uses = {side: set(_uses(node, side, set())) for side in sides}
    hiding = [side for side in sides if uses[side]]
    if len(hiding) == 1:
        found.uses |= uses[hiding[0]]
        other = inputs[sum(sides) - hiding[0]]
        if other is not None and ir.convenience.get_const_tensor(other) is None:
            found.scores[str(other.name)] = other
        return
    for side in hiding:
        if inputs[side] is not None:
            _visit(inputs[side], found)


def _uses(node: ir.Node, index: int, seen: set[Use]) -> Iterator[Use]:
    """Where constants that hide tokens are read on the way to an input of a node; scores are not entered."""
    value = node.inputs[index]
    if value is None or value.dtype not in (ir.DataType.FLOAT, None) or (node, index) in seen:
        return
    seen.add((node, index))
    constant = ir.convenience.get_const_tensor(value)
    if constant is not None:
        if constant.dtype == ir.DataType.FLOAT and constant.size and float(constant.numpy().min()) < HUGE:
            yield node, index
        return
    maker = value.producer()
    if maker is None or maker.op_type in ENDS:
        return
    for number in range(len(maker.inputs)):
        yield from _uses(maker, number, seen)


def _replace(graph: Graph, hiding: Hiding, value: float) -> None:
    for node, index in hiding.uses:
        old = node.inputs[index]
        constant = ir.convenience.get_const_tensor(old)
        assert old is not None
        assert constant is not None
        numbers = np.maximum(constant.numpy(), np.float32(value))
        node.replace_input_with(index, stored(graph.model.graph, f"{old.name}.hidden", numbers))
        if not old.uses():
            graph.model.graph.initializers.pop(str(old.name), None)
