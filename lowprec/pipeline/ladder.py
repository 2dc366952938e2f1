"""After the plan, where it is asked for: the rungs between which one set of weights of two levels switches.

nested/ in the run's folder has the weights (`lowprec.pipeline.levels`), `ladder.json` beside the plan the rungs:

    mixes    from predicted loss and measured microseconds of the nested kernels (`lowprec.steps.ladder`)
    losses   each rung's KL on tuning text with bounds of its own, from the codes as they were read back
    parity   each rung as it was loaded from the folder is what was scored, to twice the noise of bfloat16
    times    whole passes of what was loaded, at every rung

Losses are kept one by one, so that a killed run goes on.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowprec.artifacts.nested import load_nested, stored_bits_per_weight
from lowprec.artifacts.own_form import is_whole
from lowprec.errors import ModelError, UnsupportedError
from lowprec.formats import WEIGHT_FORMATS
from lowprec.formats.nested import LEVEL_NAMES, NestedWeight
from lowprec.ladder import Ladder, Rung
from lowprec.pipeline.choose import Chosen
from lowprec.pipeline.context import Context
from lowprec.pipeline.levels import ROWS, SLOTS, Levels, group_us, levels_of, planes
from lowprec.pipeline.mixes import nestable
from lowprec.pipeline.parity import forwarded, kl_between, outputs_of
from lowprec.pipeline.prepare import Prepared, example
from lowprec.records import Group, digest
from lowprec.results import LadderResult, RungResult
from lowprec.settings import Settings
from lowprec.steps.allocate import Allocation
from lowprec.steps.judge import Bounds, ratio_bounds
from lowprec.steps.ladder import climb, level_options, names, steps_only
from lowprec.steps.linear import weight_of
from lowprec.steps.measure import Run, compare, compare_tokens, paired, run_through
from lowprec.steps.memory import give_back_memory
from lowprec.steps.scores import unit_sums
from lowprec.steps.stream import Overlay, Override, Stream
from lowprec.steps.tokens import Batched, batched
from lowprec.targets.passes import Times, measure_passes
from lowprec_kernels.cpu_nested import few_rows_form

NAME = "ladder"
RUNGS = 7
BATCHES, PROMPTS, CONTEXT, REPEATS = (1, 2, 4, SLOTS, 2 * SLOTS), (16, 64, 256, 512), 128, 15
PARITY_TOKENS, LARGEST_KL = 512, 2.0
SWITCHING = "torch"


@dataclass(frozen=True, slots=True, kw_only=True)
class RungLoss:
    """What a vector of levels lost on tuning text."""

    vector: str
    bounds: Bounds


def require_switchable(settings: Settings) -> None:
    """Refuses a ladder for a runtime whose models have one precision, before anything is measured.

    Raises:
        UnsupportedError: with the reason and the remedy.
    """
    if not settings.ladder:
        return
    if settings.target != SWITCHING:
        raise UnsupportedError(
            f"target {settings.target} cannot switch its precision",
            ("the files that it loads hold one; give --target torch for a ladder, or leave --ladder out",),
        )
    if settings.device != "cpu":
        raise UnsupportedError(
            f"no ladder can be made for device {settings.device!r}",
            ("its rungs are times that this version measures on this machine's CPU alone: give --device cpu",),
        )


def require_tokens(context: Context) -> None:
    """Refuses a ladder of a model that has no tokens to switch between.

    Raises:
        UnsupportedError: an encoder, or layers for a module of the user's.
    """
    model = context.model
    if context.settings.ladder and not (model.kind == "decoder" and is_whole(model.module)):
        raise UnsupportedError(
            f"{model.name} cannot have a ladder", ("only causal models of transformers make a token a pass",)
        )


def require_levels(prepared: Prepared) -> None:
    """Refuses a ladder where no group can switch, before anything is calibrated.

    Raises:
        UnsupportedError: no group has a scheme that weights can be nested on.
    """
    wanted = prepared.context.settings.ladder
    if wanted and not any(nestable(prepared, group) for group in prepared.groups):
        raise UnsupportedError(
            f"{prepared.context.model.name} has no group that could switch",
            ("a ladder is built on INT4 in groups without rounded inputs (w4a16): let --schemes include int4",),
        )


def ladder(chosen: Chosen) -> Ladder:
    """The rungs of the run's model; writes nested/ and ladder.json, as far as the folder does not have them.

    Raises:
        UnsupportedError: no rung below the top is a step on this machine.
        ModelError: a rung that was loaded is not what was scored.
    """
    context, levels = chosen.prepared.context, levels_of(chosen)
    inputs = {
        **levels.inputs,
        "confidence": f"{context.metric.budget.confidence:g}",
        "target": f"{context.target.name} on {context.target.device}",
        "torch": torch.__version__,
        "rungs": f"{RUNGS} {ROWS} {BATCHES} {PROMPTS} {CONTEXT} {REPEATS}",
    }
    known: Ladder | None = context.folder.read_step(NAME, inputs, Ladder)
    if known is not None and levels.is_written and levels.digest == known.model_digest:
        context.progress.skip(NAME, "made by an earlier run")
        return known
    nested = planes(levels)
    mixes = _mixes(levels, nested)
    overlays = [_overlay(levels.groups, nested, mix) for mix in mixes]
    losses = _losses(levels, mixes, overlays)
    times, parity = _passes(levels, mixes, overlays)
    made = _record(levels, mixes, losses, times, parity)
    context.folder.write_step(NAME, made, inputs)
    return made


def _mixes(levels: Levels, nested: Mapping[str, NestedWeight]) -> list[Allocation]:
    scored, stream = levels.chosen.scored, levels.chosen.prepared.stream
    predicted = {group.name: scored.predicted[group.name, levels.lower[group.name]] for group in levels.groups}

    def weight(layer: str) -> torch.Tensor:
        return weight_of(stream.weighted[layer]).float()

    options = level_options(levels.groups, predicted, weight, nested, group_us(levels))
    return climb([group.name for group in levels.groups], options, RUNGS)


def _overlay(groups: Sequence[Group], nested: Mapping[str, NestedWeight], mix: Allocation) -> Overlay:
    """What the model computes with at a rung."""
    level = {group: LEVEL_NAMES[name] for group, name in mix.schemes}
    return {
        layer: Override(weight=functools.partial(nested[layer].dequantize, level[group.name]))
        for group in groups
        for layer in group.layers
    }


def _losses(levels: Levels, mixes: Sequence[Allocation], overlays: Sequence[Overlay]) -> list[Bounds]:
    """KL of each mix from the model on tuning text, by the bounds that verdicts are taken with."""
    prepared, context = levels.chosen.prepared, levels.chosen.prepared.context
    tuning = batched(prepared.splits.tuning)
    inputs = {
        "nested": levels.digest,
        "tuning": tuning.data.digest,
        "confidence": f"{context.metric.budget.confidence:g}",
        "seed": str(context.settings.seed),
    }
    stored: tuple[RungLoss, ...] = context.folder.read_step("rungs", inputs, tuple[RungLoss, ...]) or ()
    known = {loss.vector: loss for loss in stored}
    vectors = [digest(repr(mix.schemes)) for mix in mixes]
    missing = {vector: overlay for vector, overlay in zip(vectors, overlays, strict=True) if vector not in known}
    if missing:
        with context.progress.step("rungs", len(missing) + 1, "passes") as step:
            reference = run_through(prepared.stream, tuning.batches)
            step.advance()
            for vector, overlay in missing.items():
                known[vector] = RungLoss(vector=vector, bounds=_loss(levels, reference, overlay, tuning))
                context.folder.write_step("rungs", tuple(known.values()), inputs)
                step.advance()
    return [known[vector].bounds for vector in vectors]


def _loss(levels: Levels, reference: Run, overlay: Overlay, tuning: Batched) -> Bounds:
    prepared, context = levels.chosen.prepared, levels.chosen.prepared.context
    candidate = run_through(prepared.as_stored, tuning.batches, overlay)
    table = compare(reference, [candidate], tuning.batches, compare_tokens)[0]
    sums = unit_sums(paired(table, tuning.data, tuning.batches))
    confidence = context.metric.budget.confidence
    return ratio_bounds(np.array(sums.kl), np.array(sums.tokens), confidence, seed=context.settings.seed)


def _passes(
    levels: Levels, mixes: Sequence[Allocation], overlays: Sequence[Overlay]
) -> tuple[list[Times], tuple[float, float]]:
    """Times of every rung of the model as it is loaded, and its parity (`_parity`)."""
    context = levels.chosen.prepared.context
    rungs = [{group: LEVEL_NAMES[level] for group, level in mix.schemes} for mix in mixes]
    layers = {group.name: group.layers for group in levels.groups}
    model, _, switch = load_nested(levels.path, context.model.dtype, groups=layers, rungs=rungs)
    with context.progress.step("passes", len(BATCHES) + len(PROMPTS), "sizes") as step:
        found = []
        for rung, overlay in enumerate(overlays):
            switch.set(rung)
            found.append(_parity(levels, model, mixes[rung], overlay))
        times = measure_passes(
            model, switch.set, len(rungs), batches=BATCHES, prompts=PROMPTS, context=CONTEXT, repeats=REPEATS,
            clock=_clock(), progress=step.report,
        )  # fmt: skip
    # Models of transformers refer to themselves, so they stay until they are collected.
    del model
    give_back_memory()
    return times, max(found)


def _clock() -> Callable[[], float]:
    """Processor seconds, which stand still while others run, where one thread computes; else seconds."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _parity(levels: Levels, module: Any, mix: Allocation, overlay: Overlay) -> tuple[float, float]:
    """(KL of the loaded rung from the scored one over that of computing it in bfloat16, the latter in nats).

    Raises:
        ModelError: it is further from what was scored than twice the noise.
    """
    prepared, context = levels.chosen.prepared, levels.chosen.prepared.context
    few, stream = prepared.splits.tuning.subset(PARITY_TOKENS).batches(), prepared.as_stored
    noisy = Stream(stream.module, context.model.forward, example(prepared.splits), stream.device, torch.bfloat16)
    expected = list(outputs_of(run_through(stream, few, overlay), few))
    noise = kl_between(context, few, expected, outputs_of(run_through(noisy, few, overlay), few))
    found = kl_between(context, few, expected, forwarded(context, module, few))
    if found > LARGEST_KL * noise:
        low = sum(LEVEL_NAMES[level] == min(LEVEL_NAMES.values()) for _, level in mix.schemes)
        raise ModelError(
            f"nested weights with {low} groups at the lower level are {found:.3g} nats from what was scored once they "
            f"are loaded, where bfloat16 alone makes {noise:.3g}: what runs would not lose what the rung says"
        )
    return found / noise if noise else 0.0, noise


def _record(
    levels: Levels,
    mixes: Sequence[Allocation],
    losses: Sequence[Bounds],
    times: Sequence[Times],
    parity: tuple[float, float],
) -> Ladder:
    """The rungs that are steps by what was measured."""
    prepared, context = levels.chosen.prepared, levels.chosen.prepared.context
    called = names(mixes, {group.name: group.parameters for group in levels.groups})
    made = [
        Rung(
            name=name,
            levels=mix.schemes,
            loss_nats=max(0.0, bounds.estimate),
            loss_lower=max(0.0, bounds.lower),
            loss_upper=max(0.0, bounds.upper),
            loss_origin="measured",
            **taken,
        )
        for name, mix, bounds, taken in zip(called, mixes, losses, times, strict=True)
    ]
    rungs, left = steps_only(made)
    reasons = tuple(f"{name}: {why}" for name, why in left)
    if len(rungs) < 2:
        raise UnsupportedError(f"{context.model.name} has no rung below its top on this machine", reasons)
    for reason in reasons:
        context.progress.note(f"no rung of the ladder: {reason}")
    tokens = prepared.splits.tuning.tokens
    return Ladder(
        model=context.model.name,
        model_digest=levels.digest,
        device=context.target.device,
        levels=tuple(LEVEL_NAMES),
        context_tokens=CONTEXT,
        loss_tokens=tokens,
        confidence=context.metric.budget.confidence,
        rungs=tuple(rungs),
        notes=_notes(levels, parity),
        layers=tuple((group.name, group.layers) for group in levels.groups),
    )


def _notes(levels: Levels, parity: tuple[float, float]) -> tuple[tuple[str, str], ...]:
    formats = {WEIGHT_FORMATS[levels.format_of(group.name)] for group in levels.groups}
    forms = sorted({few_rows_form(fmt.group_size or 0) for fmt in formats})
    threads = torch.get_num_threads()
    clock = "processor time of one thread" if threads == 1 else f"{threads} threads"
    notes = [
        ("times", f"whole passes, {clock}, few rows by {', '.join(forms)}; prompts are read at the top"),
        ("losses", "KL from the model on tuning text, which the plan's mixes were chosen on, too"),
        ("parity", f"KL of loaded rungs from those scored is at most {parity[0]:.2f} of bfloat16's own noise"),
    ]
    if fixed := [group for group, scheme in levels.lower.items() if scheme == "bf16"]:
        notes.append(("one precision", f"on every rung bf16: {', '.join(fixed)}"))
    return tuple(notes)


def summary(chosen: Chosen, made: Ladder) -> LadderResult:
    """What the report shows of a ladder."""
    levels = levels_of(chosen)
    parameters = {group.name: group.parameters for group in levels.groups}
    rungs = []
    for rung in made.rungs:
        low = [group for group, level in rung.levels if level == made.levels[0]]
        rungs.append(
            RungResult(
                name=rung.name,
                low_groups=len(low),
                low_share=sum(parameters[group] for group in low) / sum(parameters.values()),
                loss_nats=rung.loss_nats,
                loss_lower=rung.loss_lower,
                loss_upper=rung.loss_upper,
                alone_us=rung.pass_us("decode", 1),
                full_us=rung.pass_us("decode", SLOTS),
            )
        )
    return LadderResult(
        path=str(chosen.prepared.context.folder.path / f"{NAME}.json"),
        artefact=str(levels.path),
        model_digest=made.model_digest,
        groups=len(parameters),
        bits_per_weight=stored_bits_per_weight(levels.path),
        slots=SLOTS,
        tokens=made.loss_tokens,
        confidence=made.confidence,
        rungs=tuple(rungs),
        notes=made.notes,
    )
