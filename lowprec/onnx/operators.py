"""Is every operator of a graph one that a runtime lists? Asked where the runtime itself is not there to be asked."""

from collections.abc import Iterable, Set
from typing import Any

from lowprec.errors import UnsupportedError

REMEDY = "export with --target onnx and let the runtime place these elsewhere, or serve the artefact with vLLM"


def check_operators(model: Any, target: str, listed: Set[str], source: str) -> None:
    """Raises UnsupportedError about the operators of an onnx ModelProto that are not in a runtime's list.

    Args:
        target: whose list it is.
        listed: names of operators; those of another domain than ONNX's own as domain:name.
        source: where the list stands.
    """
    unlisted: dict[str, str] = {}
    for node in nodes_of(model.graph):
        if name_of(node) not in listed:
            unlisted.setdefault(name_of(node), node.name)
    if unlisted:
        reasons = [f"{name} (first at {place or 'a node without a name'})" for name, place in sorted(unlisted.items())]
        raise UnsupportedError(f"{target} does not list operators of this model ({source})", (*reasons, REMEDY))


def nodes_of(graph: Any) -> Iterable[Any]:
    """All nodes of a GraphProto, those of branches and loops included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


def name_of(node: Any) -> str:
    """What `check_operators` looks up."""
    return str(node.op_type) if node.domain in ("", "ai.onnx") else f"{node.domain}:{node.op_type}"
