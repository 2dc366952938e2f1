"""Sums a run up: cost before and after, the frontier, and the report."""

import dataclasses
import platform
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import transformers

from lowprec.economics import dollars_per_million_output_tokens, price_of
from lowprec.formats import scheme_named
from lowprec.proof import Artefact, Proof
from lowprec.records import Scheme, Workload
from lowprec.results import CheckedPair, CostResult, FrontierPoint, GroupChoice, ParityResult, Report
from lowprec.run import Run, peak_memory_bytes
from lowprec.steps.allocate import allocate
from lowprec.steps.cost import GroupCost, in_unit, stored_bytes
from lowprec.steps.judge import Judgement
from lowprec.steps.metrics import in_search_unit, shown
from lowprec.steps.verify import FIRST_RATIO
from lowprec.targets.torch import measure_end_to_end
from lowprec.version import __version__

FRONTIER_BUDGETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1)
NOT_ON_TUNING = "no mix was within the budget on tuning text, and this one came closest"
UNITS = {"time": "us", "bytes": "bytes", "dollars": "dollars per million output tokens"}


class Summary:
    """What a proved run comes to."""

    def __init__(self, proof: Proof) -> None:
        self.proof = proof
        self.run = proof.run
        self.groups = self.run.by_name()
        self.parameters = sum(g.parameters for g in self.run.groups)

    def cost(self, artefact: Artefact) -> CostResult:
        """Before and after: predicted by the sum over the layers, measured on the whole model where it runs here."""
        run, settings = self.run, self.run.settings
        before = self._fixed() + sum(self._unit(run.costs[g.name, "bf16"]) for g in run.groups)
        after = self._fixed() + sum(self._unit(run.costs[choice]) for choice in self.proof.plan.groups)
        here = run.target.origin == "measured" and run.model.kind == "decoder"
        speeds = self._speeds(artefact) if here else None
        bytes_before, bytes_after = self.proof.bytes_before(), artefact.weight_bytes
        measured = None if speeds is None else _reduction(speeds, settings.workload)
        if settings.objective == "bytes":
            measured = 1.0 - bytes_after / bytes_before
        (prefill_before, decode_before), (prefill_after, decode_after) = speeds or ((None, None), (None, None))
        return CostResult(
            workload=settings.workload,
            objective=settings.objective,
            unit=UNITS[settings.objective],
            origin="measured" if settings.objective == "bytes" else run.target.origin,
            device=run.target.device,
            baseline="the same runtime, unquantised: every layer bfloat16 in its fastest form",
            before=before,
            after=after,
            reduction_predicted=1.0 - after / before,
            reduction_measured=measured,
            effective_bits=self._bits(self.proof.schemes),
            weight_bytes_before=bytes_before,
            weight_bytes_after=bytes_after,
            prefill_tokens_per_s_before=prefill_before,
            decode_tokens_per_s_before=decode_before,
            prefill_tokens_per_s_after=prefill_after,
            decode_tokens_per_s_after=decode_after,
        )

    def _unit(self, cost: GroupCost) -> float:
        """The cost in the objective's own unit."""
        return in_unit(cost, self.run.settings.objective) * self._scale()

    def _fixed(self) -> float:
        """What no allocation changes: the bytes of embeddings and all else that is in no group."""
        if self.run.settings.objective != "bytes":
            return 0.0
        return self.proof.bytes_before() - sum(self.run.costs[g.name, "bf16"].bytes for g in self.run.groups)

    def _scale(self) -> float:
        """What one unit of the allocation's cost is in the report: dollars for a microsecond, else itself."""
        settings = self.run.settings
        if settings.objective != "dollars":
            return 1.0
        price = price_of(settings.device, settings.dollars_per_hour)
        return dollars_per_million_output_tokens(settings.workload, 1.0, price)

    def _bits(self, schemes: Mapping[str, Scheme]) -> float:
        """Stored bits per parameter of the linear layers, scales and head included."""
        total = sum(stored_bytes(self.groups[name], s, self.run.own_bytes) for name, s in schemes.items())
        return 8.0 * total / self.parameters

    def _speeds(self, artefact: Artefact) -> tuple[tuple[float, float], tuple[float, float]]:
        work = self.run.settings.workload
        found = []
        with self.run.progress.step("end to end", 2, "models") as step:
            for model in (self.proof.baseline(), self.proof.optimised(artefact.solved)):
                with model as module:
                    found.append(measure_end_to_end(module, work.prompt_tokens, max(work.output_tokens, 1), work.batch))
                step.report(len(found), 2)
        return found[0], found[1]

    def frontier(self) -> tuple[FrontierPoint, ...]:
        """The cheapest mix for each of some budgets, by the prediction as tuning data corrected it."""
        run = self.run
        chosen = run.verified.chosen
        known = chosen.allocation.loss > 0 and chosen.measured.loss > 0
        ratio = chosen.measured.loss / chosen.allocation.loss if known else FIRST_RATIO
        points = []
        for budget in FRONTIER_BUDGETS:
            limit = in_search_unit(run.metric.budget, budget) / ratio
            mix = allocate([g.name for g in run.groups], run.options(), limit)
            points.append(
                FrontierPoint(
                    budget=budget,
                    predicted_loss=shown(run.metric.budget, mix.loss * ratio),
                    cost=self._fixed() + mix.cost * self._scale(),
                    effective_bits=self._bits({name: scheme_named(s) for name, s in mix.schemes}),
                    bytes=self.proof.bytes_before() - round(sum(self.proof.saved(*choice) for choice in mix.schemes)),
                    scheme_shares=self._scheme_shares(mix.schemes),
                )
            )
        return tuple(points)

    def _scheme_shares(self, schemes: Sequence[tuple[str, str]]) -> tuple[tuple[str, float], ...]:
        """Scheme -> share of the linear layers' parameters."""
        shares: dict[str, float] = {}
        for name, scheme in schemes:
            shares[scheme] = shares.get(scheme, 0.0) + self.groups[name].parameters / self.parameters
        return tuple(sorted(shares.items()))

    def report(
        self,
        artefact: Artefact,
        parity: ParityResult,
        judgement: Judgement,
        reused: bool,
        cost: CostResult,
        pairs: Sequence[CheckedPair],
    ) -> Report:
        """Everything in one record; also completes the artefact's card with the verdict."""
        run, plan, metric = self.run, self.proof.plan, self.run.metric.budget
        if artefact.path.name == "model":
            self.proof.finish(artefact.path, judgement, cost, artefact.notes)
        return Report(
            model=run.model.name,
            target=run.settings.target if run.target.origin == "measured" else run.target.name,
            objective=run.settings.objective,
            effort=run.settings.effort.name,
            verdict=judgement.verdict,
            verdict_reason=judgement.reason if run.verified.accepted else f"{judgement.reason}; {NOT_ON_TUNING}",
            unread_data=not reused,
            reused=reused,
            plan=dataclasses.replace(plan, predicted_cost=self._fixed() + plan.predicted_cost * self._scale()),
            loss=judgement.loss,
            cost=cost,
            parity=parity,
            sensitivity=run.sensitivity_result(pairs),
            schemes=self.proof.shares(),
            groups=tuple(self._choice(*choice) for choice in plan.groups),
            unquantised=run.unquantised,
            struck_out=run.struck_out,
            frontier=self.frontier(),
            rounds=tuple((shown(metric, r.predicted), shown(metric, r.measured.loss)) for r in run.verified.rounds),
            environment=environment(run),
            seconds=run.progress.seconds,
            peak_memory_bytes=peak_memory_bytes(),
            artefact=str(artefact.path),
        )

    def _choice(self, name: str, scheme: str) -> GroupChoice:
        group = self.groups[name]
        return GroupChoice(
            group=name,
            block=group.block,
            role=group.role,
            scheme=scheme,
            parameters=group.parameters,
            predicted_kl_nats=self.run.predicted.get((name, scheme), 0.0),
            cost=self._unit(self.run.costs[name, scheme]),
        )


def _reduction(speeds: Sequence[tuple[float, float]], work: Workload) -> float:
    """Share of the workload's time that was saved, by tokens per second before and after."""
    before, after = (
        work.prompt_tokens / prefill + (work.output_tokens / decode if work.output_tokens else 0.0)
        for prefill, decode in speeds
    )
    return 1.0 - after / before


def environment(run: Run) -> dict[str, str]:
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
        "device": run.target.device,
        "platform": platform.platform(),
    }
