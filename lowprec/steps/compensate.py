"""Rounds a mix for good: group after group, each making up for what the groups before it have done to its input.

Two copies of the hidden states go through the model side by side, the reference's and the rounded model's. In each
block the reference runs once, and the inputs of all groups are kept; then, group by group in the order in which they
run, the rounded block runs up to that group, whose Hessian and drift (`lowprec.solvers.asymmetric`) come from the input
that it will really have, rounded activations included. A layer that stays bfloat16 stays as it is, and an embedding,
with the head that shares its weight, is as calibration rounded it, before all else.

With `learning`, the codes and scales of a block are learned (`lowprec.steps.learn`) once its groups are rounded.

Left out: choosing for each group what is taken into account, by the error of its outputs on text that nothing is fitted
to. Tried in a prototype on SmolLM2-135M (INT4 g64, 16 windows of 512 tokens to fit, 8 held back, the 16 groups of the
first four blocks): both sides' Hessians with the drift erred least in all sixteen, so choosing doubles the work and
changes nothing. Without what is known of outputs the error was 1.1 to 2.5 times as large, without the drift 1.0 to 3.2.

All of it is statistics, so it is computed in bfloat16 where the processor multiplies that fast; what comes of it is
measured in float32 like everything else. A killed pass resumes at the block that was cut, and reads solved groups back.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.artifacts.folder import RunFolder
from lowprec.errors import ModelError
from lowprec.formats import QuantizedWeight
from lowprec.records import Group, Scheme
from lowprec.solvers import LayerStatistics
from lowprec.steps.calibrate import Calibration, Gather, Progress, StopForward
from lowprec.steps.importance import Importance
from lowprec.steps.learn import Learning, Passage
from lowprec.steps.memory import trim
from lowprec.steps.outcome import Outcome
from lowprec.steps.scratch import Scratch
from lowprec.steps.solve import Rounder, overlay_of, overrides
from lowprec.steps.stream import NOTHING, Call, Overlay, Override, Stream, fast_dtype, products_of

Kept = dict[str, dict[int, Tensor]]
"""Group -> number of the batch -> the group's input there."""


class _Paired(Gather):
    """Sums the Hessian of one group's input and the drift from the reference's input."""

    def __init__(
        self,
        stream: Stream,
        group: Group,
        batches: int,
        reference: Mapping[int, Tensor],
        importance: Importance,
    ) -> None:
        super().__init__(stream, [group], batches)
        self._reference, self.importance = reference, importance
        self._drift: Tensor | None = None

    def add(self, group: Group, x: Tensor) -> None:
        """Adds the real rows of x [B, T, K] or [B, K], and of what the reference had in their place."""
        super().add(group, x)
        mine, theirs = self.rows(x), self.rows(self._reference[self.position])
        if len(mine) != len(theirs):
            raise ModelError(
                f"{group.name} is given {len(mine)} rows where the layers before it are rounded, else {len(theirs)}: a "
                "router decides which; give --effort fast, which rounds each layer by itself"
            )
        if self._drift is None:
            self._drift = torch.zeros(mine.shape[1], mine.shape[1], device=mine.device)
        with products_of(x.dtype):
            self._drift.addmm_((theirs - mine).T, self.weighted(group, mine))

    def paired(self) -> LayerStatistics:
        """The statistics, with the drift."""
        found = self.statistics(self.groups[0])
        assert self._drift is not None
        return replace(found, drift=self._drift.div_(found.tokens).cpu())


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensation:
    """A pass over one mix; `run` makes it.

    Attributes:
        schemes: group -> scheme.
        batches: calibration text.
        importance: what its tokens weigh, group by group.
        outputs: what is known of a group's outputs (`LayerStatistics.outputs`).
        learning: how blocks are learned once they are rounded, None for not at all.
        folder, inputs: where solved groups are kept, and digests that name this very rounding.
        name: what the files of solved groups are called behind the group's name.
    """

    stream: Stream
    groups: Sequence[Group]
    schemes: Mapping[str, Scheme]
    batches: Sequence[Any]
    outcome: Outcome
    rounder: Rounder
    calibration: Calibration
    folder: RunFolder
    inputs: Mapping[str, str]
    name: str
    importance: Importance = field(default_factory=dict)
    outputs: Callable[[Group], Sequence[Tensor]] = lambda group: ()
    learning: Learning | None = None

    def run(self, scratch: Scratch, progress: Progress = lambda done, total: None) -> dict[str, QuantizedWeight]:
        """Codes and scales of every quantised layer.

        Raises:
            ModelError: NaN or infinite activations; names the group.
        """
        solved = self._kept()
        if self._whole(solved):
            return solved
        with torch.no_grad(), self.stream.computing(fast_dtype(self.stream)):
            self._through(solved, scratch, progress)
        return solved

    def known(self) -> dict[str, QuantizedWeight] | None:
        """What an earlier pass has found, None where it did not come to its end."""
        solved = self._kept()
        return solved if self._whole(solved) else None

    def _whole(self, solved: Mapping[str, QuantizedWeight]) -> bool:
        return all(layer in solved for group in self._quantised for layer in group.layers)

    @property
    def _quantised(self) -> list[Group]:
        return [g for g in self.groups if self.schemes[g.name].weight is not None]

    def _kept(self) -> dict[str, QuantizedWeight]:
        """What an earlier, perhaps cut, pass has solved, and the heads that share their weight with a table."""
        solved: dict[str, QuantizedWeight] = {}
        for group in self._quantised:
            if group.tables:
                # The table is read first: what its head would make up for must not move it.
                key = self.rounder.key_of(group.name, self.schemes[group.name])
                solved |= {layer: self.rounder.rounded(layer, key) for layer in group.layers}
                continue
            solved |= self.folder.read_solved(f"{group.name}@{self.name}", self.inputs) or {}
        return solved if self.learning is None else self._of_whole_blocks(solved)

    def _of_whole_blocks(self, solved: dict[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
        """Without blocks that were cut while they were written: a block is learned as a whole."""
        own = [g for g in self._quantised if not g.tables]
        cut = {g.block for g in own if any(layer not in solved for layer in g.layers)}
        again = {layer for g in own if g.block in cut for layer in g.layers}
        return {layer: weight for layer, weight in solved.items() if layer not in again}

    def _through(self, solved: dict[str, QuantizedWeight], scratch: Scratch, progress: Progress) -> None:
        stream = self.stream
        having = [g for g in self._quantised if all(layer in solved for layer in g.layers)]
        overlay = dict(overlay_of(having, self.schemes, solved, self.calibration))
        start = scratch.note("block") or 0
        sides = {}
        for side, own in (("reference", NOTHING), ("rounded", overlay)):
            with stream.outer(own):
                entered = [stream.enter(batch) for batch in self.batches]
            calls = [call for _, call in entered]
            sides[side] = (scratch.load(f"{side}-{start}") if start else None) or [h for h, _ in entered]
        reference, rounded = sides["reference"], sides["rounded"]
        del entered, sides
        for index in range(start, stream.depth):
            inside = [g for g in self._quantised if (g.block == index or stream.whole) and not g.tables]
            after, kept = self._reference(_block(stream, index, reference, calls), inside)
            latents = self._solve(inside, kept, _block(stream, index, rounded, calls), solved, overlay)
            if self.learning is not None and latents and not stream.whole:
                passage = Passage(
                    inputs=rounded,
                    outputs=after,
                    calls=[call[index] for call in calls],
                    positions=[self.outcome.positions(batch) for batch in self.batches],
                )
                self._learn(self.learning, index, inside, latents, passage, solved, overlay)
            self._keep(inside, solved)
            with stream.block(index, overlay):
                rounded = [stream.run(index, h, call[index]) for h, call in zip(rounded, calls, strict=True)]
            reference = after
            if not stream.whole:
                _checkpoint(scratch, index + 1, reference, rounded)
            trim()
            progress(index + 1, stream.depth + 1)
        outside = [g for g in self._quantised if g.block is None and not stream.whole and not g.tables]
        if outside:
            _, kept = self._reference(_behind(stream, reference, self.batches), outside, stop=True)
            self._solve(outside, kept, _behind(stream, rounded, self.batches), solved, overlay)
            self._keep(outside, solved)
        progress(stream.depth + 1, stream.depth + 1)

    def _reference(self, place: "_Place", groups: Sequence[Group], stop: bool = False) -> tuple[list[Any], Kept]:
        """What the reference makes of each batch there, and the inputs of `groups` in the order in which they run.

        With `stop` nothing is computed beyond the last of those inputs, and what comes back is empty.
        """
        after: list[Any] = []
        kept: Kept = {}
        position = 0

        def keep(group: Group) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                kept.setdefault(group.name, {})[position] = args[0]
                if stop and all(position in kept.get(g.name, {}) for g in groups):
                    raise StopForward

            return hook

        handles = [self.stream.layers[g.layers[0]].register_forward_pre_hook(keep(g)) for g in groups]
        try:
            with place.opened({}):
                for position in range(len(self.batches)):
                    with contextlib.suppress(StopForward):
                        after.append(place.step(position))
        finally:
            for handle in handles:
                handle.remove()
        return after, kept

    def _solve(
        self,
        groups: Sequence[Group],
        kept: Kept,
        place: "_Place",
        solved: dict[str, QuantizedWeight],
        overlay: dict[str, Override],
    ) -> dict[str, Tensor]:
        """Rounds the groups of one place, as far as they are not, in the order in which they run.

        Returns what codes were rounded from, where that is wanted for learning.
        """
        latents: dict[str, Tensor] = {}
        by_name = {group.name: group for group in groups}
        names = [*kept, *(by_name.keys() - kept.keys())]
        for _, alike in itertools.groupby(names, lambda name: self.stream.calls[by_name[name].layers[0]]):
            together = [by_name[name] for name in alike]
            references = {g.name: kept.pop(g.name, {}) for g in together}
            wanted = [g for g in together if any(layer not in solved for layer in g.layers)]
            gathered = self._gathered(wanted, references, place, overlay)
            for group, statistics in zip(wanted, gathered, strict=True):
                statistics = replace(statistics, outputs=tuple(self.outputs(group)))
                key = self.rounder.key_of(group.name, self.schemes[group.name])
                found = self.rounder.solve([(group, key, statistics)])[0]
                if self.learning is not None:
                    latents |= self.rounder.latents(group, key, statistics, found)
                solved |= found
            overlay |= overlay_of(together, self.schemes, solved, self.calibration)
        return latents

    def _learn(
        self,
        learning: Learning,
        index: int,
        groups: Sequence[Group],
        latents: Mapping[str, Tensor],
        passage: Passage,
        solved: dict[str, QuantizedWeight],
        overlay: dict[str, Override],
    ) -> None:
        """Learns the block, and computes with what was learned from then on."""

        def made(learned: Mapping[str, Callable[[], Tensor]]) -> Overlay:
            found = dict(overlay)
            for group in groups:
                makers = {layer: learned.get(layer, solved[layer].dequantize) for layer in group.layers}
                found |= overrides(group, self.schemes[group.name], self.calibration, makers)
            return found

        solved |= learning.run(self.stream, index, solved, latents, made, passage)
        overlay |= overlay_of(groups, self.schemes, solved, self.calibration)

    def _keep(self, groups: Sequence[Group], solved: Mapping[str, QuantizedWeight]) -> None:
        for group in groups:
            found = {layer: solved[layer] for layer in group.layers}
            self.folder.write_solved(f"{group.name}@{self.name}", found, self.inputs)

    def _gathered(
        self,
        groups: Sequence[Group],
        references: Kept,
        place: "_Place",
        overlay: Mapping[str, Override],
    ) -> list[LayerStatistics]:
        """Runs the rounded model up to the input of groups that read one tensor."""
        if not groups:
            return []
        # The layers are not rounded yet, but what they are given already is.
        given: dict[str, Override] = {}
        for group in groups:
            given |= overrides(group, self.schemes[group.name], self.calibration, dict.fromkeys(group.layers))
        gathers = [
            _Paired(self.stream, group, len(self.batches), references[group.name], self.importance) for group in groups
        ]
        with place.opened({**overlay, **given}), contextlib.ExitStack() as hooks:
            for gather in gathers:
                hooks.enter_context(gather.hooks(stop_after=gather is gathers[-1]))
            for position, batch in enumerate(self.batches):
                for gather in gathers:
                    gather.position, gather.where = position, self.outcome.positions(batch)
                with contextlib.suppress(StopForward):
                    place.step(position)
        return [gather.paired() for gather in gathers]


@dataclass(frozen=True, slots=True)
class _Place:
    """A part of the model: how it is opened under an overlay, and how it runs over a batch."""

    opened: Callable[[Overlay], AbstractContextManager[object]]
    step: Callable[[int], Any]


def _block(stream: Stream, index: int, hidden: Sequence[Any], calls: Sequence[Sequence[Call]]) -> _Place:
    return _Place(
        opened=lambda overlay: stream.block(index, overlay),
        step=lambda position: stream.run(index, hidden[position], calls[position][index]),
    )


def _behind(stream: Stream, hidden: Sequence[Any], batches: Sequence[Any]) -> _Place:
    return _Place(opened=stream.outer, step=lambda position: stream.leave(hidden[position], batches[position]))


def _checkpoint(scratch: Scratch, index: int, reference: Sequence[Tensor], rounded: Sequence[Tensor]) -> None:
    """Files of their own, then the note that makes them count: a kill in between leaves the old state."""
    scratch.save(f"reference-{index}", reference)
    scratch.save(f"rounded-{index}", rounded)
    scratch.set_note("block", index)
    for side in ("reference", "rounded"):
        scratch.forget(f"{side}-{index - 1}")
