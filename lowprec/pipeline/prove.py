"""Stage 6: is what was loaded what was scored (parity), and does it hold the budget on unread text (verdict)?"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowprec.formats import QuantizedWeight, scheme_named
from lowprec.pipeline.artefact import Loaded, input_scales
from lowprec.pipeline.choose import Chosen
from lowprec.pipeline.prepare import example
from lowprec.records import Scheme, digest
from lowprec.results import ParityResult
from lowprec.runtime.convert import convert_
from lowprec.runtime.dispatch import KernelTable
from lowprec.runtime.linear import QuantLinear
from lowprec.steps.judge import Judgement, Looked, judge
from lowprec.steps.ledger import Ledger
from lowprec.steps.measure import Run, compare, run_through
from lowprec.steps.stream import Stream
from lowprec.steps.tokens import Batch, TokenSet, batched

PARITY_TOKENS = 1_024
NOISE_TOKENS = 256
LAYER_ROWS = 8
BF16 = scheme_named("bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved:
    """The verdict, and whether its text had been read before for another purpose."""

    parity: ParityResult
    judgement: Judgement
    reused: bool


def prove(chosen: Chosen, loaded: Loaded) -> Proved:
    """Parity and verdict of the loaded artefact; one that is not what was scored is never `within`."""
    parity = _parity(chosen, loaded)
    judgement, reused = _judge(chosen, loaded)
    return Proved(parity=parity, judgement=_held_back(judgement, parity), reused=reused)


def _held_back(judgement: Judgement, parity: ParityResult) -> Judgement:
    if parity.holds or judgement.verdict != "within":
        return judgement
    reason = f"what was loaded is not what was scored ({parity}); {judgement.reason}"
    return dataclasses.replace(judgement, verdict="inconclusive", reason=reason)


# Parity


def _parity(chosen: Chosen, loaded: Loaded) -> ParityResult:
    """Codes bit for bit, layers within tolerance, and the KL between scored and loaded beside bfloat16's own."""
    prepared = chosen.prepared
    context, stream, overlay = prepared.context, prepared.stream, chosen.overlay
    back = loaded.artefact.solved
    with context.progress.step("parity"):
        equal = set(back) == set(chosen.solved) and all(_same(chosen.solved[layer], back[layer]) for layer in back)
        some = prepared.splits.tuning.subset(PARITY_TOKENS).batches()
        scored = run_through(stream, some, overlay)
        kl = _kl(chosen, scored, run_through(loaded.stream, some), some)
        few = prepared.splits.tuning.subset(NOISE_TOKENS).batches()
        model = context.model
        noisy = Stream(model.module, model.forward, example(prepared.splits), stream.device, torch.bfloat16)
        noise = _kl(chosen, run_through(stream, few, overlay), run_through(noisy, few, overlay), few)
        worst = _worst_layer(chosen, back)
    return ParityResult(codes_equal=equal, max_layer_error=worst, kl_nats=kl, noise_kl_nats=noise)


def _kl(chosen: Chosen, one: Run, other: Run, batches: Sequence[Batch]) -> float:
    """KL of two runs that both carry overlays: each model's outputs are computed in its own right."""
    divergence = chosen.prepared.context.metric.divergence
    total = count = 0.0
    for position, batch in enumerate(batches):
        outputs = []
        for run in (one, other):
            with torch.no_grad(), run.stream.outer(run.overlay):
                outputs.append(run.stream.leave(run.hidden[position], batch).float())
        table = divergence(outputs[0], outputs[1], batch)
        total, count = total + float(table[:, -1].sum()), count + float(table[:, 0].sum())
    return max(total, 0.0) / count


def _worst_layer(chosen: Chosen, solved: Mapping[str, QuantizedWeight]) -> float:
    """Largest error of a runtime layer on identical inputs, as a share of its format's tolerance."""
    generator = torch.Generator().manual_seed(chosen.prepared.context.settings.seed)
    worst = 0.0
    quantised = {layer: s for layer, s in chosen.scheme_of_layer.items() if s.weight is not None}
    with _converted(chosen, solved, quantised) as module:
        for layer in module.modules():
            if isinstance(layer, QuantLinear):
                x = torch.randn(LAYER_ROWS, layer.in_features, generator=generator)
                worst = max(worst, layer.relative_error(x) / layer.tolerance)
    return worst


def _same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    return (
        one.format == other.format
        and torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
        and torch.equal(one.scale, other.scale)
    )


# The model in our runtime


def baseline(chosen: Chosen) -> contextlib.AbstractContextManager[nn.Module]:
    """The unquantised model, every layer in the runtime's fastest bfloat16 form; put back afterwards."""
    return _converted(chosen, {}, dict.fromkeys(chosen.scheme_of_layer, BF16))


def optimised(chosen: Chosen, solved: Mapping[str, QuantizedWeight]) -> contextlib.AbstractContextManager[nn.Module]:
    """The model with the plan's layers in our runtime; put back afterwards."""
    return _converted(chosen, solved, chosen.scheme_of_layer)


@contextlib.contextmanager
def _converted(
    chosen: Chosen, solved: Mapping[str, QuantizedWeight], schemes: Mapping[str, Scheme]
) -> Iterator[nn.Module]:
    module = chosen.prepared.context.model.module
    originals = {layer: module.get_submodule(layer) for layer in schemes}
    scales = {layer: scale for layer, scale in input_scales(chosen).items() if layer in solved}
    kernels = KernelTable(chosen.priced.samples)
    try:
        yield convert_(module, solved, schemes, kernels=kernels, activation_scales=scales)
    finally:
        for layer, original in originals.items():
            parent, _, child = layer.rpartition(".")
            setattr(module.get_submodule(parent), child, original)


# Verdict


def _judge(chosen: Chosen, loaded: Loaded) -> tuple[Judgement, bool]:
    """The verdict on the loaded artefact, and whether its text had been read before for another purpose."""
    prepared = chosen.prepared
    context = prepared.context
    looks, reused = _unread(chosen)
    taken: list[Looked] = []
    for data in looks:
        taken.append(_look(chosen, loaded, data))
        judgement = judge(
            taken,
            context.metric.budget,
            data.source_names,
            planned_looks=max(len(prepared.held_out), 1),
            seed=context.settings.seed,
        )
        if not judgement.look_again:
            break
    return judgement, reused


def _unread(chosen: Chosen) -> tuple[list[TokenSet], bool]:
    """Held-out sets no window of which was read for another purpose; all, marked reused, when there are none."""
    prepared = chosen.prepared
    ledger = Ledger(prepared.context.folder)
    ledger.note(prepared.splits.calibration, "decisions")
    ledger.note(prepared.tuning.data, "decisions")
    fresh = [data for data in prepared.held_out if ledger.unread(data, _purpose(chosen))]
    return (fresh, False) if fresh else (list(prepared.held_out), True)


def _purpose(chosen: Chosen) -> str:
    """What a look is for: this artefact, this budget."""
    prepared = chosen.prepared
    budget = prepared.context.metric.budget
    return digest(chosen.solved_inputs["codes"], repr(chosen.plan.groups), prepared.metric_key, repr(budget))


def _look(chosen: Chosen, loaded: Loaded, data: TokenSet) -> Looked:
    prepared, context = chosen.prepared, chosen.prepared.context
    codes = chosen.solved_inputs["codes"]
    inputs = {"artefact": codes, "metric": prepared.metric_key, "data": data.digest, **prepared.inputs}
    name, batches = f"look-{data.digest}", batched(data).batches
    stored: Any = context.folder.read_step(name, inputs)
    # Written before the data is seen, so that a run killed after the look cannot pass for unread.
    Ledger(context.folder).note(data, _purpose(chosen))
    if stored is None:
        depth = prepared.stream.depth
        with context.progress.step("judge", 2 * depth, "blocks") as step:
            reference = run_through(prepared.stream, batches, progress=lambda d, _: step.report(d, 2 * depth))
            candidate = run_through(loaded.stream, batches, progress=lambda d, _: step.report(depth + d, 2 * depth))
            stored = compare(reference, [candidate], batches, context.metric.compare(data))[0].tolist()
        context.folder.write_step(name, stored, inputs)
    return context.metric.looked(torch.tensor(stored, dtype=torch.float64), data, batches)
