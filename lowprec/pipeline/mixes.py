"""Rounds mixes as well as the effort pays for, and measures each on tuning data.

A mix has up to three roundings: *plain*, as calibration rounded each group by itself; *compensated*
(`lowprec.steps.compensate`), with learned rounding where the effort says so; *healed* (`lowprec.steps.heal`), which
starts from the better of those. Plain is left out where compensation already loses less than plain is predicted to.
What is made is measured, and the one of the least upper bound stands for the mix, so it is never worse than what it
started from.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight, scheme_named
from lowprec.formats.nested import base_reason
from lowprec.pipeline.prepare import Prepared
from lowprec.pipeline.score import Scored
from lowprec.records import Group, Scheme, digest
from lowprec.steps.allocate import Allocation
from lowprec.steps.compensate import Compensation
from lowprec.steps.correction import Correction
from lowprec.steps.heal import Healing
from lowprec.steps.importance import Importance, output_gradients, token_importance
from lowprec.steps.judge import confidence_of
from lowprec.steps.learn import Learning
from lowprec.steps.measure import Run, compare, run_through
from lowprec.steps.metrics import tuning_loss
from lowprec.steps.pooling import pooled
from lowprec.steps.scratch import Scratch
from lowprec.steps.solve import overlay_of
from lowprec.steps.stream import NOTHING, Overlay
from lowprec.steps.tokens import portions_of
from lowprec.steps.verify import Measured, Round

PLAIN, COMPENSATED, HEALED = "plain", "compensated", "healed"
# How the files of a mix's groups end: group@(rounding)(digest of the mix); those of calibration end in a format.
OF_A_MIX = re.compile(rf"@(?:{HEALED})?([0-9a-f]{{16}})$")
# Of the KL that calibration's rounding predicts for weights of 4 bits, what is left after a mix was rounded as a whole:
# SmolLM2-135M, INT4 g64, on the text that it was calibrated on. The first measured mix replaces it.
LEFT_OF_KL = {PLAIN: 1.0, COMPENSATED: 0.5, HEALED: 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredMix:
    """What one mix lost on tuning data, in the better of its roundings; kept so that no mix is measured twice.

    `start` is what a healed one was healed from.
    """

    mix: str
    rounding: str
    measured: Measured
    start: str | None = None

    @property
    def roundings(self) -> tuple[str, ...]:
        """One on top of the other."""
        return tuple(name for name in (self.start, self.rounding) if name not in (None, PLAIN))


def lower_level(scored: Scored) -> dict[str, str]:
    """The mix that is the lower level of a ladder: group -> its INT4 scheme of least predicted loss, or bf16.

    bf16 stays what cannot be nested: groups that no INT4 in groups fits, and those that share codes with an embedding,
    whose rows are read at one precision.
    """
    predicted = scored.predicted

    def lower(group: Group) -> str:
        found = nestable(scored.prepared, group)
        return min(found, key=lambda s: (predicted[group.name, s], s)) if found else "bf16"

    return {group.name: lower(group) for group in scored.prepared.groups}


def nestable(prepared: Prepared, group: Group) -> list[str]:
    """The group's schemes that can be the lower level of nested weights."""
    if group.tables:
        return []
    found = [s for s in prepared.schemes[group.name] if s.activation is None and s.weight is not None]
    return [s.name for s in found if base_reason(str(s.weight)) is None]


class Tuning:
    """Measures mixes on tuning text; the reference runs once, when it is first needed."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._portions = portions_of(prepared.tuning.batches)

    @cached_property
    def _kept(self) -> Scratch:
        """What the reference makes of each portion: on disk, since on a small budget there is much text."""
        prepared = self._prepared
        key = digest(prepared.tuning.data.digest, *prepared.inputs.values())
        return Scratch(prepared.context.folder.path / "work-tuning", key)

    def clear(self) -> None:
        """Forgets what the reference made, until it is needed again."""
        self._kept.clear()

    def _reference(self, number: int) -> Run:
        stream, some = self._prepared.stream, self._portions[number]
        if (hidden := self._kept.load(str(number))) is not None:
            return Run(stream=stream, hidden=hidden, overlay=NOTHING)
        run = run_through(stream, some)
        self._kept.save(str(number), run.hidden)
        return run

    def measure(self, overlay: Overlay) -> Measured:
        """Loss, its upper bound, and KL of the model under `overlay`."""
        context, tuning = self._prepared.context, self._prepared.tuning
        metric, tables = context.metric, []
        for number, some in enumerate(self._portions):
            reference = self._reference(number)
            candidate = run_through(self._prepared.as_stored, some, overlay)
            tables += compare(reference, [candidate], some, metric.compare(tuning.data))
        table = torch.cat(tables)
        seed, looks = context.settings.seed, self._prepared.looks
        return tuning_loss(metric, table, tuning.data, tuning.batches, self._judged, seed, looks)

    def pooled(self, mixes: Sequence[Measured]) -> list[Measured]:
        """Mixes of one rounding with the bounds that they have by what all of them lost."""
        settings, budget = self._prepared.context.settings, self._prepared.context.metric.budget
        confidence = confidence_of(budget, self._prepared.looks)
        judged = self._judged / max(self._prepared.tuning.data.tokens, 1)
        return pooled(mixes, judged, confidence, settings.seed)

    @property
    def _judged(self) -> int:
        """Tokens that the judge may read."""
        return sum(held_out.tokens for held_out in self._prepared.held_out)


class Mixes:
    """Rounds and measures mixes, each once, also over runs that were cut."""

    def __init__(self, scored: Scored) -> None:
        self._scored, self._prepared = scored, scored.prepared
        self._tuning = Tuning(self._prepared)
        # Which rounding a mix is given depends on the effort, so what was measured does, too.
        prepared, settings = self._prepared, self._prepared.context.settings
        effort = settings.effort
        kinds = (effort.compensated, effort.weighted, effort.two_sided, effort.learning_steps)
        rounding = {"rounding": " ".join(map(str, kinds)) + f" {settings.healing_passes:g}"}
        self._inputs = {**prepared.inputs, **rounding, "tuning": prepared.tuning.data.digest}
        # What an earlier version did not write of a mix is not to be guessed.
        fields = " ".join(MeasuredMix.__dataclass_fields__)
        self._measured_inputs = {**self._inputs, "metric": prepared.metric_key, "fields": fields}
        folder = prepared.context.folder
        known = folder.read_step("measured", self._measured_inputs, tuple[MeasuredMix, ...]) or ()
        self._measured: dict[str, MeasuredMix] = {m.mix: m for m in known}

    def measure(self, allocation: Allocation) -> Measured:
        """What the mix loses on tuning data."""
        schemes = allocation.scheme_of()
        mix = _name_of(schemes)
        if mix not in self._measured:
            self._measured[mix] = self._better(schemes)
            self._prepared.context.folder.write_step("measured", tuple(self._measured.values()), self._measured_inputs)
        return self._measured[mix].measured

    def pooled(self, taken: Sequence[Round]) -> list[Round]:
        """The rounds with the bounds that they have by what all mixes of the same rounding lost."""
        mixes = [self._measured[_name_of(one.allocation.scheme_of())] for one in taken]
        bounded: dict[str, Measured] = {}
        for rounding in {mix.rounding for mix in mixes}:
            alike = [mix for mix in mixes if mix.rounding == rounding]
            together = self._tuning.pooled([mix.measured for mix in alike])
            bounded |= {mix.mix: measured for mix, measured in zip(alike, together, strict=True)}
        return [dataclasses.replace(one, measured=bounded[mix.mix]) for one, mix in zip(taken, mixes, strict=True)]

    @property
    def expected(self) -> str:
        """The rounding that a mix is expected to be best in."""
        settings = self._prepared.context.settings
        if settings.healing_passes:
            return HEALED
        return COMPENSATED if settings.effort.compensated else PLAIN

    @property
    def correction(self) -> Correction:
        """What a mix's rounding is expected to win over that of each group alone, as measured mixes say."""
        shared = {group.name for group in self._prepared.groups if group.tables}

        def improved(group: str, scheme: str) -> bool:
            weight = scheme_named(scheme).weight
            return group not in shared and weight is not None and WEIGHT_FORMATS[weight].bits < 8

        # Nothing but the prediction's own error separates plain mixes from it.
        never = self.expected == PLAIN
        return Correction(improved=(lambda *_: False) if never else improved, prior=LEFT_OF_KL[self.expected])

    def roundings_of(self, schemes: Mapping[str, str]) -> tuple[str, ...]:
        """In which of its roundings a mix was best, one on top of the other; none for plain, and for a mix that was
        never measured, as the reference is.
        """
        found = self._measured.get(_name_of(schemes))
        return found.roundings if found else ()

    def _chosen(self, schemes: Mapping[str, str]) -> dict[str, QuantizedWeight]:
        """The mix in the rounding that it was best in."""
        found = self._measured.get(_name_of(schemes))
        return self._rounded(schemes, found.rounding, found.start) if found else self._plain(schemes)

    def solved(
        self, schemes: Mapping[str, str], beside: Sequence[Mapping[str, str]] = ()
    ) -> dict[str, QuantizedWeight]:
        """Codes and scales of the mix, in its best rounding; forgets what only others needed than those `beside` it."""
        solved = self._chosen(schemes)
        folder = self._prepared.context.folder
        kept = {_name_of(self._of_weights(mix)) for mix in (schemes, *beside)}
        # Also those of earlier budgets, whose measurements on another text are not known any more.
        others = [name for name in folder.solved_names() if (found := OF_A_MIX.search(name)) and found[1] not in kept]
        folder.forget_solved(others)
        self._forget()
        return solved

    def kept(self, schemes: Mapping[str, str]) -> dict[str, QuantizedWeight]:
        """Codes and scales of the mix, in its best rounding, which is found now if need be; forgets nothing."""
        self.measure(Allocation(schemes=tuple(schemes.items()), loss=0.0, cost=0.0))
        solved = self._chosen(schemes)
        self._forget()
        return solved

    def _forget(self) -> None:
        """What is on disk for mixes that are still to come; who rounds one after all gathers it again."""
        self._outputs.clear()
        self.__dict__.pop("_importance", None)
        self._tuning.clear()

    def _better(self, schemes: Mapping[str, str]) -> MeasuredMix:
        """The best rounding that the effort pays for, gated on tuning data: never worse than what it started from."""
        settings = self._prepared.context.settings
        quantised = any(scheme_named(s).weight for s in schemes.values())
        found: list[MeasuredMix] = []
        if settings.effort.compensated and quantised:
            found.append(self._measure(schemes, COMPENSATED))
        predicted = sum(self._scored.predicted.get(choice, 0.0) for choice in schemes.items())
        if not found or found[0].measured.kl_nats >= predicted:
            found.append(self._measure(schemes, PLAIN))
        best = min(found, key=_bound)
        if settings.healing_passes and quantised:
            found.append(self._measure(schemes, HEALED, best.rounding))
        chosen = min(found, key=_bound)
        if chosen is not found[-1 if settings.healing_passes else 0]:
            self._prepared.context.progress.note(
                f"the {chosen.rounding} rounding loses least on tuning data and is kept"
            )
        return chosen

    def _measure(self, schemes: Mapping[str, str], rounding: str, start: str | None = None) -> MeasuredMix:
        prepared = self._prepared
        if rounding == PLAIN:
            overlay: Overlay = self._scored.overlay(schemes)
        else:
            solved = self._rounded(schemes, rounding, start)
            overlay = {
                **overlay_of(prepared.groups, _schemes(schemes), solved, self._scored.calibration),
                **prepared.caches.overlay(schemes),
            }
        measured = self._tuning.measure(overlay)
        return MeasuredMix(mix=_name_of(schemes), rounding=rounding, measured=measured, start=start)

    def _rounded(
        self, schemes: Mapping[str, str], rounding: str, start: str | None = None
    ) -> dict[str, QuantizedWeight]:
        if rounding == HEALED:
            assert start is not None
            return self._healed(schemes, start)
        return self._compensated(schemes) if rounding == COMPENSATED else self._plain(schemes)

    def _plain(self, schemes: Mapping[str, str]) -> dict[str, QuantizedWeight]:
        rounder, groups = self._prepared.rounder, self._prepared.groups
        named = _schemes(schemes)
        keys = {g.name: rounder.key_of(g.name, named[g.name]) for g in groups if named[g.name].weight}
        return {layer: rounder.rounded(layer, keys[g.name]) for g in groups if g.name in keys for layer in g.layers}

    def _compensated(self, schemes: Mapping[str, str]) -> dict[str, QuantizedWeight]:
        prepared, context = self._prepared, self._prepared.context
        mix = _name_of(self._of_weights(schemes))
        inputs = {**self._inputs, "mix": mix}
        compensation = Compensation(
            **self._fitted(schemes),
            rounder=prepared.rounder,
            folder=context.folder,
            inputs=inputs,
            name=mix,
        )
        if (known := compensation.known()) is not None:
            return known
        steps, seed = context.settings.effort.learning_steps, context.settings.seed
        learning = Learning(steps=steps, seed=seed) if steps else None
        compensation = dataclasses.replace(
            compensation, importance=self._importance, outputs=self._outputs_of, learning=learning
        )
        scratch = Scratch(context.folder.path / "work-solve", digest(*inputs.values()))
        with context.progress.step("compensate", prepared.stream.depth + 1, "blocks") as step:
            found = compensation.run(scratch, step.report)
        scratch.clear()
        return found

    @cached_property
    def _importance(self) -> Importance:
        """What calibration tokens weigh; what is known of outputs is kept. Both are the reference's, for all mixes."""
        prepared, context = self._prepared, self._prepared.context
        effort, seed = context.settings.effort, context.settings.seed
        if not (effort.weighted or effort.two_sided):
            return {}
        given = (prepared.stream, prepared.groups, prepared.statistics_batches, context.model.outcome)
        with context.progress.step("importance"):
            if effort.weighted:
                return token_importance(*given, seed, self._keep_outputs if effort.two_sided else None)
            output_gradients(*given, self._keep_outputs, seed)
        return {}

    @cached_property
    def _outputs(self) -> Scratch:
        """What is known of the groups' outputs: as large as the weights and larger, so it is kept on disk."""
        return Scratch(self._prepared.context.folder.path / "work-outputs", digest(*self._prepared.inputs.values()))

    def _keep_outputs(self, group: Group, products: Sequence[Tensor]) -> None:
        self._outputs.save(group.name, [product.to(torch.bfloat16) for product in products])

    def _outputs_of(self, group: Group) -> Sequence[Tensor]:
        return (self._outputs.load(group.name) or ()) if self._prepared.context.settings.effort.two_sided else ()

    def _healed(self, schemes: Mapping[str, str], start: str) -> dict[str, QuantizedWeight]:
        """Healed from `start`; read back where an earlier run has written it."""
        context, groups = self._prepared.context, self._prepared.groups
        mix = _name_of(self._of_weights(schemes))
        inputs = {**self._inputs, "mix": mix, "start": start}
        quantised = [g for g in groups if scheme_named(schemes[g.name]).weight]
        kept = [context.folder.read_solved(f"{g.name}@{HEALED}{mix}", inputs) for g in quantised]
        if all(found is not None for found in kept):
            return {layer: weight for found in kept for layer, weight in (found or {}).items()}
        with context.progress.step("heal", unit="steps") as step:
            passes, seed = context.settings.healing_passes, context.settings.seed
            healing = Healing(**self._fitted(schemes), passes=passes, seed=seed)
            healed = healing.run(self._rounded(schemes, start), step.report)
        for g in quantised:
            weights = {layer: healed[layer] for layer in g.layers}
            context.folder.write_solved(f"{g.name}@{HEALED}{mix}", weights, inputs)
        return healed

    def _of_weights(self, schemes: Mapping[str, str]) -> dict[str, str]:
        """Without the groups of the KV cache, which no rounding of weights looks at."""
        return {group.name: schemes[group.name] for group in self._prepared.groups}

    def _fitted(self, schemes: Mapping[str, str]) -> dict[str, Any]:
        """What compensating and healing both are given."""
        prepared = self._prepared
        return {
            "stream": prepared.stream,
            "groups": prepared.groups,
            "schemes": _schemes(schemes),
            "batches": prepared.statistics_batches,
            "outcome": prepared.context.model.outcome,
            "calibration": self._scored.calibration,
        }


def _schemes(names: Mapping[str, str]) -> dict[str, Scheme]:
    return {group: scheme_named(name) for group, name in names.items()}


def _bound(mix: MeasuredMix) -> float:
    return mix.measured.upper


def _name_of(schemes: Mapping[str, str]) -> str:
    return digest(repr(sorted(schemes.items())))
