"""Stage 4: finds the cheapest mix within the budget on tuning data, and rounds it for good."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from lowprec.formats import QuantizedWeight, scheme_named
from lowprec.pipeline.prepare import Prepared
from lowprec.pipeline.price import Priced
from lowprec.pipeline.score import Scored
from lowprec.records import Group, PrecisionPlan, Scheme, digest
from lowprec.steps.allocate import Allocation, Option
from lowprec.steps.cost import in_unit
from lowprec.steps.measure import Run, compare, mean_kl, run_through
from lowprec.steps.metrics import expected_curve, limit_of, shown, tuning_loss
from lowprec.steps.scratch import Scratch
from lowprec.steps.solve import overlay_of, solve_plan
from lowprec.steps.stream import Overlay
from lowprec.steps.verify import Measured, Round, Verified, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredMix:
    """What one mix lost on tuning data; kept so that no mix is measured twice."""

    mix: str
    loss: float
    upper: float
    kl_nats: float

    @property
    def measured(self) -> Measured:
        """Without the name."""
        return Measured(loss=self.loss, upper=self.upper, kl_nats=self.kl_nats)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chosen:
    """The plan and its codes.

    Attributes:
        verified: the rounds of verification, and the chosen one as it was finally measured.
        solved: layer -> codes and scales, of quantised layers.
        solved_inputs: digests that name this very rounding.
    """

    scored: Scored
    priced: Priced
    verified: Verified
    plan: PrecisionPlan
    solved: Mapping[str, QuantizedWeight]
    solved_inputs: Mapping[str, str]

    @property
    def prepared(self) -> Prepared:
        """The first stage's record."""
        return self.scored.prepared

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Group -> scheme."""
        return {group: scheme_named(name) for group, name in self.plan.groups}

    @property
    def scheme_of_layer(self) -> dict[str, Scheme]:
        """Layer -> scheme."""
        schemes = self.schemes
        return {layer: schemes[g.name] for g in self.prepared.groups for layer in g.layers}

    @property
    def overlay(self) -> Overlay:
        """What the scored model computes with."""
        return overlay_of(self.prepared.groups, self.schemes, self.solved, self.scored.calibration)


class Tuning:
    """Measures mixes on tuning text; the reference runs once, when it is first needed."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared

    @cached_property
    def _reference(self) -> Run:
        return run_through(self._prepared.stream, self._prepared.tuning.batches)

    def measure(self, overlay: Overlay) -> Measured:
        """Loss, its upper bound, and KL of the model under `overlay`."""
        context, tuning = self._prepared.context, self._prepared.tuning
        reference, metric = self._reference, context.metric
        candidate = run_through(self._prepared.stream, tuning.batches, overlay)
        table = compare(reference, [candidate], tuning.batches, metric.compare(tuning.data))[0]
        loss, upper = tuning_loss(metric, table, tuning.data, tuning.batches, context.settings.seed)
        return Measured(loss=loss, upper=upper, kl_nats=mean_kl(table))


def options(scored: Scored, priced: Priced) -> dict[str, list[Option]]:
    """Each group's schemes with predicted KL and cost."""
    objective, predicted = scored.prepared.context.settings.objective, scored.predicted
    return {
        group: [
            Option(
                scheme=s.name,
                loss=predicted.get((group, s.name), 0.0),
                cost=in_unit(priced.costs[group, s.name], objective),
            )
            for s in schemes
        ]
        for group, schemes in scored.prepared.allowed.items()
    }


def choose(scored: Scored, priced: Priced) -> Chosen:
    """Allocates, verifies, rounds; writes plan.json and the solved groups."""
    tuning = Tuning(scored.prepared)
    verified = _verify(scored, priced, tuning)
    plan = _plan(scored, priced, verified)
    verified, solved = _solve(scored, plan, verified, tuning)
    limit = limit_of(scored.prepared.context.metric.budget)
    if verified.rounds and not any(r.accepted(limit) for r in verified.rounds):
        _say_how_far(scored.prepared, verified)
    prepared = scored.prepared
    inputs = _solve_inputs(prepared, plan) | {"codes": _codes_digest(solved)}
    _keep(prepared, solved, inputs)
    return Chosen(scored=scored, priced=priced, verified=verified, plan=plan, solved=solved, solved_inputs=inputs)


def _verify(scored: Scored, priced: Priced, tuning: Tuning) -> Verified:
    prepared, context = scored.prepared, scored.prepared.context
    inputs = {**prepared.inputs, "tuning": prepared.tuning.data.digest, "metric": prepared.metric_key}
    known: tuple[MeasuredMix, ...] = context.folder.read_step("measured", inputs, tuple[MeasuredMix, ...]) or ()
    measured = {m.mix: m for m in known}

    def measure(allocation: Allocation) -> Measured:
        mix = digest(repr(allocation.schemes))
        if mix not in measured:
            found = tuning.measure(scored.overlay(allocation.scheme_of()))
            measured[mix] = MeasuredMix(mix=mix, **dataclasses.asdict(found))
            context.folder.write_step("measured", tuple(measured.values()), inputs)
        return measured[mix].measured

    with context.progress.step("verify", unit="rounds") as step:
        return verify(
            prepared.names,
            options(scored, priced),
            limit_of(context.metric.budget),
            measure,
            context.settings.effort.rounds,
            expected_curve(context.metric.budget),
            step.report,
        )


def _say_how_far(prepared: Prepared, verified: Verified) -> None:
    budget, closest = prepared.context.metric.budget, verified.closest.measured
    left = "the model stays as it is" if verified.accepted else "it is written all the same"
    prepared.context.progress.note(
        f"no mix is within the budget of {budget.limit:g} on tuning data; the closest has a loss of "
        f"{shown(budget, closest.loss):.4g}, at most {shown(budget, closest.upper):.4g}: {left}"
    )


def _plan(scored: Scored, priced: Priced, verified: Verified) -> PrecisionPlan:
    """The chosen mix as a record, written to plan.json."""
    prepared, chosen = scored.prepared, verified.chosen
    context, settings = prepared.context, prepared.context.settings
    plan = PrecisionPlan(
        model=context.model.name,
        revision=context.model.revision,
        groups=chosen.allocation.schemes,
        budget=context.metric.budget,
        workload=settings.workload,
        target=settings.target,
        objective=settings.objective,
        solver=settings.effort.solver,
        predicted_loss=shown(context.metric.budget, chosen.predicted),
        predicted_cost=chosen.allocation.cost,
        input_digests=tuple(sorted({**prepared.inputs, "tuning": prepared.tuning.data.digest}.items())),
    )
    context.folder.write_step("plan", plan, {"cost": digest(repr(priced.samples)), **prepared.inputs})
    return plan


def _solve_inputs(prepared: Prepared, plan: PrecisionPlan) -> dict[str, str]:
    return {**prepared.inputs, "plan": digest(repr(plan.groups)), "tuning": prepared.tuning.data.digest}


def _quantised(prepared: Prepared, plan: PrecisionPlan) -> list[tuple[Group, str]]:
    """The plan's quantised groups, each with its weight format."""
    schemes = plan.scheme_of()
    formats = [(g, scheme_named(schemes[g.name]).weight) for g in prepared.groups]
    return [(group, fmt) for group, fmt in formats if fmt is not None]


def _solve(
    scored: Scored, plan: PrecisionPlan, verified: Verified, tuning: Tuning
) -> tuple[Verified, dict[str, QuantizedWeight]]:
    """The codes and scales of every quantised layer; where the effort pays for it, compensated if that is better."""
    prepared = scored.prepared
    quantised = _quantised(prepared, plan)
    plain = {layer: prepared.rounder.rounded(layer, fmt) for group, fmt in quantised for layer in group.layers}
    if not (prepared.context.settings.effort.compensated and quantised):
        return verified, plain
    better, measured = _compensated(scored, plan, tuning)
    if measured.upper > verified.chosen.measured.upper:
        prepared.context.progress.note("compensated rounding was no better on tuning data; the plain one is kept")
        return verified, plain
    return _improved(verified, measured, limit_of(prepared.context.metric.budget)), better


def _improved(verified: Verified, measured: Measured, limit: float) -> Verified:
    """The chosen mix as it measures after another rounding."""
    improved: Round = dataclasses.replace(verified.chosen, measured=measured)
    return dataclasses.replace(
        verified, chosen=improved, accepted=improved.accepted(limit), rounds=(*verified.rounds, improved)
    )


def _compensated(scored: Scored, plan: PrecisionPlan, tuning: Tuning) -> tuple[dict[str, QuantizedWeight], Measured]:
    """Rounded once more against the rounded model's own inputs, and what that loses on tuning data."""
    prepared, context = scored.prepared, scored.prepared.context
    inputs = _solve_inputs(prepared, plan)
    schemes = {group: scheme_named(name) for group, name in plan.groups}
    stored: MeasuredMix | None = context.folder.read_step("compensated", inputs, MeasuredMix)
    scratch = Scratch(context.folder.path / "work-solve", digest(*inputs.values()))
    with context.progress.step("compensate", prepared.stream.depth + 1, "blocks") as step:
        found = solve_plan(
            prepared.stream,
            prepared.groups,
            schemes,
            prepared.calibration_batches,
            context.model.outcome,
            prepared.rounder,
            context.folder,
            inputs,
            scored.calibration,
            scratch,
            finished=stored is not None,
            progress=step.report,
        )
        if stored is None:
            loss = tuning.measure(overlay_of(prepared.groups, schemes, found, scored.calibration))
            stored = MeasuredMix(mix="compensated", **dataclasses.asdict(loss))
            context.folder.write_step("compensated", stored, inputs)
        scratch.clear()
    return found, stored.measured


def _keep(prepared: Prepared, solved: Mapping[str, QuantizedWeight], inputs: Mapping[str, str]) -> None:
    """Writes one file per quantised group, as far as it is not there."""
    folder, progress = prepared.context.folder, prepared.context.progress
    quantised = [group for group in prepared.groups if group.layers[0] in solved]
    with progress.step("solve", len(quantised), "groups") as step:
        for done, group in enumerate(quantised):
            if folder.read_solved(group.name, inputs) is None:
                folder.write_solved(group.name, {layer: solved[layer] for layer in group.layers}, inputs)
            step.report(done + 1, len(quantised))


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
