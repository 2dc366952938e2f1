"""Rounds groups: weight formats to solvers, results to disk, and dequantised weights back to the stream.

While calibrating, each group is rounded in every weight format that some scheme of it uses, so that the sensitivity is
that of the errors that the solver really leaves. Results of solvers that need statistics are kept on disk, one file per
(group, format); plain rounding is cheaper made again. `lowprec.steps.compensate` rounds whole mixes with the same
rounder.

A table in rows of two widths (`lowprec.formats.rows`) is put together from the roundings in both. An embedding that
shares the weight of a head computes with the head's codes.

Layers are rounded by a pool of threads, each with one thread of its own for arithmetic, so the results depend neither
on the number of workers nor on their order.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from lowprec.artifacts.folder import RunFolder
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.rows import FINE, MixedRows
from lowprec.records import Group, Scheme
from lowprec.solvers import SOLVERS, LayerStatistics, Solver
from lowprec.solvers.asymmetric import retargeted
from lowprec.solvers.gptq import DAMPING, Gptq
from lowprec.solvers.latent import latent_codes
from lowprec.solvers.two_sided import TwoSided
from lowprec.steps.calibrate import Calibration
from lowprec.steps.effects import LayerErrors
from lowprec.steps.linear import output_width, weight_of
from lowprec.steps.stream import Overlay, Override, Stream
from lowprec.transforms import Smoothed, keys_of
from lowprec.transforms.merge import MARK

Wanted = tuple[Group, str, LayerStatistics | None]
"""(group, weight format, statistics) to round."""

ROWS_OF_A_JOB = 2048


class Rounder:
    """Rounds and remembers.

    Args:
        stream: the model.
        groups: its groups.
        folder: where solved groups are kept; their files name `inputs`.
        inputs: digests of what the rounding depends on.
        solver: name of the solver for formats of fewer than 8 bits.
        workers: threads that round side by side.
        frequency: group -> makes the importance [N] of its rows, for groups with tables.
        smoothed: the scales that go into weights before they are rounded, where inputs are rounded, too.
    """

    def __init__(
        self,
        stream: Stream,
        groups: Sequence[Group],
        folder: RunFolder,
        inputs: Mapping[str, str],
        solver: str = "gptq",
        workers: int = 2,
        frequency: Mapping[str, Callable[[], Tensor]] | None = None,
        smoothed: Sequence[Smoothed] = (),
    ) -> None:
        self._smoothed = smoothed
        self._exponents = {(s.group, f"{s.weight}{MARK}"): s.spread for s in smoothed}
        self._frequency = frequency or {}
        self._stream, self._groups, self._folder, self._inputs = stream, groups, folder, dict(inputs)
        self._solver, self._workers = solver, workers
        self._group_of = {layer: group for group in groups for layer in group.layers}

    def key_of(self, group: str, scheme: Scheme) -> str:
        """What the group's weights are rounded to in a quantising `scheme`: the format, marked where smoothed."""
        return str(keys_of(self._smoothed, group, scheme)[0])

    def solver_of(self, group: Group, fmt: str) -> str:
        """Formats of few bits are worth an error-compensating solver; at 8 bits plain rounding is nearly lossless.

        The rows of an embedding are read one at a time, so there are no inputs whose errors could make up for others.
        """
        return "rtn" if group.is_embedding or WEIGHT_FORMATS[_bare(fmt)].bits >= 8 else self._solver

    def solve(self, wanted: Sequence[Wanted]) -> list[dict[str, QuantizedWeight]]:
        """Rounds each (group, key, statistics): layer -> codes and scales; see `key_of`.

        Where the statistics have a drift, the weight that is rounded is `retargeted` first, whatever the solver.

        Unless the statistics know of outputs, rows do not depend on each other: a group's layers are stacked, and cut
        into slices that are rounded side by side, so that neither small layers nor a large head leave a worker idle.
        """
        prepared = [self._prepared(*item) for item in wanted]
        solvers = [self._solver_with(group, fmt, statistics) for group, fmt, statistics in wanted]
        heights = [
            len(w) if isinstance(solver, TwoSided) else ROWS_OF_A_JOB
            for (w, _), solver in zip(prepared, solvers, strict=True)
        ]
        jobs = [(i, start) for i, (w, _) in enumerate(prepared) for start in range(0, len(w), heights[i])]

        def run(job: tuple[int, int]) -> QuantizedWeight:
            index, start = job
            w, statistics = prepared[index]
            rows = w[start : start + heights[index]]
            return solvers[index].solve(rows, WEIGHT_FORMATS[_bare(wanted[index][1])], statistics)

        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                parts = list(pool.map(run, jobs))
        finally:
            torch.set_num_threads(threads)
        return [
            self._layers(group, fmt, [part for (i, _), part in zip(jobs, parts, strict=True) if i == index])
            for index, (group, fmt, _) in enumerate(wanted)
        ]

    def _solver_with(self, group: Group, fmt: str, statistics: LayerStatistics | None) -> Solver:
        """The group's solver, around which rows make up for each other where the outputs are known."""
        solver = SOLVERS[self.solver_of(group, fmt)]
        if isinstance(solver, Gptq) and statistics is not None and statistics.outputs:
            return TwoSided(inner=solver)
        return solver

    def _prepared(
        self, group: Group, fmt: str, statistics: LayerStatistics | None
    ) -> tuple[Tensor, LayerStatistics | None]:
        """The group's weights, stacked, as they are to be rounded, and the statistics that belong to them."""
        w = retargeted(torch.cat([self._weight(layer) for layer in group.layers]), statistics)
        exponents = self._exponents.get((group.name, fmt))
        if exponents is None:
            return w, statistics
        factor = torch.exp2(exponents.float())
        if statistics is not None:
            hessian = statistics.hessian / factor / factor[:, None]
            statistics = replace(statistics, hessian=hessian, drift=None)
        return w * factor, statistics

    def _layers(self, group: Group, fmt: str, parts: Sequence[QuantizedWeight]) -> dict[str, QuantizedWeight]:
        """Undoes the stacking."""
        widths = [output_width(self._stream.layers[layer]) for layer in group.layers]
        codes = torch.cat([p.codes.view(torch.uint8) for p in parts]).view(parts[0].codes.dtype)
        scales = torch.cat([p.scale for p in parts])
        starts = [sum(widths[:i]) for i in range(len(widths))]
        return {
            layer: QuantizedWeight(
                format=_bare(fmt),
                codes=codes[start : start + n].clone(),
                scale=scales[start : start + n].clone(),
                exponents=self._exponents.get((group.name, fmt)),
            )
            for layer, start, n in zip(group.layers, starts, widths, strict=True)
        }

    def latents(
        self, group: Group, key: str, statistics: LayerStatistics, solved: Mapping[str, QuantizedWeight]
    ) -> dict[str, Tensor]:
        """What the codes of the group's layers were rounded from; nothing for formats whose codes stay as they are."""
        if WEIGHT_FORMATS[_bare(key)].bits >= 8:
            return {}
        w, prepared = self._prepared(group, key, statistics)
        assert prepared is not None
        parts = torch.split(w, [len(solved[layer].codes) for layer in group.layers])
        return {
            layer: latent_codes(part, solved[layer], prepared.hessian, DAMPING)
            for layer, part in zip(group.layers, parts, strict=True)
        }

    def solve_and_keep(
        self, gathered: Sequence[tuple[Group, LayerStatistics]], formats: Mapping[str, Sequence[str]]
    ) -> None:
        """Rounds the groups in those formats whose solver needs statistics and that are not on disk yet."""
        wanted = [
            (group, fmt, statistics)
            for group, statistics in gathered
            for fmt in dict.fromkeys(_solved_as(fmt) for fmt in formats[group.name])
            if SOLVERS[self.solver_of(group, fmt)].needs_statistics
            and self._folder.read_solved(f"{group.name}@{fmt}", self._inputs) is None
        ]
        for (group, fmt, _), weights in zip(wanted, self.solve(wanted), strict=True):
            self._folder.write_solved(f"{group.name}@{fmt}", weights, self._inputs)

    def _weight(self, layer: str) -> Tensor:
        return weight_of(self._stream.weighted[layer]).float()

    def _row_importance(self, layer: str) -> Tensor:
        return self._frequency[self._group_of[layer].name]()

    def rounded(self, layer: str, fmt: str) -> QuantizedWeight:
        """The layer in `fmt` as calibration rounded it."""
        mixed = WEIGHT_FORMATS[_bare(fmt)]
        if isinstance(mixed, MixedRows):
            fine, coarse = (self.rounded(layer, part) for part in _parts(fmt))
            return mixed.mixed(fine, coarse, self._row_importance(layer))
        group = self._group_of[layer]
        solver = SOLVERS[self.solver_of(group, fmt)]
        if not solver.needs_statistics:
            exponents = self._exponents.get((group.name, fmt))
            w = self._weight(layer) if exponents is None else self._weight(layer) * torch.exp2(exponents.float())
            return replace(solver.solve(w, WEIGHT_FORMATS[_bare(fmt)], None), exponents=exponents)
        key = f"{group.name}@{fmt}"
        solved = self._folder.read_solved(key, self._inputs)
        if solved is None:
            raise LookupError(f"{key} has not been solved; this is a bug")
        return solved[layer]

    def errors(self, layer: str, formats: Sequence[str]) -> LayerErrors:
        """What rounding changes of the layer's weight."""
        weight = self._weight(layer)
        plain = list(dict.fromkeys(part for fmt in formats for part in _parts(fmt)))
        found = torch.empty(len(plain), *weight.shape, dtype=torch.bfloat16)
        # One after the other: all formats of a large head in float32 would be the most memory that a run takes.
        for into, fmt in zip(found, plain, strict=True):
            into.copy_(self.rounded(layer, fmt).dequantize().sub_(weight))
        if plain == list(formats):
            return LayerErrors(parts=found)
        choice = torch.empty(len(formats), len(weight), dtype=torch.long)
        for row, fmt in zip(choice, formats, strict=True):
            row.copy_(self._from_parts(layer, fmt, plain))
        return LayerErrors(parts=found, choice=choice)

    def _from_parts(self, layer: str, fmt: str, plain: Sequence[str]) -> Tensor:
        """Which of the formats `plain` each row of the layer is in, or the one that all are in."""
        *_, coarse = parts = [plain.index(part) for part in _parts(fmt)]
        mixed = WEIGHT_FORMATS[_bare(fmt)]
        if not isinstance(mixed, MixedRows):
            return torch.tensor(coarse)
        return torch.where(mixed.fine_mask(self._row_importance(layer)), parts[0], coarse)

    def overlay(self, schemes: Mapping[str, Scheme], calibration: Calibration) -> dict[str, Override]:
        """What the model computes with when `schemes` (group -> scheme) hold, rounded as calibration did."""
        made: dict[str, Override] = {}
        for group in self._groups:
            scheme = schemes[group.name]
            if scheme.name != "bf16":
                weights = {layer: self._dequantised(group.name, layer, scheme) for layer in group.layers}
                made |= overrides(group, scheme, calibration, weights)
        return made

    def _dequantised(self, group: str, layer: str, scheme: Scheme) -> Callable[[], Tensor] | None:
        if scheme.weight is None:
            return None
        return lambda: self.rounded(layer, self.key_of(group, scheme)).dequantize()


def _bare(key: str) -> str:
    """The weight format of a key."""
    return key.removesuffix(MARK)


def _parts(fmt: str) -> tuple[str, ...]:
    """The keys that the rows of `fmt` are from: of two widths the fine and the coarse one, else itself."""
    found = WEIGHT_FORMATS[_bare(fmt)]
    return (FINE, found.coarse) if isinstance(found, MixedRows) else (fmt,)


def _solved_as(fmt: str) -> str:
    """The key whose solution on disk `fmt` is made from."""
    return _parts(fmt)[-1]


Weights = Mapping[str, Callable[[], Tensor] | None]
"""Layer -> what makes its dense weight; None leaves it its own."""


def overrides(group: Group, scheme: Scheme, calibration: Calibration, weights: Weights) -> dict[str, Override]:
    """What the layers of `group` compute with in `scheme`, and the tables that share the first one's weight."""
    scale = calibration.scale_of(group.name, scheme.activation)
    exponents = calibration.exponents_of(group.name, scheme)
    layers = {
        layer: Override(
            weight=weight, activation=scheme.activation, activation_scale=scale, activation_exponents=exponents
        )
        for layer, weight in weights.items()
    }
    return layers | {table: Override(weight=weights[group.layers[0]]) for table in group.tables}


def overlay_of(
    groups: Sequence[Group],
    schemes: Mapping[str, Scheme],
    solved: Mapping[str, QuantizedWeight],
    calibration: Calibration,
) -> Overlay:
    """What the model computes with when its layers hold `solved`."""
    made: dict[str, Override] = {}
    for group in groups:
        if schemes[group.name].weight is not None:
            weights = {layer: solved[layer].dequantize for layer in group.layers}
            made |= overrides(group, schemes[group.name], calibration, weights)
    return made
