"""Rounds groups: weight formats to solvers, results to disk, and dequantised weights back to the stream.

Two uses of one rounder:

- *While calibrating*: each group is rounded in every weight format that some scheme of it uses, so that the
  sensitivity is that of the errors that the solver really leaves. Results of solvers that need statistics are kept on
  disk, one file per (group, format); plain rounding is cheaper made again.
- *After allocation*, where the effort pays for it: one more pass in which each group is rounded in its scheme against
  the inputs that the rounded blocks before it produce (GPTQ's own procedure), kept as one file per group.

Layers are rounded by a pool of threads, each with one thread of its own for arithmetic, so the results depend neither
on the number of workers nor on their order.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lowprec.artifacts.folder import RunFolder
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.records import Group, Scheme
from lowprec.solvers import SOLVERS, LayerStatistics
from lowprec.steps.calibrate import Calibration, Progress, calibrate
from lowprec.steps.linear import weight_of
from lowprec.steps.outcome import Outcome
from lowprec.steps.scratch import Scratch
from lowprec.steps.stream import Overlay, Override, Stream


def solver_of(fmt: str) -> str:
    """Formats of 4 bits are worth an error-compensating solver; at 8 bits plain rounding is as good as lossless."""
    return "gptq" if WEIGHT_FORMATS[fmt].bits < 8 else "rtn"


class Rounder:
    """Rounds and remembers.

    Args:
        stream: the model.
        folder: where solved groups are kept; their files name `inputs`.
        inputs: digests of what the rounding depends on.
        workers: threads that round layers side by side.
    """

    def __init__(self, stream: Stream, folder: RunFolder, inputs: Mapping[str, str], workers: int = 2) -> None:
        self._stream, self._folder, self._inputs = stream, folder, dict(inputs)
        self._workers = workers
        self._group_of: dict[str, str] = {}

    def know(self, groups: Sequence[Group]) -> None:
        """Tells which group each layer is in."""
        self._group_of |= {layer: group.name for group in groups for layer in group.layers}

    def solve(
        self, group: Group, formats: Sequence[str], statistics: LayerStatistics
    ) -> dict[str, dict[str, QuantizedWeight]]:
        """Rounds every layer of `group` in every format: format -> layer -> codes and scales."""
        jobs = [(fmt, layer) for fmt in formats for layer in group.layers]
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                solved = list(pool.map(lambda job: self._solve(job[1], job[0], statistics), jobs))
        finally:
            torch.set_num_threads(threads)
        found: dict[str, dict[str, QuantizedWeight]] = {}
        for (fmt, layer), weight in zip(jobs, solved, strict=True):
            found.setdefault(fmt, {})[layer] = weight
        return found

    def solve_and_keep(self, group: Group, formats: Sequence[str], statistics: LayerStatistics) -> None:
        """Rounds the group in those formats whose solver needs statistics and that are not on disk yet."""
        wanted = [
            fmt
            for fmt in formats
            if SOLVERS[solver_of(fmt)].needs_statistics
            and self._folder.read_solved(f"{group.name}@{fmt}", self._inputs) is None
        ]
        for fmt, weights in self.solve(group, wanted, statistics).items():
            self._folder.write_solved(f"{group.name}@{fmt}", weights, self._inputs)

    def _solve(self, layer: str, fmt: str, statistics: LayerStatistics | None) -> QuantizedWeight:
        solver = SOLVERS[solver_of(fmt)]
        weight = weight_of(self._stream.layers[layer]).float()
        return solver.solve(weight, WEIGHT_FORMATS[fmt], statistics if solver.needs_statistics else None)

    def rounded(self, layer: str, fmt: str) -> QuantizedWeight:
        """The layer in `fmt` as calibration rounded it."""
        if not SOLVERS[solver_of(fmt)].needs_statistics:
            return self._solve(layer, fmt, None)
        key = f"{self._group_of[layer]}@{fmt}"
        solved = self._folder.read_solved(key, self._inputs)
        if solved is None:
            raise LookupError(f"{key} has not been solved; this is a bug")
        return solved[layer]

    def errors(self, layer: str, formats: Sequence[str]) -> Tensor:
        """[formats, N, K]: what rounding changed of the layer's weight."""
        weight = weight_of(self._stream.layers[layer]).float()
        return torch.stack([self.rounded(layer, fmt).dequantize() - weight for fmt in formats])

    def overlay(
        self, groups: Sequence[Group], schemes: Mapping[str, Scheme], calibration: Calibration
    ) -> dict[str, Override]:
        """What the model computes with when `schemes` (group -> scheme) hold, rounded as calibration did."""
        return {
            layer: override(schemes[group.name], calibration, group.name, self._weight(layer, schemes[group.name]))
            for group in groups
            if schemes[group.name].name != "bf16"
            for layer in group.layers
        }

    def _weight(self, layer: str, scheme: Scheme) -> Callable[[], Tensor] | None:
        fmt = scheme.weight
        return None if fmt is None else lambda: self.rounded(layer, fmt).dequantize()


def override(scheme: Scheme, calibration: Calibration, group: str, weight: Callable[[], Tensor] | None) -> Override:
    """The override of a layer of `group` in `scheme`, with the static activation scale where the scheme has one."""
    scale = calibration.scale_of(group, scheme.activation)
    return Override(weight=weight, activation=scheme.activation, activation_scale=scale)


def solve_plan(
    stream: Stream,
    groups: Sequence[Group],
    schemes: Mapping[str, Scheme],
    batches: Sequence[Any],
    outcome: Outcome,
    rounder: Rounder,
    folder: RunFolder,
    inputs: Mapping[str, str],
    calibration: Calibration,
    scratch: Scratch,
    progress: Progress = lambda done, total: None,
) -> dict[str, QuantizedWeight]:
    """Streams once more, rounding each group in its scheme against the inputs that the rounded model produces."""
    solved: dict[str, QuantizedWeight] = {}
    overlay: dict[str, Override] = {}

    def on_group(group: Group, statistics: LayerStatistics) -> None:
        scheme = schemes[group.name]
        if scheme.weight is None:
            return
        kept = folder.read_solved(group.name, inputs)
        if kept is None:
            kept = rounder.solve(group, [scheme.weight], statistics)[scheme.weight]
            folder.write_solved(group.name, kept, inputs)
        solved.update(kept)
        overlay.update(overlay_of([group], schemes, kept, calibration))

    # A pass that was cut starts again from its hidden states; what lies before them is read back from the folder.
    for group in groups:
        kept = folder.read_solved(group.name, inputs)
        if kept is not None and schemes[group.name].weight is not None:
            solved.update(kept)
            overlay.update(overlay_of([group], schemes, kept, calibration))
    calibrate(stream, groups, batches, outcome, on_group, scratch, progress=progress, overlay=overlay)
    return solved


def overlay_of(
    groups: Sequence[Group],
    schemes: Mapping[str, Scheme],
    solved: Mapping[str, QuantizedWeight],
    calibration: Calibration,
) -> Overlay:
    """What the model computes with when its layers hold `solved`."""
    return {
        layer: override(schemes[group.name], calibration, group.name, solved[layer].dequantize)
        for group in groups
        if schemes[group.name].weight is not None
        for layer in group.layers
    }
