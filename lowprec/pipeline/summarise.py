"""Stage 7: sums a run up: cost before and after, the frontier, and the report."""

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from lowprec.economics import dollars_per_million_output_tokens, price_of
from lowprec.formats import scheme_named
from lowprec.ladder import Ladder
from lowprec.pipeline.artefact import (
    Artefact,
    bytes_before,
    bytes_unrounded,
    card,
    finish,
    saved,
    shares,
)
from lowprec.pipeline.choose import Chosen
from lowprec.pipeline.context import Context
from lowprec.pipeline.deploy import deployed_path
from lowprec.pipeline.ladder import summary
from lowprec.pipeline.prove import Proved
from lowprec.pipeline.serve import baseline, optimised
from lowprec.records import ArtefactForm, Group, Scheme, Workload
from lowprec.results import CheckedPair, CostResult, FrontierPoint, GroupChoice, Report
from lowprec.steps.allocate import Allocation, allocate
from lowprec.steps.check import agreement
from lowprec.steps.cost import GroupCost, in_unit, rows_of, stored_bytes
from lowprec.steps.memory import peak_memory_bytes
from lowprec.steps.metrics import in_search_unit, shown
from lowprec.targets.torch import measure_end_to_end
from lowprec.version import __version__

Kernels = Mapping[tuple[str, int, int, int], str]
"""(scheme, N, K, M) -> the kernel that was the fastest."""
FRONTIER_BUDGETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1)
NOT_ON_TUNING = "no mix was within the budget on tuning text, and this one came closest"
UNITS = {"time": "us", "bytes": "bytes", "dollars": "dollars per million output tokens"}


def summarise(
    chosen: Chosen,
    artefact: Artefact,
    proved: Proved,
    pairs: Sequence[CheckedPair],
    ladder: Ladder | None = None,
) -> Report:
    """Everything in one record; also completes the artefact's card with the verdict."""
    prepared, verified, plan = chosen.prepared, chosen.verified, chosen.plan
    context = prepared.context
    settings, metric = context.settings, context.metric.budget
    judgement, accounts = proved.judgement, Accounts(chosen)
    with chosen.in_model():
        cost = accounts.cost(artefact)
        place, form = _complete(chosen, artefact, proved, cost)
    final = verified.chosen
    return Report(
        model=context.model.name,
        target=settings.target if context.target.origin == "measured" else context.target.name,
        objective=settings.objective,
        effort=settings.effort.name,
        verdict=judgement.verdict,
        verdict_reason=judgement.reason if verified.accepted else f"{judgement.reason}; {NOT_ON_TUNING}",
        unread_data=not proved.reused,
        reused=proved.reused,
        plan=dataclasses.replace(plan, predicted_cost=accounts.total(plan.predicted_cost)),
        loss=judgement.loss,
        cost=cost,
        parity=proved.parity,
        sensitivity=agreement(pairs, final.predicted_kl_nats, final.measured.kl_nats),
        schemes=shares(chosen),
        groups=accounts.choices(),
        unquantised=prepared.unquantised,
        struck_out=prepared.struck_out,
        frontier=accounts.frontier(),
        rounds=tuple((shown(metric, r.predicted), shown(metric, r.measured.loss)) for r in verified.rounds),
        environment=environment(context),
        seconds=context.progress.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        artefact=str(place),
        artefact_form=form,
        turned=context.model.original is not None,
        ladder=None if ladder is None else summary(chosen, ladder),
    )


@dataclass(frozen=True, slots=True)
class Accounts:
    """A chosen mix in the objective's unit."""

    chosen: Chosen

    @property
    def _groups(self) -> dict[str, Group]:
        return {g.name: g for g in self.chosen.prepared.groups}

    @property
    def _parameters(self) -> int:
        return sum(g.parameters for g in self.chosen.prepared.groups)

    def cost(self, artefact: Artefact) -> CostResult:
        """Before and after: predicted by the sum over the layers, measured on the whole model where it runs here."""
        chosen, context = self.chosen, self.chosen.prepared.context
        settings, costs = context.settings, chosen.priced.costs
        before = sum(self._unit(costs[name, "bf16"]) for name in chosen.prepared.names)
        after = self._fixed() + sum(self._unit(costs[choice]) for choice in chosen.plan.groups)
        here = context.target.origin == "measured" and context.model.kind == "decoder"
        speeds = self._speeds(artefact) if here else None
        whole, left = bytes_before(chosen), artefact.loaded_bytes
        cache_before, cache_after = self._cache_bytes()
        measured = None if speeds is None else _reduction(speeds, settings.workload)
        if settings.objective == "bytes":
            # The original's, which may tie what a turned model cannot.
            before = float(whole) + (cache_before or 0)
            measured = 1.0 - (left + (cache_after or 0)) / before
        (prefill_before, decode_before), (prefill_after, decode_after) = speeds or ((None, None), (None, None))
        return CostResult(
            workload=settings.workload,
            objective=settings.objective,
            unit=UNITS[settings.objective],
            origin="measured" if settings.objective == "bytes" else context.target.origin,
            device=context.target.device,
            baseline=context.target.baseline,
            before=before,
            after=after,
            reduction_predicted=1.0 - after / before,
            reduction_measured=measured,
            effective_bits=self._bits(chosen.schemes),
            weight_bytes_before=whole,
            weight_bytes_after=left,
            prefill_tokens_per_s_before=prefill_before,
            decode_tokens_per_s_before=decode_before,
            prefill_tokens_per_s_after=prefill_after,
            decode_tokens_per_s_after=decode_after,
            cache_bytes_before=cache_before,
            cache_bytes_after=cache_after,
        )

    def _cache_bytes(self) -> tuple[int | None, int | None]:
        """Of the KV cache's groups, as they were and as the plan has them; None where there are none."""
        costs, caches = self.chosen.priced.costs, self.chosen.prepared.caches.names

        def bytes_in(schemes: Mapping[str, str]) -> int:
            return round(sum(costs[name, schemes[name]].bytes for name in caches))

        if not caches:
            return None, None
        return bytes_in(dict.fromkeys(caches, "bf16")), bytes_in(self.chosen.plan.scheme_of())

    def total(self, allocated: float) -> float:
        """An allocation's cost with what no allocation changes, as the report shows it."""
        return self._fixed() + allocated * self._scale()

    def _unit(self, cost: GroupCost) -> float:
        """The cost in the objective's own unit."""
        return in_unit(cost, self.chosen.prepared.context.settings.objective) * self._scale()

    def _fixed(self) -> float:
        """What no allocation changes: the bytes of embeddings and all else that is in no group."""
        if self.chosen.prepared.context.settings.objective != "bytes":
            return 0.0
        costs = self.chosen.priced.costs
        return bytes_unrounded(self.chosen) - sum(costs[name, "bf16"].bytes for name in self._groups)

    def _scale(self) -> float:
        """What one unit of the allocation's cost is in the report: dollars for a microsecond, else itself."""
        settings = self.chosen.prepared.context.settings
        if settings.objective != "dollars":
            return 1.0
        price = price_of(settings.device, settings.dollars_per_hour)
        return dollars_per_million_output_tokens(settings.workload, 1.0, price)

    def _bits(self, schemes: Mapping[str, Scheme]) -> float:
        """Stored bits per parameter of all groups, scales included; embeddings count where they may be rounded."""
        context = self.chosen.prepared.context
        own = context.target.dense_bytes(context.model.dtype.itemsize)
        return 8.0 * sum(stored_bytes(g, schemes[name], own) for name, g in self._groups.items()) / self._parameters

    def _speeds(self, artefact: Artefact) -> tuple[tuple[float, float], tuple[float, float]]:
        context = self.chosen.prepared.context
        work = context.settings.workload
        found = []
        with context.progress.step("end to end", 2, "models") as step:
            for model in (baseline(self.chosen), optimised(self.chosen, artefact)):
                with model as module:
                    found.append(measure_end_to_end(module, work.prompt_tokens, max(work.output_tokens, 1), work.batch))
                step.report(len(found), 2)
        return found[0], found[1]

    def frontier(self) -> tuple[FrontierPoint, ...]:
        """The cheapest mix for each of some budgets, by the prediction as tuning data corrected it."""
        chosen, curve = self.chosen, self.chosen.verified.curve
        metric, names = chosen.prepared.context.metric.budget, chosen.prepared.names
        points = []
        for budget in FRONTIER_BUDGETS:
            mix = allocate(names, chosen.verified.options, curve.kl_nats(in_search_unit(metric, budget)))
            points.append(
                FrontierPoint(
                    budget=budget,
                    predicted_loss=shown(metric, curve.loss(mix.loss)),
                    cost=self.total(mix.cost),
                    effective_bits=self._bits({name: scheme_named(s) for name, s in mix.schemes}),
                    bytes=bytes_unrounded(chosen) - round(sum(saved(chosen, *choice) for choice in self._weights(mix))),
                    scheme_shares=self._scheme_shares(self._weights(mix)),
                )
            )
        return tuple(points)

    def _scheme_shares(self, schemes: Sequence[tuple[str, str]]) -> tuple[tuple[str, float], ...]:
        """Scheme -> share of the groups' parameters."""
        groups, found = self._groups, dict[str, float]()
        for name, scheme in schemes:
            found[scheme] = found.get(scheme, 0.0) + groups[name].parameters / self._parameters
        return tuple(sorted(found.items()))

    def _weights(self, mix: Allocation) -> list[tuple[str, str]]:
        """The (group, scheme) of a mix without those of the KV cache."""
        return [choice for choice in mix.schemes if choice[0] in self._groups]

    def choices(self) -> tuple[GroupChoice, ...]:
        """The groups' rows of the report."""
        kernels = {(s.scheme, s.n, s.k, s.m): s.kernel for s in self.chosen.priced.samples}
        return tuple(self._choice(*choice, kernels) for choice in self.chosen.plan.groups)

    def _choice(self, name: str, scheme: str, kernels: Kernels) -> GroupChoice:
        cached = {group.name: group for group in self.chosen.prepared.caches.groups}
        group = self._groups.get(name) or cached[name]
        prefill, decode = self._kernels(name, scheme, kernels)
        return GroupChoice(
            group=name,
            block=group.block,
            role=group.role,
            scheme=scheme,
            parameters=group.parameters if isinstance(group, Group) else 0,
            predicted_kl_nats=self.chosen.scored.predicted.get((name, scheme), 0.0),
            cost=self._unit(self.chosen.priced.costs[name, scheme]),
            prefill_kernel=prefill,
            decode_kernel=decode,
        )

    def _kernels(self, name: str, scheme: str, kernels: Kernels) -> tuple[str, str]:
        """What computes a group's products in prefill and in decode, by the times that it was priced with."""
        group = self._groups.get(name)
        if group is None or group.is_embedding:
            return "", ""
        prepared, context = self.chosen.prepared, self.chosen.prepared.context
        widths = context.target.products(scheme_named(scheme), prepared.widths[name])
        prefill, decode = (
            " and ".join(dict.fromkeys(kernels[scheme, width, group.k, m] for width in widths))
            for m in rows_of(group, context.settings.workload)
        )
        return prefill, decode


def _complete(chosen: Chosen, artefact: Artefact, proved: Proved, cost: CostResult) -> tuple[Path, ArtefactForm]:
    """Completes the cards of what was written with the verdict; where that lies which was judged, and what it is."""
    runtime = chosen.prepared.context.runtime
    finish(chosen, artefact.path, proved.judgement, cost, artefact.notes, proved.reused)
    if runtime is None or artefact.deployed is None:
        return artefact.path, artefact.form
    path, notes = deployed_path(chosen, runtime), artefact.deployed.notes
    card(chosen, path, runtime.form, proved.judgement, cost, notes, proved.reused)
    return path, runtime.form


def _reduction(speeds: Sequence[tuple[float, float]], work: Workload) -> float:
    """Share of the workload's time that was saved, by tokens per second before and after."""
    before, after = (
        work.prompt_tokens / prefill + (work.output_tokens / decode if work.output_tokens else 0.0)
        for prefill, decode in speeds
    )
    return 1.0 - after / before


def environment(context: Context) -> dict[str, str]:
    """Versions and machine, for the report."""
    return {
        "lowprec": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "device": context.target.device,
        "platform": platform.platform(),
    }
