"""One run: wires the steps to a folder, so that a step whose inputs have not changed is skipped.

    data -> graph -> calibrate -> sensitivity -> check -> cost -> verify -> solve -> export -> judge -> end to end

Every step's file in the folder names the digests of what it was made from. A killed run continues where it was cut:
calibration and sensitivity at the block, verification at the mix, the judge at the look.
"""

import dataclasses
import json
import resource
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowprec.artifacts.folder import RunFolder
from lowprec.errors import ConfigError, DataError
from lowprec.formats import QuantizedWeight, scheme_named, schemes_named
from lowprec.records import (
    CostSample,
    Group,
    PrecisionPlan,
    Scheme,
    SensitivityRow,
    digest,
)
from lowprec.report.progress import RunProgress
from lowprec.results import CheckedPair, SensitivityResult
from lowprec.settings import Settings
from lowprec.steps.allocate import Allocation, Option
from lowprec.steps.calibrate import Calibration, calibrate
from lowprec.steps.check import agreement, choose_pairs
from lowprec.steps.cost import GroupCost, candidates, group_costs, in_unit, time_shapes
from lowprec.steps.data import Batch, Splits, SplitSizes, split
from lowprec.steps.graph import find_groups
from lowprec.steps.linear import output_width
from lowprec.steps.load import Model
from lowprec.steps.measure import compare, mean_kl, measure_pairs, run_through
from lowprec.steps.metrics import Metric, limit_of, metric_of, shown, tuning_loss
from lowprec.steps.scratch import Scratch
from lowprec.steps.sensitivity import effects, rows_of
from lowprec.steps.solve import Rounder, overlay_of, solve_plan
from lowprec.steps.sources import read_sources
from lowprec.steps.stream import Overlay, Stream
from lowprec.steps.verify import Measured, Verified, verify
from lowprec.targets import Target, target_for
from lowprec.version import __version__

BATCH_TOKENS = 512
PROBE_WINDOW = 128
BF16 = scheme_named("bf16")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredMix:
    """What one mix lost on tuning data; kept so that no mix is measured twice."""

    mix: str
    loss: float
    upper: float
    kl_nats: float


class Run:
    """The state of one run. Its methods are the steps, in order; each returns what the next ones need.

    Args:
        model: what to optimise.
        settings: what it is asked to do.
        folder: where everything is kept.
        progress: shows and times the steps.
    """

    def __init__(self, model: Model, settings: Settings, folder: RunFolder, progress: RunProgress) -> None:
        self.model, self.settings, self.folder, self.progress = model, settings, folder, progress
        self.target: Target = target_for(settings.target, None if settings.device == "cpu" else settings.device)
        self.metric: Metric = metric_of(settings.budget, model, settings.seed)
        self.outcome = model.outcome
        self.own_bytes = model.dtype.itemsize

    # Data and graph

    def prepare(self) -> None:
        """Splits the text, cuts the model, finds the groups and strikes out what the target cannot run."""
        effort = self.settings.effort
        with self.progress.step("data"):
            self.splits = self._split()
        wanted = schemes_named(self.settings.schemes)
        with self.progress.step("graph"):
            self.stream = Stream(
                self.model.module, self.model.forward, self.example(), device=self.settings.calibration_device
            )
            self.groups, self.unquantised = find_groups(self.stream)
            if not self.groups:
                raise ConfigError(f"{self.model.name} has no linear layer that can be quantised")
            self.widths = {
                g.name: tuple(output_width(self.stream.layers[layer]) for layer in g.layers) for g in self.groups
            }
            self.allowed, self.struck_out = candidates(self.groups, self.widths, wanted, self.target)
        whole = self.splits.calibration
        # Where there is less text than asked for, both halves of calibration shrink alike.
        share = effort.calibration_tokens / (effort.calibration_tokens + effort.sensitivity_tokens)
        self.gathered = whole.subset(round(share * whole.tokens))
        self.gather_batches = self.gathered.batches(BATCH_TOKENS)
        # More and shorter sequences: the prediction's variance falls with their number.
        self.probed = whole.after(len(self.gathered)).cut(PROBE_WINDOW)
        self.probe_batches = self.probed.batches(BATCH_TOKENS)
        if not self.probe_batches:
            raise DataError("the calibration text is one single window; give more text")
        self.tuning, self.held_out = self.metric.sets(self.splits)
        self.tuning_batches = self.tuning.batches(BATCH_TOKENS)
        self.schemes = {g.name: [s for s in self.allowed[g.name] if s.weight is not None] for g in self.groups}
        self.inputs = {
            "model": self.model.revision,
            "data": self.splits.calibration.digest,
            "schemes": digest(json.dumps({g: [s.name for s in x] for g, x in self.schemes.items()}, sort_keys=True)),
            "output": self._output_digest(),
            "effort": digest(repr(dataclasses.replace(effort, tuning_tokens=0, held_out_tokens=0, rounds=0))),
            "seed": str(self.settings.seed),
            "version": __version__,
        }
        self.rounder = Rounder(self.stream, self.folder, self.inputs, effort.solver, self.settings.workers)
        self.rounder.know(self.groups)
        confidence = f"{self.metric.budget.confidence:g}"
        self.metric_key = digest(self.metric.budget.metric, confidence, self.tuning.digest, self._metric_value())

    def _split(self) -> Splits:
        effort = self.settings.effort
        if self.model.tokenizer is None:
            raise ConfigError("a model without a tokenizer needs one to read the calibration text: give tokenizer=...")
        sizes = SplitSizes(
            calibration=effort.calibration_tokens + effort.sensitivity_tokens,
            tuning=effort.tuning_tokens,
            held_out=effort.held_out_tokens,
            window=effort.window,
        )
        splits = split(read_sources(self.settings.data), self.model.tokenizer, sizes, self.settings.seed)
        self.folder.write_step("data", splits.summary, {"data": splits.calibration.digest})
        return splits

    def _output_digest(self) -> str:
        """What the model makes of the example: another configuration or forward function is another model."""
        with torch.no_grad():
            output = self.model.forward(self.model.module, self.example())
        return f"{float(output.double().abs().mean()):.3e}"

    def _metric_value(self) -> str:
        """What the user's metric says of a doubled output; empty where there is no such metric."""
        if self.model.metric is None:
            return ""
        with torch.no_grad():
            output = self.model.forward(self.model.module, self.example()).float()
        return f"{float(self.model.metric(output, output * torch.linspace(0.5, 2, output.shape[-1])).mean()):.3e}"

    def example(self) -> Batch:
        """A few tokens, to find a model's cut with."""
        ids = self.splits.calibration.ids[0][:8]
        return Batch(ids=ids[None], lengths=torch.tensor([len(ids)]), index=(0,))

    # Calibration and sensitivity

    def calibrate(self) -> None:
        """Gathers statistics and rounds every group in every weight format."""
        stored: Calibration | None = self.folder.read_step("calibration", self.inputs, Calibration)
        self.scratch = Scratch(self.folder.path / "work", digest(*self.inputs.values()))
        if stored is not None and (self._sensitivity() is not None or self.scratch.note("forward")):
            self.calibration = stored
            self.progress.skip("calibrate", "done by an earlier run")
            return
        formats = {g: sorted({s.weight for s in x if s.weight}) for g, x in self.schemes.items()}
        names = {
            id(batch): ", ".join(dict.fromkeys(data.documents[i] for i in batch.index))
            for data, batches in ((self.gathered, self.gather_batches), (self.probed, self.probe_batches))
            for batch in batches
        }

        def describe(batch: Any) -> str:
            return names[id(batch)]

        with self.progress.step("calibrate", self.stream.depth + 1, "blocks") as step:
            self.calibration = calibrate(
                self.stream,
                self.groups,
                [*self.gather_batches, *self.probe_batches],
                self.outcome,
                lambda gathered: self.rounder.solve_and_keep(gathered, formats),
                self.scratch,
                probing=len(self.probe_batches),
                progress=step.report,
                describe=describe,
            )
        self.folder.write_step("calibration", self.calibration, self.inputs)

    def _sensitivity(self) -> tuple[SensitivityRow, ...] | None:
        found: tuple[SensitivityRow, ...] | None = self.folder.read_step(
            "sensitivity", self.inputs, tuple[SensitivityRow, ...]
        )
        return found

    def sensitivity(self) -> None:
        """Scores every (group, scheme) in nats."""
        rows = self._sensitivity()
        if rows is not None:
            self.progress.skip("sensitivity", "done by an earlier run")
        else:
            with self.progress.step("sensitivity", self.stream.depth, "blocks") as step:
                found = effects(
                    self.stream,
                    self.groups,
                    self.schemes,
                    self.probe_batches,
                    self.outcome,
                    self.rounder.errors,
                    self.calibration,
                    self.scratch,
                    self.settings.seed,
                    step.report,
                )
            rows = rows_of(found, self.groups, self.schemes, self.rounder.solver_of)
            self.folder.write_step("sensitivity", rows, self.inputs)
            self.scratch.clear()
        self.predicted = {(row.group, row.scheme): row.predicted_kl_nats for row in rows}

    def check(self) -> tuple[CheckedPair, ...]:
        """Measures some (group, scheme) pairs directly, on tuning data, the same number in each scheme."""
        effort = self.settings.effort
        data = self.splits.tuning.subset(effort.checked_tokens)
        inputs = self.inputs | {"tuning": data.digest}
        stored: tuple[CheckedPair, ...] | None = self.folder.read_step("check", inputs, tuple[CheckedPair, ...])
        if stored is not None:
            self.progress.skip("check", "done by an earlier run")
            return stored
        chosen = choose_pairs(list(self.predicted), effort.checked_pairs, self.settings.seed)
        overlays = {pair: self.overlay({pair[0]: pair[1]}) for pair in chosen}
        with self.progress.step("check", self.stream.depth, "blocks") as step:
            measured = measure_pairs(
                self.stream, data.batches(BATCH_TOKENS), overlays, self.metric.divergence, step.report
            )
        pairs = tuple(
            CheckedPair(
                group=group,
                scheme=scheme,
                predicted_kl_nats=self.predicted[group, scheme],
                measured_kl_nats=measured[group, scheme],
            )
            for group, scheme in overlays
        )
        self.folder.write_step("check", pairs, inputs)
        return pairs

    def overlay(self, schemes: Mapping[str, str]) -> Overlay:
        """What the model computes with in a mix (group -> scheme; groups left out stay as they are)."""
        named = {g.name: scheme_named(schemes.get(g.name, "bf16")) for g in self.groups}
        return self.rounder.overlay(self.groups, named, self.calibration)

    # Cost

    def cost(self) -> None:
        """Times every shape in every scheme and adds up the groups."""
        inputs = {
            "model": self.model.revision,
            "schemes": self.inputs["schemes"],
            "workload": repr(self.settings.workload),
            "target": f"{self.target.name} on {self.target.device}",
            "torch": torch.__version__,
        }
        samples: tuple[CostSample, ...] | None = self.folder.read_step("cost", inputs, tuple[CostSample, ...])
        if samples is None:
            with self.progress.step("cost", unit="shapes") as step:
                samples = tuple(
                    time_shapes(
                        self.groups, self.widths, self.allowed, self.settings.workload, self.target, step.report
                    )
                )
            self.folder.write_step("cost", samples, inputs)
        else:
            self.progress.skip("cost", "timed by an earlier run")
        self.samples = samples
        self.costs: dict[tuple[str, str], GroupCost] = group_costs(
            self.groups, self.widths, self.allowed, self.settings.workload, samples, self._tied(), self.own_bytes
        )

    def _tied(self) -> list[str]:
        """Groups whose weight is the embedding's own parameter."""
        embeddings = {id(m.weight) for m in self.model.module.modules() if isinstance(m, nn.Embedding)}
        return [g.name for g in self.groups if any(id(self.stream.layers[x].weight) in embeddings for x in g.layers)]

    # The mix

    def options(self) -> dict[str, list[Option]]:
        """Each group's schemes with predicted KL and cost."""
        return {
            g.name: [
                Option(
                    scheme=s.name,
                    loss=self.predicted.get((g.name, s.name), 0.0),
                    cost=in_unit(self.costs[g.name, s.name], self.settings.objective),
                )
                for s in self.allowed[g.name]
            ]
            for g in self.groups
        }

    def verify(self) -> Verified:
        """Finds the cheapest mix within the budget on tuning data."""
        inputs = self.inputs | {
            "tuning": self.tuning.digest,
            "metric": self.metric_key,
        }
        known: tuple[MeasuredMix, ...] = self.folder.read_step("measured", inputs, tuple[MeasuredMix, ...]) or ()
        measured = {m.mix: m for m in known}
        with self.progress.step("verify", unit="rounds") as step:

            def measure(allocation: Allocation) -> Measured:
                mix = digest(repr(allocation.schemes))
                if mix not in measured:
                    found = self._measure(self.overlay(allocation.scheme_of()))
                    measured[mix] = MeasuredMix(mix=mix, **dataclasses.asdict(found))
                    self.folder.write_step("measured", tuple(measured.values()), inputs)
                m = measured[mix]
                return Measured(loss=m.loss, upper=m.upper, kl_nats=m.kl_nats)

            self.verified = verify(
                [g.name for g in self.groups],
                self.options(),
                limit_of(self.metric.budget),
                measure,
                self.settings.effort.rounds,
                step.report,
            )
        if not self.verified.accepted:
            self._say_how_far()
        return self.verified

    def _say_how_far(self) -> None:
        budget, closest = self.metric.budget, self.verified.chosen.measured
        self.progress.note(
            f"no mix is within the budget of {budget.limit:g} on tuning data; the closest has a loss of "
            f"{shown(budget, closest.loss):.4g}, at most {shown(budget, closest.upper):.4g}. It is written all the same"
        )

    def _measure(self, overlay: Overlay) -> Measured:
        if not hasattr(self, "_reference"):
            self._reference = run_through(self.stream, self.tuning_batches)
        candidate = run_through(self.stream, self.tuning_batches, overlay)
        by = self.metric.compare(self.tuning)
        table = compare(self._reference, [candidate], self.tuning_batches, by)[0]
        loss, upper = tuning_loss(self.metric, table, self.tuning, self.tuning_batches, self.settings.seed)
        return Measured(loss=loss, upper=upper, kl_nats=mean_kl(table))

    def plan(self) -> PrecisionPlan:
        """The chosen mix as a record, written to plan.json."""
        chosen = self.verified.chosen
        settings = self.settings
        plan = PrecisionPlan(
            model=self.model.name,
            revision=self.model.revision,
            groups=chosen.allocation.schemes,
            budget=self.metric.budget,
            workload=settings.workload,
            target=settings.target,
            objective=settings.objective,
            solver=settings.effort.solver,
            predicted_loss=shown(self.metric.budget, chosen.predicted),
            predicted_cost=chosen.allocation.cost,
            input_digests=tuple(sorted({**self.inputs, "tuning": self.tuning.digest}.items())),
        )
        self.folder.write_step("plan", plan, {"cost": digest(repr(self.samples)), **self.inputs})
        return plan

    def solve(self, plan: PrecisionPlan) -> dict[str, QuantizedWeight]:
        """The codes and scales of every quantised layer, kept one file per group."""
        schemes = {name: scheme_named(scheme) for name, scheme in plan.groups}
        inputs = self.inputs | {"plan": digest(repr(plan.groups)), "tuning": self.tuning.digest}
        quantised = [g for g in self.groups if schemes[g.name].weight is not None]
        chosen = {
            layer: self.rounder.rounded(layer, fmt)
            for g in quantised
            for layer in g.layers
            if (fmt := schemes[g.name].weight) is not None
        }
        if self.settings.effort.compensated and quantised:
            chosen = self._compensated(schemes, inputs, chosen)
        self.solved_inputs = inputs | {"codes": _codes_digest(chosen)}
        with self.progress.step("solve", len(quantised), "groups") as step:
            for done, group in enumerate(quantised):
                if self.folder.read_solved(group.name, self.solved_inputs) is None:
                    mine = {layer: chosen[layer] for layer in group.layers}
                    self.folder.write_solved(group.name, mine, self.solved_inputs)
                step.report(done + 1, len(quantised))
        return chosen

    def _compensated(
        self, schemes: Mapping[str, Scheme], inputs: dict[str, str], plain: dict[str, QuantizedWeight]
    ) -> dict[str, QuantizedWeight]:
        """Rounded once more against the rounded model's own inputs; kept only where tuning data says it is better."""
        stored: MeasuredMix | None = self.folder.read_step("compensated", inputs, MeasuredMix)
        scratch = Scratch(self.folder.path / "work-solve", digest(*inputs.values()))
        with self.progress.step("compensate", self.stream.depth + 1, "blocks") as step:
            better = solve_plan(
                self.stream,
                self.groups,
                schemes,
                [*self.gather_batches, *self.probe_batches],
                self.outcome,
                self.rounder,
                self.folder,
                inputs,
                self.calibration,
                scratch,
                finished=stored is not None,
                progress=step.report,
            )
            if stored is None:
                found = self._measure(overlay_of(self.groups, schemes, better, self.calibration))
                stored = MeasuredMix(mix="compensated", **dataclasses.asdict(found))
                self.folder.write_step("compensated", stored, inputs)
            scratch.clear()
        measured = Measured(loss=stored.loss, upper=stored.upper, kl_nats=stored.kl_nats)
        chosen = self.verified.chosen
        if measured.upper > chosen.measured.upper:
            self.progress.note("compensated rounding was no better on tuning data; the plain one is kept")
            return plain
        improved = dataclasses.replace(chosen, measured=measured)
        self.verified = dataclasses.replace(
            self.verified,
            chosen=improved,
            accepted=improved.accepted(limit_of(self.metric.budget)),
            rounds=(*self.verified.rounds, improved),
        )
        return better

    # Summaries

    def sensitivity_result(self, pairs: Sequence[CheckedPair]) -> SensitivityResult:
        """How well the prediction ranks, overall and within each scheme, and adds up."""
        chosen = self.verified.chosen
        return agreement(pairs, chosen.allocation.loss, chosen.measured.kl_nats)

    def by_name(self) -> dict[str, Group]:
        """Group name -> group."""
        return {g.name: g for g in self.groups}


def _codes_digest(solved: Mapping[str, QuantizedWeight]) -> str:
    """Digest of all codes and scales: two roundings of one plan are two artefacts."""
    parts: list[bytes] = []
    for layer, weight in sorted(solved.items()):
        parts += [
            layer.encode(),
            weight.codes.contiguous().view(torch.uint8).numpy().tobytes(),
            weight.scale.numpy().tobytes(),
        ]
    return digest(*parts)


def peak_memory_bytes() -> int:
    """The largest resident size that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
