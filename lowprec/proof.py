"""The second half of a run: writes the artefact, loads it back, judges it on held-out data, and times it end to end.

What the verdict is about is the artefact as transformers loads it, not the model that was scored. Models that have no
checkpoint format (a plain `nn.Module`, GPT-2's Conv1D layers) are judged from the solved files read back from disk.
"""

import contextlib
import dataclasses
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from lowprec.artifacts.card import model_card, write_card
from lowprec.artifacts.compressed_tensors import plan_artefact, write_artefact
from lowprec.artifacts.digests import write_digests
from lowprec.artifacts.loading import load_artefact, read_back
from lowprec.artifacts.probe import make_probe, save_probe
from lowprec.economics import dollars_per_million_output_tokens, price_of
from lowprec.errors import UnsupportedError
from lowprec.formats import QuantizedWeight, scheme_named
from lowprec.records import PrecisionPlan, Scheme, digest
from lowprec.results import (
    CheckedPair,
    CostResult,
    FrontierPoint,
    GroupChoice,
    LossResult,
    ParityResult,
    Report,
    SchemeShare,
)
from lowprec.run import BATCH_TOKENS, BF16, Run, peak_memory_bytes
from lowprec.runtime.convert import convert_
from lowprec.runtime.dispatch import KernelTable
from lowprec.runtime.linear import QuantLinear
from lowprec.steps.allocate import frontier
from lowprec.steps.cost import stored_bytes
from lowprec.steps.data import TokenSet
from lowprec.steps.judge import Judgement, Looked, judge
from lowprec.steps.measure import compare, mean_kl, run_through
from lowprec.steps.scores import PairedScores, PairedValues
from lowprec.steps.solve import STATIC_MAXIMUM, overlay_of
from lowprec.steps.stream import NOTHING, Overlay, Stream
from lowprec.targets.torch import measure_end_to_end
from lowprec.version import __version__

FRONTIER_BUDGETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1)
PARITY_TOKENS = 2_048
NOISE_TOKENS = 512
PROBE_WINDOWS, PROBE_TOKENS = 4, 64
LAYER_ROWS = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loaded:
    """The artefact as a runtime loaded it: a stream, and what has to be laid over it."""

    stream: Stream
    overlay: Overlay
    solved: Mapping[str, QuantizedWeight]
    path: Path
    notes: tuple[str, ...]


class Proof:
    """Export, parity, verdict and end-to-end cost of a planned run."""

    def __init__(self, run: Run, plan: PrecisionPlan, solved: Mapping[str, QuantizedWeight]) -> None:
        self.run, self.plan, self.solved = run, plan, solved
        self.schemes: dict[str, Scheme] = {name: scheme_named(s) for name, s in plan.groups}
        self.by_layer = {layer: self.schemes[g.name] for g in run.groups for layer in g.layers}
        self.scored = overlay_of(run.groups, self.schemes, solved, run.calibration)

    # Export

    def export(self) -> Loaded:
        """Writes the artefact and loads it back."""
        run, model = self.run, self.run.model
        with run.progress.step("export"):
            path = run.folder.path / "model"
            try:
                parts = self._parts()
                plan_artefact(**parts)
            except UnsupportedError as error:
                return self._own_form(str(error))
            written = write_artefact(
                path,
                **parts,
                tokenizer=model.tokenizer,
                generation_config=model.generation_config,
                finish=lambda folder: self._finish(folder, None, None, ()),
            )
            module, _ = load_artefact(path)
        stream = Stream(module, model.forward, run._example(), device=run.settings.calibration_device)
        return Loaded(
            stream=stream, overlay=NOTHING, solved=read_back(path), path=path, notes=written.runtime_notes
        )

    def _parts(self) -> dict[str, Any]:
        model = self.run.model
        if model.config is None or not getattr(model.config, "architectures", None):
            raise UnsupportedError(f"{model.name} has no transformers configuration with an architecture")
        return {
            "config": model.config,
            "tensors": model.tensors(),
            "solved": self.solved,
            "schemes": {layer: scheme for layer, scheme in self.by_layer.items() if scheme.weight is not None},
            "input_scales": {k: float(v) for k, v in self._input_scales().items()},
            "fused": [g.layers for g in self.run.groups if len(g.layers) > 1],
            "dtype": model.dtype,
        }

    def _input_scales(self) -> dict[str, Tensor]:
        amax = dict(self.run.calibration.amax)
        scales: dict[str, Tensor] = {}
        for group in self.run.groups:
            activation = self.schemes[group.name].activation
            if activation in STATIC_MAXIMUM:
                scale = torch.tensor(amax[group.name] / STATIC_MAXIMUM[activation]).bfloat16().float()
                scales |= dict.fromkeys(group.layers, scale)
        return scales

    def _own_form(self, reason: str) -> Loaded:
        """No checkpoint can hold this model: the solved files are the artefact, and are read back from disk."""
        run = self.run
        run.progress.note(f"no compressed-tensors checkpoint is written: {reason}")
        solved: dict[str, QuantizedWeight] = {}
        inputs = run.inputs | {"plan": digest(repr(self.plan.groups))}
        for group in run.groups:
            for compensated in ("yes", "no"):
                found = run.folder.read_solved(group.name, inputs | {"compensated": compensated})
                if found is not None:
                    solved |= found
        overlay = overlay_of(run.groups, self.schemes, solved, run.calibration)
        return Loaded(
            stream=run.stream, overlay=overlay, solved=solved, path=run.folder.path / "solved", notes=(reason,)
        )

    def _finish(
        self, folder: Path, judgement: Judgement | None, cost: CostResult | None, notes: Sequence[str]
    ) -> None:
        run = self.run
        if not (folder / "probe.safetensors").exists() and run.model.kind == "decoder":
            tokens = [ids[:PROBE_TOKENS] for ids in run.splits.tuning.ids if len(ids) >= PROBE_TOKENS][:PROBE_WINDOWS]
            if tokens:
                save_probe(folder, self._probe(torch.stack(tokens)))
        card = model_card(
            self.plan,
            verdict=judgement.verdict if judgement else None,
            loss=judgement.loss if judgement else None,
            cost=cost,
            schemes=self.shares(),
            notes=notes,
            decoder=run.model.kind == "decoder",
        )
        write_card(folder, card)
        write_digests(folder)

    def _probe(self, tokens: Tensor) -> Any:
        """A probe of the scored model, which streams like any other run."""
        run = self.run
        batch = TokenSet(
            ids=tuple(tokens), units=(0,) * len(tokens), sources=(0,) * len(tokens),
            documents=("",) * len(tokens), source_names=("",),
        ).batches(tokens.numel())  # fmt: skip
        scored = run_through(run.stream, batch, self.scored)

        class Scored(nn.Module):
            def forward(self, input_ids: Tensor, **_: Any) -> Any:
                with torch.no_grad(), run.stream.outer(scored.overlay):
                    return transformers.modeling_outputs.CausalLMOutput(
                        logits=run.stream.leave(scored.hidden[0], batch[0])
                    )

        return make_probe(Scored(), tokens)

    # Parity

    def parity(self, loaded: Loaded) -> ParityResult:
        """Codes bit for bit, layers within tolerance, and the KL between scored and loaded beside bfloat16's own."""
        run = self.run
        with run.progress.step("parity"):
            equal = set(loaded.solved) == set(self.solved) and all(
                _same(self.solved[layer], loaded.solved[layer]) for layer in self.solved
            )
            some = run.splits.tuning.subset(PARITY_TOKENS).batches(BATCH_TOKENS)
            scored = run_through(run.stream, some, self.scored)
            other = run_through(loaded.stream, some, loaded.overlay)
            kl = self._kl(scored, other, some)
            few = run.splits.tuning.subset(NOISE_TOKENS).batches(BATCH_TOKENS)
            noisy = Stream(run.model.module, run.model.forward, run._example(), dtype=torch.bfloat16)
            noise = self._kl(
                run_through(run.stream, few, self.scored), run_through(noisy, few, self.scored), few
            )
            worst = self._worst_layer(loaded)
        return ParityResult(codes_equal=equal, max_layer_error=worst, kl_nats=kl, noise_kl_nats=noise)

    def _kl(self, one: Any, other: Any, batches: Sequence[Any]) -> float:
        """KL of two runs that both carry overlays: each model's outputs are computed in its own right."""
        total = count = 0.0
        for position, batch in enumerate(batches):
            outputs = []
            for run in (one, other):
                with torch.no_grad(), run.stream.outer(run.overlay):
                    outputs.append(run.stream.leave(run.hidden[position], batch).float())
            table = self.run.metric.compare(outputs[0], outputs[1], batch)
            total, count = total + float(table[:, -1].sum()), count + float(table[:, 0].sum())
        return max(total, 0.0) / count

    def _worst_layer(self, loaded: Loaded) -> float:
        """Largest error of a runtime layer on identical inputs, as a share of its format's tolerance."""
        generator = torch.Generator().manual_seed(self.run.settings.seed)
        worst = 0.0
        with self._converted(loaded.solved) as module:
            for layer in module.modules():
                if isinstance(layer, QuantLinear) and layer.scheme.weight is not None:
                    x = torch.randn(LAYER_ROWS, layer.in_features, generator=generator)
                    worst = max(worst, layer.relative_error(x) / layer.tolerance)
        return worst

    @contextlib.contextmanager
    def _converted(self, solved: Mapping[str, QuantizedWeight] | None) -> Iterator[nn.Module]:
        """The model with our runtime's layers in place (all bfloat16 for None), put back afterwards."""
        run = self.run
        schemes = self.by_layer if solved is not None else dict.fromkeys(self.by_layer, BF16)
        originals = {layer: run.model.module.get_submodule(layer) for layer in schemes}
        table = KernelTable(run.samples)
        scales = self._input_scales() if solved is not None else {}
        try:
            yield convert_(
                run.model.module, solved or {}, schemes, kernels=table, activation_scales=scales
            )
        finally:
            for layer, original in originals.items():
                parent, _, child = layer.rpartition(".")
                setattr(run.model.module.get_submodule(parent), child, original)

    # Verdict

    def judge(self, loaded: Loaded) -> tuple[Judgement, bool]:
        """The verdict on the loaded artefact, and whether its data had been looked at for another plan before."""
        run = self.run
        looks, reused = self._unread()
        taken: list[Looked] = []
        with run.progress.step("judge", len(looks), "looks") as step:
            for number, data in enumerate(looks):
                taken.append(self._look(loaded, data))
                judgement = judge(
                    taken, run.settings.budget, data.source_names, planned_looks=2, seed=run.settings.seed
                )
                step.report(number + 1, len(looks))
                if not judgement.look_again:
                    break
        return judgement, reused

    def _unread(self) -> tuple[list[TokenSet], bool]:
        """Held-out sets that no other plan was judged on; all of them, marked reused, when there are none."""
        mine = self._identity()
        ledger: dict[str, str] = self.run.folder.read_step("looked", None) or {}
        fresh = [data for data in self.run.splits.held_out if ledger.get(data.digest, mine) == mine]
        return (fresh, False) if fresh else (list(self.run.splits.held_out), True)

    def _identity(self) -> str:
        return digest(repr(self.plan.groups), *self.run.inputs.values(), self.run.settings.budget.metric)

    def _look(self, loaded: Loaded, data: TokenSet) -> Looked:
        run = self.run
        inputs = {"plan": self._identity(), "data": data.digest}
        name = f"look-{data.digest}"
        batches = data.batches(BATCH_TOKENS)
        stored = run.folder.read_step(name, inputs)
        if stored is None:
            # Written before the data is seen, so that a run killed after the look cannot pass for unread.
            ledger: dict[str, str] = run.folder.read_step("looked", None) or {}
            ledger.setdefault(data.digest, self._identity())
            run.folder.write_step("looked", ledger, {})
            with run.progress.step("held-out", 2 * run.stream.depth, "blocks") as step:
                depth = run.stream.depth
                reference = run_through(run.stream, batches, progress=lambda d, _: step.report(d, 2 * depth))
                candidate = run_through(
                    loaded.stream, batches, loaded.overlay, lambda d, _: step.report(depth + d, 2 * depth)
                )
                table = compare(reference, [candidate], batches, run.metric.compare)[0]
            stored = table.tolist()
            run.folder.write_step(name, stored, inputs)
        return run.metric.looked(torch.tensor(stored, dtype=torch.float64), data, batches)

    # Cost end to end

    def cost(self, loaded: Loaded) -> CostResult:
        """Before and after: predicted by the sum over the layers, measured on the whole model where it runs here."""
        run, settings = self.run, self.run.settings
        before = sum(self._unit(run.costs[g.name, "bf16"].us, run.costs[g.name, "bf16"].bytes) for g in run.groups)
        after = sum(
            self._unit(run.costs[name, s].us, run.costs[name, s].bytes) for name, s in self.plan.groups
        )
        here = run.target.origin == "measured" and run.model.kind == "decoder"
        speeds = self._speeds(loaded) if here else ((None, None), (None, None))
        weight_before = sum(p.numel() * p.element_size() for p in run.model.module.parameters())
        weight_after = weight_before - round(sum(self._saved(name) for name, _ in self.plan.groups))
        measured = _reduction(speeds, settings.workload.prompt_tokens, settings.workload.output_tokens)
        if settings.objective == "bytes":
            measured = 1.0 - weight_after / weight_before
        bits = sum(8.0 * stored_bytes(run.by_name()[name], self.schemes[name]) for name, _ in self.plan.groups)
        units = {"time": "us", "bytes": "bytes", "dollars": "dollars per million output tokens"}
        return CostResult(
            workload=settings.workload,
            objective=settings.objective,
            unit=units[settings.objective],
            origin="measured" if settings.objective == "bytes" else run.target.origin,
            device=run.target.device,
            baseline="the same runtime, unquantised: every layer bfloat16 in its fastest form",
            before=before,
            after=after,
            reduction_predicted=1.0 - after / before,
            reduction_measured=measured,
            effective_bits=bits / sum(g.parameters for g in run.groups),
            weight_bytes_before=weight_before,
            weight_bytes_after=weight_after,
            prefill_tokens_per_s_before=speeds[0][0],
            decode_tokens_per_s_before=speeds[0][1],
            prefill_tokens_per_s_after=speeds[1][0],
            decode_tokens_per_s_after=speeds[1][1],
        )

    def _unit(self, us: float, size: float) -> float:
        settings = self.run.settings
        if settings.objective == "bytes":
            return size
        if settings.objective == "dollars":
            price = price_of(settings.device, settings.dollars_per_hour)
            return dollars_per_million_output_tokens(settings.workload, us, price)
        return us

    def _saved(self, group: str) -> float:
        """Bytes that quantising saves; negative for a tied head, whose codes come on top of the embedding."""
        costs = self.run.costs
        return costs[group, "bf16"].bytes - costs[group, self.schemes[group].name].bytes

    def _speeds(self, loaded: Loaded) -> tuple[tuple[float, float], tuple[float, float]]:
        run, work = self.run, self.run.settings.workload
        found = []
        with run.progress.step("end to end", 2, "models") as step:
            for done, solved in enumerate((None, loaded.solved)):
                with self._converted(solved) as module:
                    found.append(
                        measure_end_to_end(module, work.prompt_tokens, max(work.output_tokens, 1), work.batch)
                    )
                step.report(done + 1, 2)
        return found[0], found[1]

    # The report

    def shares(self) -> tuple[SchemeShare, ...]:
        """Groups and parameters of each scheme."""
        groups = self.run.by_name()
        names = sorted({s for _, s in self.plan.groups})
        return tuple(
            SchemeShare(
                scheme=name,
                groups=sum(s == name for _, s in self.plan.groups),
                parameters=sum(groups[g].parameters for g, s in self.plan.groups if s == name),
            )
            for name in names
        )

    def _frontier(self) -> tuple[FrontierPoint, ...]:
        run = self.run
        chosen = run.verified.chosen
        ratio = chosen.measured.loss / chosen.allocation.loss if chosen.allocation.loss > 0 else 0.8
        ratio = max(ratio, 0.1)
        points = []
        groups = run.by_name()
        scale = self._unit(1.0, 1.0)
        for budget in FRONTIER_BUDGETS:
            limit = run.metric._inner(budget) / ratio
            for mix in frontier([g.name for g in run.groups], run.options(), [limit]):
                schemes = [(groups[g], scheme_named(s)) for g, s in mix.schemes]
                size = sum(run.costs[g.name, s.name].bytes for g, s in schemes)
                bits = sum(8.0 * stored_bytes(g, s) for g, s in schemes) / sum(g.parameters for g, _ in schemes)
                points.append(
                    FrontierPoint(
                        budget=budget,
                        predicted_loss=run.metric.shown(mix.loss * ratio),
                        cost=mix.cost * scale,
                        effective_bits=bits,
                        bytes=round(size),
                    )
                )
        return tuple(points)

    def report(
        self,
        loaded: Loaded,
        parity: ParityResult,
        judgement: Judgement,
        reused: bool,
        cost: CostResult,
        pairs: Sequence[CheckedPair],
    ) -> Report:
        """Everything in one record."""
        run = self.run
        scale = self._unit(1.0, 1.0)
        if loaded.path.name == "model":
            self._finish(loaded.path, judgement, cost, loaded.notes)
        return Report(
            model=run.model.name,
            target=run.settings.target if run.settings.device in ("cpu", "cuda") else run.target.name,
            objective=run.settings.objective,
            effort=run.settings.effort.name,
            verdict=judgement.verdict,
            verdict_reason=judgement.reason,
            unread_data=not reused,
            reused=reused,
            plan=dataclasses.replace(self.plan, predicted_cost=self.plan.predicted_cost * scale),
            loss=judgement.loss,
            cost=cost,
            parity=parity,
            sensitivity=run.sensitivity_result(pairs),
            schemes=self.shares(),
            groups=tuple(
                GroupChoice(
                    group=g.name,
                    block=g.block,
                    role=g.role,
                    scheme=self.schemes[g.name].name,
                    parameters=g.parameters,
                    predicted_kl_nats=run.predicted.get((g.name, self.schemes[g.name].name), 0.0),
                    cost=self._unit(
                        run.costs[g.name, self.schemes[g.name].name].us,
                        run.costs[g.name, self.schemes[g.name].name].bytes,
                    ),
                )
                for g in run.groups
            ),
            unquantised=run.unquantised,
            struck_out=run.struck_out,
            frontier=self._frontier(),
            rounds=tuple(
                (run.metric.shown(r.predicted), run.metric.shown(r.measured.loss)) for r in run.verified.rounds
            ),
            environment=environment(run),
            seconds=run.progress.seconds,
            peak_memory_bytes=peak_memory_bytes(),
            artefact=str(loaded.path),
        )


def _reduction(speeds: Any, prompt: int, output: int) -> float | None:
    """Share of the workload's time that was saved, by tokens per second before and after."""
    if speeds[0][0] is None:
        return None
    before, after = (prompt / prefill + (output / decode if output else 0.0) for prefill, decode in speeds)
    return float(1.0 - after / before)


def _same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    return (
        one.format == other.format
        and torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
        and torch.equal(one.scale, other.scale)
    )


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


__all__ = ["Loaded", "LossResult", "PairedScores", "PairedValues", "Proof", "mean_kl"]
