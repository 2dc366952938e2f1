"""Stage 4: finds the cheapest mix within the budget on tuning data, and rounds it for good."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowprec.formats import QuantizedWeight, scheme_named
from lowprec.pipeline.mixes import COMPENSATED, Mixes, lower_level
from lowprec.pipeline.prepare import Prepared
from lowprec.pipeline.price import Priced
from lowprec.pipeline.score import Scored
from lowprec.records import PrecisionPlan, RoundedPart, Scheme, digest
from lowprec.settings import Effort
from lowprec.steps.allocate import Option
from lowprec.steps.cost import in_unit
from lowprec.steps.metrics import expected_curve, limit_of, shown
from lowprec.steps.solve import overlay_of
from lowprec.steps.stream import Overlay
from lowprec.steps.verify import Verified, verify
from lowprec.transforms import Merge, merged, smoothed_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chosen:
    """The plan and its codes.

    Attributes:
        verified: the rounds of verification, and the chosen one as it was finally measured.
        merges: the scales that the plan wants between layers; `in_model` puts them there.
        solved: layer -> codes and scales, of quantised layers, as they are with these scales in the model.
        solved_inputs: digests that name this very rounding.
    """

    scored: Scored
    priced: Priced
    verified: Verified
    plan: PrecisionPlan
    merges: tuple[tuple[Merge, Tensor], ...]
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

    def in_model(self) -> AbstractContextManager[None]:
        """The model with the plan's scales merged into it while open, as `solved` and `overlay` expect it."""
        return merged(self.prepared.context.model.module, self.merges)

    @property
    def overlay_without_cache(self) -> Overlay:
        """`overlay` with the KV cache as it is."""
        calibration = replace(self.scored.calibration, smoothed=())
        return overlay_of(self.prepared.groups, self.schemes, self.solved, calibration)

    @property
    def overlay(self) -> Overlay:
        """What the scored model computes with, the plan's scales being merged into it."""
        return {
            **self.overlay_without_cache,
            **self.prepared.caches.behind(self.merges).overlay(self.plan.scheme_of()),
        }

    @property
    def cache(self) -> tuple[RoundedPart, ...]:
        """What the plan rounds of the KV cache, the plan's scales being merged into the model."""
        return self.prepared.caches.behind(self.merges).parts(self.plan.scheme_of())


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
    mixes = Mixes(scored)
    verified = _verify(scored, priced, mixes)
    plan = _plan(scored, priced, verified, mixes.roundings_of(verified.chosen.allocation.scheme_of()))
    merges = _merges(scored, plan)
    # What a ladder is made of is kept for the stage that makes it, or a run that was cut would round it again.
    beside = [lower_level(scored)] if scored.prepared.context.settings.ladder else []
    solved = _behind_merges(mixes.solved(plan.scheme_of(), beside), merges)
    limit = limit_of(scored.prepared.context.metric.budget)
    if verified.rounds and not any(r.accepted(limit) for r in verified.rounds):
        _say_how_far(scored.prepared, verified)
    prepared = scored.prepared
    inputs = _solve_inputs(prepared, plan) | {
        "codes": _codes_digest(solved, prepared.caches.behind(merges).parts(plan.scheme_of()))
    }
    _keep(prepared, solved, inputs)
    return Chosen(
        scored=scored, priced=priced, verified=verified, plan=plan, merges=merges, solved=solved, solved_inputs=inputs
    )


def _merges(scored: Scored, plan: PrecisionPlan) -> tuple[tuple[Merge, Tensor], ...]:
    """The smoothing scales of the plan's groups."""
    smoothed = scored.prepared.smoothed
    found = [smoothed_of(smoothed, group, scheme_named(name)) for group, name in plan.groups]
    return tuple((s.merge, s.values) for s in found if s is not None)


def _behind_merges(
    solved: Mapping[str, QuantizedWeight], merges: Sequence[tuple[Merge, Tensor]]
) -> dict[str, QuantizedWeight]:
    """The weights once the scales are in the model: inputs are divided by then, and a source that is quantised itself
    divides by its own scales.
    """
    after = {layer: replace(weight, exponents=None) for layer, weight in solved.items()}
    for merge, exponents in merges:
        if (weight := after.get(merge.source)) is not None:
            rows = slice(merge.offset, merge.offset + merge.channels)
            scale = weight.scale.clone()
            scale[rows] *= torch.exp2(-exponents.float())[:, None]
            after[merge.source] = replace(weight, scale=scale)
    return after


def _verify(scored: Scored, priced: Priced, mixes: Mixes) -> Verified:
    prepared, context = scored.prepared, scored.prepared.context
    with context.progress.step("verify", unit="rounds") as step:
        return verify(
            prepared.names,
            options(scored, priced),
            limit_of(context.metric.budget),
            mixes.measure,
            context.settings.effort.rounds,
            expected_curve(context.metric.budget, mixes.expected),
            step.report,
            mixes.correction,
            mixes.pooled,
        )


def _say_how_far(prepared: Prepared, verified: Verified) -> None:
    budget, closest = prepared.context.metric.budget, verified.closest.measured
    left = "the model stays as it is" if verified.accepted else "it is written all the same"
    prepared.context.progress.note(
        f"no mix is within the budget of {budget.limit:g} on tuning data; the closest has a loss of "
        f"{shown(budget, closest.loss):.4g}, at most {shown(budget, closest.upper):.4g}: {left}"
    )


def _plan(scored: Scored, priced: Priced, verified: Verified, roundings: Sequence[str]) -> PrecisionPlan:
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
        solver=solver_of(settings.effort, roundings),
        predicted_loss=shown(context.metric.budget, chosen.predicted),
        predicted_cost=chosen.allocation.cost,
        input_digests=tuple(sorted({**prepared.inputs, "tuning": prepared.tuning.data.digest}.items())),
    )
    context.folder.write_step("plan", plan, {"cost": digest(repr(priced.samples)), **prepared.inputs})
    return plan


def solver_of(effort: Effort, roundings: Sequence[str]) -> str:
    """What the weights were rounded by, for the report."""
    parts = {"weighted": effort.weighted, "two-sided": effort.two_sided, "learned": effort.learning_steps > 0}
    compensated = [name for name, on in parts.items() if on and COMPENSATED in roundings]
    return ", ".join([effort.solver, *compensated, *roundings[-1:]])


def _solve_inputs(prepared: Prepared, plan: PrecisionPlan) -> dict[str, str]:
    return {**prepared.inputs, "plan": digest(repr(plan.groups)), "tuning": prepared.tuning.data.digest}


def _keep(prepared: Prepared, solved: Mapping[str, QuantizedWeight], inputs: Mapping[str, str]) -> None:
    """Writes one file per quantised group, as far as it is not there."""
    folder, progress = prepared.context.folder, prepared.context.progress
    quantised = [group for group in prepared.groups if group.layers[0] in solved]
    with progress.step("solve", len(quantised), "groups") as step:
        for done, group in enumerate(quantised):
            if folder.read_solved(group.name, inputs) is None:
                folder.write_solved(group.name, {layer: solved[layer] for layer in group.layers}, inputs)
            step.report(done + 1, len(quantised))


def _codes_digest(solved: Mapping[str, QuantizedWeight], cache: tuple[RoundedPart, ...]) -> str:
    """Digest of all codes and scales, and of what is rounded of the KV cache: two roundings of one plan are two
    artefacts.
    """
    parts = [repr(cache).encode()] if cache else []
    for layer, weight in sorted(solved.items()):
        parts += [
            layer.encode(),
            weight.codes.contiguous().view(torch.uint8).numpy().tobytes(),
            weight.scale.numpy().tobytes(),
        ]
    return digest(*parts)
