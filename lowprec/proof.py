"""The second half of a run: writes the artefact, loads it back, judges it on held-out data, and times it end to end.

What the verdict is about is the artefact as transformers loads it, not the model that was scored. Models that have no
checkpoint format (a plain `nn.Module`, GPT-2's Conv1D layers) are judged from the solved files read back from disk.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lowprec.artifacts.card import model_card, write_card
from lowprec.artifacts.compressed_tensors import plan_artefact, write_artefact
from lowprec.artifacts.digests import write_digests
from lowprec.artifacts.loading import load_artefact, read_back
from lowprec.artifacts.probe import make_probe, save_probe
from lowprec.errors import UnsupportedError
from lowprec.formats import QuantizedWeight, scheme_named
from lowprec.records import PrecisionPlan, Scheme, digest
from lowprec.results import (
    CostResult,
    ParityResult,
    SchemeShare,
)
from lowprec.run import BATCH_TOKENS, BF16, Run
from lowprec.runtime.convert import convert_
from lowprec.runtime.dispatch import KernelTable
from lowprec.runtime.linear import QuantLinear
from lowprec.steps.data import Batch, TokenSet
from lowprec.steps.judge import Judgement, Looked, judge
from lowprec.steps.ledger import Ledger
from lowprec.steps.measure import compare, run_through
from lowprec.steps.solve import overlay_of
from lowprec.steps.stream import NOTHING, Overlay, Stream

PARITY_TOKENS = 1_024
NOISE_TOKENS = 256
PROBE_WINDOWS, PROBE_TOKENS = 4, 64
LAYER_ROWS = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Artefact:
    """What lies on disk: its place, its codes and scales as read back, its size, and runtimes' limits with it."""

    path: Path
    solved: Mapping[str, QuantizedWeight]
    weight_bytes: int
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loaded:
    """The artefact as a runtime loaded it: a stream, and what has to be laid over it."""

    artefact: Artefact
    stream: Stream
    overlay: Overlay


class _Scored(nn.Module):
    """The scored model as something that can be called with token ids."""

    def __init__(self, stream: Stream, overlay: Overlay) -> None:
        super().__init__()
        self.__dict__["_stream"], self.__dict__["_overlay"] = stream, overlay
        # Says which device token ids belong on.
        self.place = nn.Parameter(torch.empty(0, device=stream.device), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Any:
        """[W, T] token ids -> logits."""
        stream, overlay = self.__dict__["_stream"], self.__dict__["_overlay"]
        batch = Batch(ids=input_ids, lengths=torch.full((len(input_ids),), input_ids.shape[1]), index=(0,))
        done = run_through(stream, [batch], overlay)
        with stream.outer(overlay):
            return transformers.modeling_outputs.CausalLMOutput(logits=stream.leave(done.hidden[0], batch))


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
                finish=lambda folder: self.finish(folder, None, None, ()),
            )
            module, _ = load_artefact(path)
        stream = Stream(module, model.forward, run.example(), device=run.settings.calibration_device)
        artefact = Artefact(
            path=path, solved=read_back(path), weight_bytes=written.weight_bytes, notes=written.runtime_notes
        )
        return Loaded(artefact=artefact, stream=stream, overlay=NOTHING)

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
        scales: dict[str, Tensor] = {}
        for group in self.run.groups:
            scale = self.run.calibration.scale_of(group.name, self.schemes[group.name].activation)
            if scale is not None:
                scales |= dict.fromkeys(group.layers, scale)
        return scales

    def _own_form(self, reason: str) -> Loaded:
        """No checkpoint can hold this model: the solved files are the artefact, and are read back from disk."""
        run = self.run
        run.progress.note(f"no compressed-tensors checkpoint is written: {reason}")
        solved: dict[str, QuantizedWeight] = {}
        for group in run.groups:
            solved |= run.folder.read_solved(group.name, run.solved_inputs) or {}
        overlay = overlay_of(run.groups, self.schemes, solved, run.calibration)
        saved = round(sum(self.saved(*choice) for choice in self.plan.groups))
        artefact = Artefact(
            path=run.folder.path / "solved",
            solved=solved,
            weight_bytes=self.bytes_before() - saved,
            notes=(reason,),
        )
        return Loaded(artefact=artefact, stream=run.stream, overlay=overlay)

    def saved(self, group: str, scheme: str) -> float:
        """Bytes that `scheme` saves; negative for a tied head, whose codes come on top of the embedding."""
        return self.run.costs[group, "bf16"].bytes - self.run.costs[group, scheme].bytes

    def bytes_before(self) -> int:
        """Bytes of the model as it was loaded."""
        return sum(p.numel() * p.element_size() for p in self.run.model.module.parameters())

    def finish(self, folder: Path, judgement: Judgement | None, cost: CostResult | None, notes: Sequence[str]) -> None:
        run = self.run
        if not (folder / "probe.safetensors").exists() and run.model.kind == "decoder":
            tokens = [ids[:PROBE_TOKENS] for ids in run.splits.tuning.ids if len(ids) >= PROBE_TOKENS][:PROBE_WINDOWS]
            if tokens:
                save_probe(folder, make_probe(_Scored(run.stream, self.scored), torch.stack(tokens)))
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

    # Parity

    def parity(self, loaded: Loaded) -> ParityResult:
        """Codes bit for bit, layers within tolerance, and the KL between scored and loaded beside bfloat16's own."""
        run = self.run
        with run.progress.step("parity"):
            equal = set(loaded.artefact.solved) == set(self.solved) and all(
                _same(self.solved[layer], loaded.artefact.solved[layer]) for layer in self.solved
            )
            some = run.splits.tuning.subset(PARITY_TOKENS).batches(BATCH_TOKENS)
            scored = run_through(run.stream, some, self.scored)
            other = run_through(loaded.stream, some, loaded.overlay)
            kl = self._kl(scored, other, some)
            few = run.splits.tuning.subset(NOISE_TOKENS).batches(BATCH_TOKENS)
            noisy = Stream(run.model.module, run.model.forward, run.example(), run.stream.device, torch.bfloat16)
            noise = self._kl(run_through(run.stream, few, self.scored), run_through(noisy, few, self.scored), few)
            worst = self._worst_layer(loaded.artefact.solved)
        return ParityResult(codes_equal=equal, max_layer_error=worst, kl_nats=kl, noise_kl_nats=noise)

    def _kl(self, one: Any, other: Any, batches: Sequence[Any]) -> float:
        """KL of two runs that both carry overlays: each model's outputs are computed in its own right."""
        total = count = 0.0
        for position, batch in enumerate(batches):
            outputs = []
            for run in (one, other):
                with torch.no_grad(), run.stream.outer(run.overlay):
                    outputs.append(run.stream.leave(run.hidden[position], batch).float())
            table = self.run.metric.divergence(outputs[0], outputs[1], batch)
            total, count = total + float(table[:, -1].sum()), count + float(table[:, 0].sum())
        return max(total, 0.0) / count

    def _worst_layer(self, solved: Mapping[str, QuantizedWeight]) -> float:
        """Largest error of a runtime layer on identical inputs, as a share of its format's tolerance."""
        generator = torch.Generator().manual_seed(self.run.settings.seed)
        worst = 0.0
        quantised = {layer: scheme for layer, scheme in self.by_layer.items() if scheme.weight is not None}
        with self._converted(solved, quantised) as module:
            for layer in module.modules():
                if isinstance(layer, QuantLinear):
                    x = torch.randn(LAYER_ROWS, layer.in_features, generator=generator)
                    worst = max(worst, layer.relative_error(x) / layer.tolerance)
        return worst

    def baseline(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The unquantised model, every layer in the runtime's fastest bfloat16 form; put back afterwards."""
        return self._converted({}, dict.fromkeys(self.by_layer, BF16))

    def optimised(self, solved: Mapping[str, QuantizedWeight]) -> contextlib.AbstractContextManager[nn.Module]:
        """The model with the plan's layers in our runtime; put back afterwards."""
        return self._converted(solved, self.by_layer)

    @contextlib.contextmanager
    def _converted(self, solved: Mapping[str, QuantizedWeight], schemes: Mapping[str, Scheme]) -> Iterator[nn.Module]:
        module = self.run.model.module
        originals = {layer: module.get_submodule(layer) for layer in schemes}
        scales = {layer: scale for layer, scale in self._input_scales().items() if layer in solved}
        try:
            yield convert_(module, solved, schemes, kernels=KernelTable(self.run.samples), activation_scales=scales)
        finally:
            for layer, original in originals.items():
                parent, _, child = layer.rpartition(".")
                setattr(module.get_submodule(parent), child, original)

    # Verdict

    def judge(self, loaded: Loaded) -> tuple[Judgement, bool]:
        """The verdict on the loaded artefact, and whether its text had been read before for another purpose."""
        run = self.run
        looks, reused = self._unread()
        taken: list[Looked] = []
        for data in looks:
            taken.append(self._look(loaded, data))
            judgement = judge(
                taken,
                run.metric.budget,
                data.source_names,
                planned_looks=max(len(run.held_out), 1),
                seed=run.settings.seed,
            )
            if not judgement.look_again:
                break
        return judgement, reused

    def _unread(self) -> tuple[list[TokenSet], bool]:
        """Held-out sets no window of which was read for another purpose; all, marked reused, when there are none."""
        ledger = Ledger(self.run.folder)
        ledger.note(self.run.splits.calibration, "decisions")
        ledger.note(self.run.tuning, "decisions")
        fresh = [data for data in self.run.held_out if ledger.unread(data, self._purpose())]
        return (fresh, False) if fresh else (list(self.run.held_out), True)

    def _purpose(self) -> str:
        """What a look is for: this artefact, this budget."""
        run = self.run
        return digest(run.solved_inputs["codes"], repr(self.plan.groups), run.metric_key, repr(run.metric.budget))

    def _look(self, loaded: Loaded, data: TokenSet) -> Looked:
        run = self.run
        inputs = {"artefact": run.solved_inputs["codes"], "metric": run.metric_key, "data": data.digest, **run.inputs}
        name = f"look-{data.digest}"
        batches = data.batches(BATCH_TOKENS)
        stored = run.folder.read_step(name, inputs)
        # Written before the data is seen, so that a run killed after the look cannot pass for unread.
        Ledger(run.folder).note(data, self._purpose())
        if stored is None:
            with run.progress.step("judge", 2 * run.stream.depth, "blocks") as step:
                depth = run.stream.depth
                reference = run_through(run.stream, batches, progress=lambda d, _: step.report(d, 2 * depth))
                candidate = run_through(
                    loaded.stream, batches, loaded.overlay, lambda d, _: step.report(depth + d, 2 * depth)
                )
                table = compare(reference, [candidate], batches, run.metric.compare(data))[0]
            stored = table.tolist()
            run.folder.write_step(name, stored, inputs)
        return run.metric.looked(torch.tensor(stored, dtype=torch.float64), data, batches)

    # For the card and the report

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


def _same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    return (
        one.format == other.format
        and torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
        and torch.equal(one.scale, other.scale)
    )
