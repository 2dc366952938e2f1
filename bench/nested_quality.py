"""What both levels of nested weights lose, against standalone INT4 and INT8, on text that nothing was fitted to.

All candidates are weights alone, computed in float32 from one model in bfloat16. The text is measured in parts, each
kept in the run's folder, so that a bench that was killed goes on where it was.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowprec.artifacts.folder import RunFolder
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight, resolve, scheme_named
from lowprec.formats.nested import NestedWeight
from lowprec.pipeline.context import context_of
from lowprec.pipeline.prepare import Prepared, prepare
from lowprec.records import digest
from lowprec.report import RunProgress
from lowprec.settings import Settings, effort_named
from lowprec.solvers import SOLVERS, LayerStatistics
from lowprec.steps.calibrate import Calibration, calibrate
from lowprec.steps.compensate import Compensation
from lowprec.steps.judge import ratio_bounds
from lowprec.steps.load import load
from lowprec.steps.measure import compare, compare_tokens, paired, run_through
from lowprec.steps.nest import nest
from lowprec.steps.scores import PairedScores, concatenate, mean_kl, perplexities, perplexity_increase
from lowprec.steps.scratch import Scratch
from lowprec.steps.stream import Override
from lowprec.steps.tokens import Batched, batched

PART_TOKENS = 4_096
CONFIDENCE = 0.975
Makers = Mapping[str, Callable[[], Tensor]]
"""Layer -> what makes its dense weight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """What one candidate loses: KL to the model as it is, and the perplexity's relative increase."""

    kl_nats: float
    perplexity_increase: float
    perplexity: float
    tokens: int


class Quality:
    """A prepared model, and what was measured of it."""

    def __init__(self, prepared: Prepared, tokens: int, calibration_tokens: int) -> None:
        self.prepared, self.folder = prepared, prepared.context.folder
        self.parts = _parts(prepared.held_out[0].subset(tokens))
        self.batches = prepared.gathered.data.subset(calibration_tokens).batches(2048)
        self.scores: dict[str, PairedScores] = {}

    def _scratch(self, name: str) -> Scratch:
        return Scratch(self.folder.path / f"work-{name}", digest(*self.prepared.inputs.values()))

    def compensated(self, scheme: str) -> dict[str, QuantizedWeight]:
        """Plane 1: every group in `scheme`, each making up for those before it, as a run rounds a mix."""
        prepared = self.prepared
        schemes = {g.name: resolve(scheme_named(scheme), g.k) for g in prepared.groups}
        compensation = Compensation(
            stream=prepared.stream, groups=prepared.groups, schemes=schemes, batches=self.batches,
            outcome=prepared.context.model.outcome, calibration=Calibration(amax=(), batches=0),
            rounder=prepared.rounder, folder=self.folder, inputs={**prepared.inputs, "base": scheme},
            name=f"base-{scheme}",
        )  # fmt: skip
        with prepared.context.progress.step(f"plane 1, {scheme}", prepared.stream.depth + 1, "blocks") as step:
            return compensation.run(self._scratch("base"), step.report)

    def nested(self, solved: Mapping[str, QuantizedWeight]) -> dict[str, NestedWeight]:
        """Plane 2 for these weights of plane 1."""
        prepared = self.prepared
        groups = [g for g in prepared.groups if all(layer in solved for layer in g.layers)]
        with prepared.context.progress.step("plane 2", prepared.stream.depth + 1, "blocks") as step:
            outcome = prepared.context.model.outcome
            return nest(prepared.stream, groups, solved, self.batches, outcome, self._scratch("nest"), step.report)

    def plain_int8(self, layers: Sequence[str]) -> Makers:
        """Standalone INT8 per channel, rounded to nearest: what a run of lowprec takes at 8 bits."""
        weighted, fmt = self.prepared.stream.weighted, WEIGHT_FORMATS["int8"]

        def make(layer: str) -> Tensor:
            weight = weighted[layer].weight
            assert isinstance(weight, Tensor)
            return SOLVERS["rtn"].solve(weight.detach().float(), fmt, None).dequantize()

        return {layer: lambda layer=layer: make(layer) for layer in layers}

    def solved_int8(self, layers: Sequence[str], solver: str) -> Makers:
        """Standalone INT8 per channel, rounded with error feedback over the Hessians that plane 2 sees."""
        prepared, found, wanted = self.prepared, {}, set(layers)

        def on_groups(gathered: Any) -> None:
            for group, statistics in gathered:
                assert isinstance(statistics, LayerStatistics)
                for layer in group.layers:
                    w = prepared.stream.weighted[layer].weight.detach().float()
                    found[layer] = SOLVERS[solver].solve(w, WEIGHT_FORMATS["int8"], statistics)

        groups = [g for g in prepared.groups if all(layer in wanted for layer in g.layers)]
        scratch = self._scratch("int8")
        scratch.clear()
        with prepared.context.progress.step(f"INT8 by {solver}", prepared.stream.depth + 1, "blocks") as step:
            outcome = prepared.context.model.outcome
            calibrate(prepared.stream, groups, self.batches, outcome, on_groups, scratch, progress=step.report)
        return {layer: weight.dequantize for layer, weight in found.items()}

    def measure(self, candidates: Mapping[str, Makers], parts: int | None = None) -> dict[str, Loss]:
        """Runs the model with each candidate's weights over the first `parts` parts of the text (None: all)."""
        names = {name: _digest_of(makers) for name, makers in candidates.items()}
        found: dict[str, list[PairedScores]] = {name: [] for name in candidates}
        chosen = self.parts[:parts]
        with self.prepared.context.progress.step("measure", len(chosen), "parts") as step:
            for number, part in enumerate(chosen):
                for name, table in self._part(part, names, candidates).items():
                    found[name].append(paired(table, part.data, part.batches))
                step.report(number + 1, len(chosen))
        self.scores |= {name: concatenate(rows) for name, rows in found.items()}
        return {name: _loss(self.scores[name]) for name in candidates}

    def _part(self, part: Batched, names: Mapping[str, str], candidates: Mapping[str, Makers]) -> dict[str, Tensor]:
        stream, text = self.prepared.stream, part.data.digest
        known: dict[str, Tensor] = {}
        for name, weights in names.items():
            kept = self.folder.read_step(f"part-{text[:12]}-{weights[:12]}", {"text": text, "weights": weights})
            if kept is not None:
                known[name] = torch.tensor(kept)
        missing = [name for name in names if name not in known]
        if missing:
            reference = run_through(stream, part.batches)
            runs = [
                run_through(stream, part.batches, {k: Override(weight=make) for k, make in candidates[name].items()})
                for name in missing
            ]
            for name, table in zip(missing, compare(reference, runs, part.batches, compare_tokens), strict=True):
                inputs = {"text": text, "weights": names[name]}
                self.folder.write_step(f"part-{text[:12]}-{names[name][:12]}", table.tolist(), inputs)
                known[name] = table
        return known

    def ratio(self, name: str, other: str) -> tuple[float, float]:
        """97.5 % bounds of the first one's KL over the second's, bootstrapped over units of text."""
        one, two = self.scores[name], self.scores[other]
        units, place = np.unique(one.unit, return_inverse=True)
        bounds = ratio_bounds(
            np.bincount(place, one.kl, len(units)), np.bincount(place, two.kl, len(units)), CONFIDENCE
        )
        return bounds.lower, bounds.upper


def _parts(text: Any) -> list[Batched]:
    parts = []
    while len(text):
        part = text.subset(PART_TOKENS)
        parts.append(batched(part))
        text = text.after(len(part))
    return parts


def _digest_of(makers: Makers) -> str:
    """Names the weights of a candidate."""
    sums = [makers[layer]().double() for layer in sorted(makers)]
    return digest(*(f"{float(w.sum())!r} {float(w.square().sum())!r}" for w in sums))


def _loss(scores: PairedScores) -> Loss:
    return Loss(
        kl_nats=mean_kl(scores),
        perplexity_increase=perplexity_increase(scores),
        perplexity=perplexities(scores)[1],
        tokens=int(scores.tokens.sum()),
    )


def opened(
    model: str, folder: RunFolder, progress: RunProgress, tokens: int, calibration_tokens: int, seed: int
) -> Quality:
    """The model with its text, in a run's folder."""
    effort = dataclasses.replace(effort_named("balanced"), held_out_tokens=tokens)
    settings = Settings(out=Path(folder.path), effort=effort, smooth=False, embeddings=False, seed=seed)
    return Quality(prepare(context_of(load(model), settings, folder, progress)), tokens, calibration_tokens)
