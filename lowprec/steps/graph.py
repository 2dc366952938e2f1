"""Finds the groups: which linear layers there are, and which of them a runtime fuses.

Runtimes concatenate layers of one parent module that read the same tensor ({q, k, v}, {gate, up}); so these are found
by what the trace saw, not by the names that one architecture uses. For a form of weights that no runtime fuses, each
layer is a group: v stands rounding far worse than q and k, which would all have to have what it needs. Everything that
is not in a group is listed with its bytes and the reason. Where embeddings are to be rounded, a head takes the
embedding that shares its weight into its group, since the two are stored as one, and an embedding that nothing is tied
to is a group of its own.
"""

import re

import torch
from torch import nn

from lowprec.records import Group
from lowprec.results import Unquantised
from lowprec.steps.linear import input_width, output_width
from lowprec.steps.stream import Stream

# Of the model's parameters: smaller embeddings are not worth codes.
SMALLEST_EMBEDDING = 0.01
ROUTED = "a router decides which tokens it is given, not supported yet"
# Of a module in a list: .experts.3.
MEMBER = re.compile(r"\.\d+(?=\.|$)")
ROLES = ("qkv", "q", "k", "v", "o", "gate_up", "gate", "up", "down", "lm_head")


def find_groups(
    stream: Stream, embeddings: bool = False, stored: torch.dtype | None = None, fused: bool = True
) -> tuple[tuple[Group, ...], tuple[Unquantised, ...]]:
    """The model's groups in the order in which it runs, and what stays unquantised.

    Args:
        embeddings: whether embeddings are rounded as well; else they stay as they are.
        stored: what weights are stored in, for their bytes; None: in the dtype that they have.
        fused: whether a runtime may fuse layers that read one tensor; else each layer is a group of its own.
    """
    members: dict[tuple[str, int | str], list[str]] = {}
    refused: dict[str, str] = {}
    routed = _routed(stream)
    for name in stream.layers:
        calls = stream.calls[name]
        reason = ROUTED if name in routed else _unusable(name, len(calls), stream)
        if reason:
            refused[name] = reason
        else:
            members.setdefault((name.rpartition(".")[0], calls[0] if fused else name), []).append(name)
    groups = [_group(parent, layers, stream, embeddings) for (parent, _), layers in members.items()]
    if embeddings:
        groups = [*_embeddings(stream), *groups]
    # Blocks in order; of what lies outside them, embeddings run first and heads last.
    ordered = sorted(groups, key=lambda g: (-1 if g.is_embedding else stream.depth) if g.block is None else g.block)
    shared = {table for group in ordered for table in group.tables}
    taken = [n for g in ordered for n in g.layers]
    return tuple(ordered), _unquantised(stream.module, taken, shared, refused, stored)


def _routed(stream: Stream) -> set[str]:
    """Layers of modules in a list between which a router chooses, as experts are: each is given some rows only.

    The layers in one place of such modules are given no sequences, but each another number of rows, or a number that is
    neither that of the sequences nor that of their tokens; or one of them is given all tokens, and another nothing.
    """
    sequences = [shape for given in stream.given.values() for shape in given if len(shape) > 1]
    known, tokens = {shape[0] for shape in sequences}, {shape.numel() for shape in sequences}
    alike: dict[str, list[str]] = {}
    for name in stream.layers:
        block = stream.block_of(name)
        start = 0 if block is None else len(stream.block_names[block])
        for member in MEMBER.finditer(name, start):
            alike.setdefault(f"{name[: member.start()]}.*{name[member.end() :]}", []).append(name)
    found: set[str] = set()
    for names in alike.values():
        rows = {shape.numel() for name in names for shape in stream.given[name] if len(shape) == 1}
        idle = any(not stream.given[name] for name in names)
        if len(rows) > 1 or (known and rows - known - (set() if idle else tokens)):
            found |= set(names)
    return found


def _unusable(name: str, calls: int, stream: Stream) -> str | None:
    if calls == 0:
        return "never ran in the trace"
    if calls > 1:
        return f"runs {calls} times in one forward pass"
    if stream.block_of(name) is None and not _runs_after_blocks(name, stream):
        return "feeds the first block"
    return None


def _runs_after_blocks(name: str, stream: Stream) -> bool:
    """Whether the layer stands behind the blocks in the module tree's order, as heads and poolers do."""
    order = [n for n, _ in stream.module.named_modules()]
    return order.index(name) > order.index(stream.block_names[-1])


def _group(parent: str, layers: list[str], stream: Stream, embeddings: bool) -> Group:
    leaves = [_short(name.rpartition(".")[2]) for name in layers]
    joint = "qkv" if leaves in (["q", "k", "v"], ["query", "key", "value"]) else "_".join(leaves)
    modules = [stream.layers[name] for name in layers]
    n, k = sum(output_width(m) for m in modules), input_width(modules[0])
    block = stream.block_of(layers[0])
    inside = parent[len(stream.block_names[block]) :].strip(".") if block is not None else parent
    # "dense" and the like say nothing alone, so such a role carries its parent's name.
    role = joint if joint in ROLES or not inside else f"{inside}.{joint}"
    return Group(
        name=f"{parent}.{joint}".strip("."),
        layers=tuple(layers),
        role=role,
        block=None if stream.whole else block,
        n=n,
        k=k,
        parameters=n * k,
        tables=_tables(layers, stream) if embeddings else (),
    )


def _embeddings(stream: Stream) -> list[Group]:
    """The large embeddings of tokens that no layer is tied to, those that share a weight as one group."""
    tied = {id(layer.weight) for layer in stream.layers.values()}
    total = sum(p.numel() for p in stream.module.parameters())
    shared: dict[int, list[str]] = {}
    for name in stream.token_tables:
        table = stream.tables[name]
        large = table.weight.numel() >= SMALLEST_EMBEDDING * total
        # One with max_norm rewrites its rows while it is read, which codes cannot be.
        if large and id(table.weight) not in tied and table.max_norm is None and _runs_before_blocks(name, stream):
            shared.setdefault(id(table.weight), []).append(name)
    return [_embedding(names, stream) for names in shared.values()]


def _embedding(names: list[str], stream: Stream) -> Group:
    n, k = stream.tables[names[0]].weight.shape
    return Group(
        name=names[0], layers=(names[0],), role="embedding", block=None, n=n, k=k, parameters=n * k, tables=tuple(names)
    )


def _runs_before_blocks(name: str, stream: Stream) -> bool:
    """Whether the embedding stands before the blocks in the module tree's order."""
    order = [n for n, _ in stream.module.named_modules()]
    return stream.whole or order.index(name) < order.index(stream.block_names[0])


def _tables(layers: list[str], stream: Stream) -> tuple[str, ...]:
    """The embeddings whose weight is that of a layer; they stand alone in a group, as heads do."""
    weights = {id(stream.layers[layer].weight) for layer in layers}
    return tuple(name for name, table in stream.tables.items() if id(table.weight) in weights)


def _short(leaf: str) -> str:
    stem = leaf.removesuffix("_proj")
    return stem if stem in ("q", "k", "v", "o", "gate", "up", "down") else leaf


def _unquantised(
    module: nn.Module,
    grouped: list[str],
    shared: set[str],
    refused: dict[str, str],
    stored: torch.dtype | None,
) -> tuple[Unquantised, ...]:
    taken = {id(module.get_submodule(name).weight): name for name in grouped}
    total = sum(_bytes(p, stored) for p in module.parameters())
    found: dict[str, tuple[str, int]] = {}
    for name, parameter in module.named_parameters():
        owner = name.rpartition(".")[0]
        if id(parameter) in taken and name.endswith("weight"):
            if isinstance(module.get_submodule(owner), nn.Embedding) and owner not in shared:
                reason = f"embedding; stays as it is whatever becomes of {taken[id(parameter)]}, which is tied to it"
                found[owner] = (reason, _bytes(parameter, stored))
            continue
        key, reason = _reason(module, name, owner, parameter, refused)
        found[key] = (reason, found.get(key, ("", 0))[1] + _bytes(parameter, stored))
    return tuple(
        Unquantised(name=name, reason=reason, bytes=size, share=size / total)
        for name, (reason, size) in sorted(found.items(), key=lambda item: -item[1][1])
    )


def _reason(
    module: nn.Module, name: str, owner: str, parameter: torch.Tensor, refused: dict[str, str]
) -> tuple[str, str]:
    if owner in refused:
        return owner, refused[owner]
    if isinstance(module.get_submodule(owner), nn.Embedding):
        return owner, "embedding"
    if parameter.ndim == 3:
        return name, "fused mixture-of-experts weights, not supported yet"
    if parameter.ndim <= 1:
        return "norms and biases", "vectors"
    return name, "not a linear layer"


def _bytes(parameter: torch.Tensor, stored: torch.dtype | None) -> int:
    return parameter.numel() * (parameter.dtype if stored is None else stored).itemsize
