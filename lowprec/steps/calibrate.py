"""Calibration, forwards: one streaming pass that gathers what rounding needs, block by block.

For every group the pass sums the Hessian X^T X of its input over all calibration tokens, notes the input's absolute
maximum, hands both to `on_groups` (which rounds the layers), and drops the Hessian: no more than one block's
are held. The last `probing` batches add nothing to the statistics; the inputs of each block are kept on disk for them,
and the backward pass of `lowprec.steps.sensitivity` starts from those. An error that was compensated on some text looks
smaller on that text than it is.

A killed pass resumes at the block that was cut, from the hidden states on disk, with the same results.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.errors import ModelError
from lowprec.formats.base import as_bfloat16
from lowprec.formats.fp8 import LARGEST
from lowprec.formats.int8 import QMAX
from lowprec.records import Group, Scheme
from lowprec.solvers import LayerStatistics
from lowprec.steps.importance import Importance
from lowprec.steps.memory import trim
from lowprec.steps.outcome import Outcome
from lowprec.steps.scratch import Scratch
from lowprec.steps.stream import Call, Stream, products_of
from lowprec.transforms import Smoothed, smoothed_of

STATIC_MAXIMUM = {"int8-static": float(QMAX), "fp8-static": LARGEST}

OnGroups = Callable[[Sequence[tuple[Group, LayerStatistics]]], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Absolute maximum of every group's input, for static activation scales, and over how many batches.

    `smoothed` are the scales that the input is divided by before it is rounded (`lowprec.steps.transform`).
    """

    amax: tuple[tuple[str, float], ...]
    batches: int
    smoothed: tuple[Smoothed, ...] = ()

    def exponents_of(self, group: str, scheme: Scheme) -> Tensor | None:
        """[K] int8, what the group's input is divided by in `scheme`, as powers of two; None for nothing."""
        found = smoothed_of(self.smoothed, group, scheme)
        return None if found is None else found.spread

    def scale_of(self, group: str, activation: str | None) -> Tensor | None:
        """Static scale of the group's input, a bfloat16 value as checkpoints store it; None for dynamic formats."""
        if activation not in STATIC_MAXIMUM:
            return None
        return as_bfloat16(torch.tensor(dict(self.amax)[group] / STATIC_MAXIMUM[activation]))


class StopForward(Exception):
    """Ends the pass behind the last layer that is gathered."""


class Gather:
    """Hooks that sum the Hessians of `groups` while a block runs, over the first `batches` batches.

    Tokens weigh as `importance` says, 1 where it says nothing; groups that read one tensor have one sum then.
    """

    def __init__(self, stream: Stream, groups: Sequence[Group], batches: int) -> None:
        self._stream = stream
        self.groups = groups
        self.batches = batches
        self.position = 0
        self.where: Tensor | None = None
        self.importance: Importance = {}
        self.hessian: dict[str, Tensor] = {}
        self.amax = dict.fromkeys((g.name for g in groups), 0.0)
        self.tokens = dict.fromkeys((g.name for g in groups), 0)

    @contextlib.contextmanager
    def hooks(self, stop_after: bool = False) -> Iterator[None]:
        """Gathers while open; with `stop_after` the pass ends at the last group's input."""
        handles = []
        for group in self.groups:
            # Layers of one group read the same tensor, so the first one's input is everyone's.
            layer = self._stream.layers[group.layers[0]]
            last = stop_after and group is self.groups[-1]
            handles.append(layer.register_forward_pre_hook(self._hook(group, last)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, group: Group, last: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if self.position < self.batches:
                self.add(group, args[0])
            if last:
                raise StopForward

        return hook

    def add(self, group: Group, x: Tensor) -> None:
        """Adds the rows of x [B, T, K] or [B, K] that are real."""
        dtype, x = x.dtype, self.rows(x)
        largest = x.abs().max().item() if x.numel() else 0.0
        # A comparison with NaN is false, so this catches it, too.
        if not largest < float("inf"):
            raise ModelError(f"the input of {group.name} holds NaN or infinite values")
        self.amax[group.name] = max(self.amax[group.name], largest)
        self.tokens[group.name] += x.shape[0]
        if (owner := self._summed_by(group)) != group.name:
            return
        if owner not in self.hessian:
            self.hessian[owner] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        with products_of(dtype):
            self.hessian[owner].addmm_(self.weighted(group, x).T, x)

    def _summed_by(self, group: Group) -> str:
        """The group whose sum is this group's: its own, or that of the first one to read the same tensor."""
        if group.name in self.importance:
            return group.name
        reads = self._stream.calls[group.layers[0]]
        return next(g.name for g in self.groups if self._stream.calls[g.layers[0]] == reads)

    def weighted(self, group: Group, rows: Tensor) -> Tensor:
        """[rows, K], each row times what its token weighs."""
        parts = self.importance.get(group.name)
        return rows if parts is None else rows * self.rows(parts[self.position][..., None]).to(rows.device)

    def rows(self, x: Tensor) -> Tensor:
        """x [B, T, K] or [B, K] -> [rows, K] float32, those that are real."""
        if self.where is not None and x.shape[:-1] == self.where.shape:
            x = x[self.where.to(x.device)]
        return x.reshape(-1, x.shape[-1]).float()

    def statistics(self, group: Group) -> LayerStatistics:
        """The group's Hessian.

        Raises:
            ModelError: the group never ran.
        """
        tokens = self.tokens[group.name]
        if not tokens:
            raise ModelError(f"{group.name} received no input from the calibration data")
        return LayerStatistics(hessian=self.hessian[self._summed_by(group)].div(tokens).cpu(), tokens=tokens)


def calibrate(
    stream: Stream,
    groups: Sequence[Group],
    batches: Sequence[Any],
    outcome: Outcome,
    on_groups: OnGroups,
    scratch: Scratch,
    probing: int = 0,
    progress: Progress = lambda done, total: None,
    describe: Callable[[Any], str] = lambda batch: "",
) -> Calibration:
    """Runs the pass.

    Args:
        on_groups: called once for each block, in order, with its groups and their statistics; may add to `overlay`.
        probing: how many of the last batches are kept for the sensitivity instead.
        describe: names the text of a batch in an error.

    Raises:
        ModelError: NaN or infinite activations; names the layer and the text.
    """
    multiplied = [g for g in groups if not g.is_embedding]
    with torch.no_grad():
        with stream.outer():
            entered = [stream.enter(batch) for batch in batches]
        calls = [call for _, call in entered]
        start, amax = scratch.note("forward") or (0, {})
        hidden = (scratch.load(f"hidden-{start}") if start else None) or [h for h, _ in entered]
        del entered
        for index in range(start, stream.depth):
            inside = [g for g in multiplied if g.block == index or stream.whole]
            if probing and not stream.whole:
                scratch.save(f"input-{index}", hidden[-probing:])
            gather = Gather(stream, inside, len(batches) - probing)
            hidden = _through(stream, index, hidden, calls, batches, outcome, gather, describe)
            on_groups([(group, gather.statistics(group)) for group in inside])
            amax |= gather.amax
            if not stream.whole:
                # A file of its own, then the note that makes it count: a kill in between leaves the old state.
                scratch.save(f"hidden-{index + 1}", hidden)
                scratch.set_note("forward", (index + 1, amax))
                scratch.forget(f"hidden-{index}")
            trim()
            progress(index + 1, stream.depth + 1)
        outside = [g for g in multiplied if g.block is None and not stream.whole]
        if outside:
            gather = Gather(stream, outside, len(batches) - probing)
            _outside(stream, hidden, batches, outcome, gather, describe)
            amax |= gather.amax
            on_groups([(group, gather.statistics(group)) for group in outside])
        if probing and not stream.whole:
            scratch.save(f"input-{stream.depth}", hidden[-probing:])
        progress(stream.depth + 1, stream.depth + 1)
    return Calibration(amax=tuple(sorted(amax.items())), batches=len(batches) - probing)


def _through(
    stream: Stream,
    index: int,
    hidden: Sequence[Any],
    calls: Sequence[Sequence[Call]],
    batches: Sequence[Any],
    outcome: Outcome,
    gather: Gather,
    describe: Callable[[Any], str],
) -> list[Any]:
    after = []
    with stream.block(index), gather.hooks():
        for position, (given, call, batch) in enumerate(zip(hidden, calls, batches, strict=True)):
            gather.position, gather.where = position, outcome.positions(batch)
            try:
                out = stream.run(index, given, call[index])
                if not torch.isfinite(out).all():
                    raise ModelError(f"the output of {stream.block_names[index]} holds NaN or infinite values")
            except ModelError as error:
                raise ModelError(f"{error}{_on(describe(batch))}") from None
            after.append(out)
    return after


def _on(text: str) -> str:
    return f", on the text {text}" if text else ""


def _outside(
    stream: Stream,
    hidden: Sequence[Any],
    batches: Sequence[Any],
    outcome: Outcome,
    gather: Gather,
    describe: Callable[[Any], str],
) -> None:
    with stream.outer(), gather.hooks(stop_after=True):
        for given, batch in zip(hidden[: gather.batches], batches, strict=False):
            gather.where = outcome.positions(batch)
            try:
                with contextlib.suppress(StopForward):
                    stream.leave(given, batch)
            except ModelError as error:
                raise ModelError(f"{error}{_on(describe(batch))}") from None
