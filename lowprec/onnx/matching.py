"""Small words for matching nodes of a graph; what does not match says why."""

from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]


class Mismatch(Exception):
    """Why a part of a graph is not what a rewrite is for."""


def made_by(value: ir.Value | None, *kinds: str) -> ir.Node:
    """The node of one of these kinds that makes a value; Mismatch if another does."""
    node = None if value is None else value.producer()
    if node is None or node.op_type not in kinds:
        raise Mismatch(f"{' or '.join(kinds)} was expected, {'a constant' if node is None else node.op_type} was found")
    return node


def only_reader(value: ir.Value, *kinds: str) -> ir.Node:
    """The one node that reads a value, of one of these kinds; Mismatch if there are others."""
    readers = {use.node for use in value.uses()}
    if len(readers) != 1 or next(iter(readers)).op_type not in kinds:
        found = ", ".join(sorted(node.op_type for node in readers)) or "none"
        raise Mismatch(f"one reader, {' or '.join(kinds)}, was expected, {found} was found")
    return readers.pop()


def constant_of(value: ir.Value | None) -> Array:
    """What a constant holds; Mismatch if it is none."""
    found = None if value is None else ir.convenience.get_const_tensor(value)
    if found is None:
        raise Mismatch("a constant was expected")
    numbers: Array = found.numpy()
    return numbers


def scalar(value: ir.Value | None) -> float:
    """The one number that a constant holds."""
    found = constant_of(value)
    if found.size != 1:
        raise Mismatch("a number was expected")
    return float(np.ravel(found)[0])
