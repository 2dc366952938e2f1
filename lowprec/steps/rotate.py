"""Turns a model: finds where its hidden states are read and written, and where heads are, and gives them other bases.

No architecture is known by name: one forward pass shows which norms the layers read and which layers write. Whether the
model has such a basis at all is tried, in float64, one block at a time: models with a norm that takes means
(LayerNorm), with a norm on what is added (Gemma), or with positions that are learned have none. Where values go to an
output projection is tried in each block alone (`lowprec.steps.places`).
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.artifacts.own_form import is_whole
from lowprec.artifacts.source import weights_digest
from lowprec.errors import UnsupportedError
from lowprec.records import digest
from lowprec.steps.linear import output_width
from lowprec.steps.load import Model, Original
from lowprec.steps.memory import trim
from lowprec.steps.places import Places, heads_of
from lowprec.steps.stream import Stream
from lowprec.steps.tokens import Batch
from lowprec.transforms import Merge
from lowprec.transforms.rotation import HiddenBasis, Turning, gain_of, orthogonal, rotate_heads

REFUSED = "the hidden states of this model cannot be turned"
REMEDY = "leave --rotate out"
EXACT = 1e-9
"""Largest change of an output in float64, relative to the largest output."""
EXAMPLE = Batch(ids=torch.tensor([[1, 2, 3, 4]]), lengths=torch.tensor([4]), index=(0,))


def turned(model: Model, seed: int = 0) -> Model:
    """The same function with hidden states and heads in random bases, a copy in float32.

    Rounding it to the dtype that the model is stored in would lose something already. That loss is the artefact's, so
    the copy stays what everything is compared with.

    Raises:
        UnsupportedError: a model that cannot be turned.
    """
    if not is_whole(model.module):
        raise UnsupportedError(REFUSED, ("its artefact would hold the rounded layers alone", REMEDY))
    try:
        turning = turning_of(Stream(model.module, model.forward, EXAMPLE), EXAMPLE)
    except UnsupportedError as error:
        raise UnsupportedError(REFUSED, (*error.reasons, REMEDY)) from error
    module: Any = copy.deepcopy(model.module).float()
    turning.apply(module, seed)
    module.config.tie_word_embeddings = False
    trim()
    return dataclasses.replace(
        model,
        module=module,
        config=module.config,
        revision=digest(model.revision, weights_digest(module)),
        original=model.original or Original(dtype=model.dtype, bytes=model.bytes, heads=len(turning.heads)),
    )


@torch.no_grad()
def turning_of(stream: Stream, example: Any) -> Turning:
    """Everything in the model that may have another basis.

    Raises:
        UnsupportedError: the hidden states of this model cannot be turned.
    """
    basis = hidden_basis(stream, example)
    turning = Turning(basis=basis, heads=_heads(stream, example))
    # Another block might read what a head gives.
    exact = _change(stream, example, turning) <= EXACT
    return turning if exact else Turning(basis=basis)


def hidden_basis(stream: Stream, example: Any) -> HiddenBasis:
    """What has to change so that the hidden states may have another basis.

    Raises:
        UnsupportedError: the hidden states of this model cannot be turned.
    """
    if not stream.token_tables or stream.whole:
        raise UnsupportedError(REFUSED, ("no embedding that tokens read, or no blocks",))
    embeddings = stream.token_tables
    width = int(stream.tables[embeddings[0]].weight.shape[1])
    if not (norms := _norms(stream, example, width)):
        raise UnsupportedError(REFUSED, ("its layers read no norm that has a weight and nothing else",))
    if apart := [n for n, readers in norms.items() if {stream.block_of(r) for r in readers} != {stream.block_of(n)}]:
        raise UnsupportedError(REFUSED, (f"{apart[0]} is read in another block than its own",))
    reading = {name for readers in norms.values() for name in readers}
    if strange := _unowned(stream, (*embeddings, *norms, *stream.layers)):
        raise UnsupportedError(REFUSED, (f"the weight of {strange} is no parameter of it",))
    inside = (name for name in stream.layers if stream.block_of(name) is not None)
    writers = tuple(n for n in inside if n not in reading and output_width(stream.layers[n]) == width)
    basis = HiddenBasis(width=width, embeddings=embeddings, norms=tuple(norms.items()), writers=writers)
    change = _change(stream, example, Turning(basis=basis))
    if not change <= EXACT:
        raise UnsupportedError(REFUSED, (f"turned in float64, its outputs change by {change:.1e} of the largest",))
    return basis


def _unowned(stream: Stream, names: Iterable[str]) -> str | None:
    """The first of these modules whose weight or bias is a buffer or computed, and cannot be replaced by another."""
    for name in names:
        module = stream.module.get_submodule(name)
        tensors = [n for n in ("weight", "bias") if isinstance(getattr(module, n, None), Tensor)]
        if not all(n in module._parameters for n in tensors):
            return name
    return None


def _norms(stream: Stream, example: Any, width: int) -> dict[str, tuple[str, ...]]:
    """Norm -> the layers that are given its output."""
    made: dict[int, str] = {}
    readers: dict[str, list[str]] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def made_by(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            kept.append(output)
            made[output.data_ptr()] = name

        return hook

    def read_by(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if (norm := made.get(args[0].data_ptr())) is not None:
                readers.setdefault(norm, []).append(name)

        return hook

    handles: list[Any] = []
    for name, module in stream.module.named_modules():
        if name in stream.layers:
            handles.append(module.register_forward_pre_hook(read_by(name)))
        elif [p.shape for p in module.parameters(recurse=False)] == [(width,)]:
            handles.append(module.register_forward_hook(made_by(name)))
    try:
        with torch.no_grad():
            stream.forward(stream.module, example)
    finally:
        for handle in handles:
            handle.remove()
    return {norm: tuple(names) for norm, names in readers.items()}


class _Norm64(nn.Module):
    """A root-mean-square norm that computes in the dtype of its input; models' own compute in float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        eps = [v for name, v in vars(norm).items() if "eps" in name and isinstance(v, float)]
        self.eps = eps[0] if eps else 0.0
        self.weight = nn.Parameter(gain_of(norm), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def exact_norms_(module: nn.Module, basis: HiddenBasis) -> list[tuple[nn.Module, str, nn.Module]]:
    """Puts norms that compute in float64 into their places in a model in float64; returns (parent, name, norm) of each.

    Raises:
        UnsupportedError: a norm is none of the root of the mean square.
    """
    replaced = []
    for name, _ in basis.norms:
        norm = module.get_submodule(name)
        exact = _Norm64(norm)
        x = torch.linspace(-1, 2, basis.width, dtype=torch.float64)
        if not torch.allclose(norm(x).double(), exact(x), rtol=1e-4, atol=1e-5):
            raise UnsupportedError(REFUSED, (f"{name} is no norm of the root of the mean square",))
        parent, _, child = name.rpartition(".")
        replaced.append((module.get_submodule(parent), child, norm, exact))
    # All or none: a norm that is refused leaves the model as it was.
    for owner, child, _, exact in replaced:
        setattr(owner, child, exact)
    return [(owner, child, norm) for owner, child, norm, _ in replaced]


def _change(stream: Stream, example: Any, turning: Turning) -> float:
    """Largest change of an output in float64, relative to the largest output; one block at a time is in memory.

    Raises:
        UnsupportedError: a norm is none of the root of the mean square.
    """
    parts = [turning.within(functools.partial(_lies_in, stream, index)) for index in (None, *range(stream.depth))]
    outside, blocks = parts[0], parts[1:]
    with torch.no_grad(), stream.computing(torch.float64):
        with stream.outer(), _exact(stream, outside):
            before, calls = stream.enter(example)
            outside.apply(stream.module)
            after, turned_calls = stream.enter(example)
        for index, here in enumerate(blocks):
            with stream.block(index), _exact(stream, here):
                before = stream.run(index, before, calls[index])
                here.apply(stream.module)
                after = stream.run(index, after, turned_calls[index])
        with stream.outer(), _exact(stream, outside):
            expected = stream.leave(before, example)
            outside.apply(stream.module)
            return _relative(stream.leave(after, example), expected)


def _lies_in(stream: Stream, index: int | None, name: str) -> bool:
    return stream.block_of(name) == index


@contextlib.contextmanager
def _exact(stream: Stream, part: Turning) -> Iterator[None]:
    """A part of the model that is materialised in float64 with norms in float64, too, as they were afterwards."""
    replaced = exact_norms_(stream.module, part.basis)
    try:
        yield
    finally:
        for parent, child, norm in replaced:
            setattr(parent, child, norm)


def _relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def _heads(stream: Stream, example: Any) -> tuple[Merge, ...]:
    """Where values go to an output projection, block by block, each in float64."""
    found: list[Merge] = []
    patterns: list[Merge] = []
    with stream.computing(torch.float64):
        with stream.outer():
            hidden, calls = stream.enter(example)
        for index in range(stream.depth):
            with stream.block(index):
                run = functools.partial(stream.run, index, hidden, calls[index])
                places = _Turned(stream, index, run)
                here = places.found(patterns)
                patterns = [places.relative(place) for place in here]
                hidden = run()
            found += here
    return tuple(found)


class _Turned(Places):
    """Where the heads of a block can be turned."""

    def narrowed(self, place: Merge) -> Iterator[Merge]:
        """Only what a linear layer gives has heads; scales are told their width only where they are repeated."""
        if place.source in self._stream.layers:
            widths = [place.head] if place.head else heads_of(place.channels)
            yield from (dataclasses.replace(place, head=width) for width in widths)

    def holds(self, place: Merge, expected: Tensor) -> bool:
        """Whether a rotation cancels."""
        module = self._stream.module
        tables = [module.get_submodule(name)._parameters for name in (place.source, *place.consumers)]
        kept = [dict(table) for table in tables]
        rotate_heads(module, place, orthogonal(place.head))
        try:
            return _relative(self._run(), expected) <= EXACT
        finally:
            for table, before in zip(tables, kept, strict=True):
                table.update(before)
