"""Stage 2: calibrates, rounds every group in every format, and scores every (group, scheme) in nats."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lowprec.formats import scheme_named
from lowprec.pipeline.prepare import Prepared
from lowprec.records import Budget, SensitivityRow, digest
from lowprec.results import CheckedPair
from lowprec.steps.calibrate import Calibration, calibrate
from lowprec.steps.check import choose_pairs
from lowprec.steps.measure import measure_pairs
from lowprec.steps.scratch import Scratch
from lowprec.steps.sensitivity import effects, rows_of
from lowprec.steps.stream import Overlay
from lowprec.steps.tokens import batched


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """What every (group, scheme) is predicted to lose.

    Attributes:
        calibration: activation ranges, for static scales.
        rows: the table of sensitivity.json.
    """

    prepared: Prepared
    calibration: Calibration
    rows: tuple[SensitivityRow, ...]

    @property
    def predicted(self) -> dict[tuple[str, str], float]:
        """(group, scheme) -> KL in nats per event."""
        return {(row.group, row.scheme): row.predicted_kl_nats for row in self.rows}

    def overlay(self, schemes: Mapping[str, str]) -> Overlay:
        """What the model computes with in a mix (group -> scheme; groups left out stay as they are)."""
        prepared = self.prepared
        named = {name: scheme_named(schemes.get(name, "bf16")) for name in prepared.names}
        return {**prepared.rounder.overlay(named, self.calibration), **prepared.caches.overlay(schemes)}

    def with_budget(self, budget: Budget | str | float) -> "Scored":
        """The same scores, to choose a mix for another limit from ("2%", 0.02 or a `Budget` of the same metric).

        Raises:
            ConfigError: a budget of another metric or confidence.
        """
        context = self.prepared.context.with_budget(budget)
        return replace(self, prepared=replace(self.prepared, context=context))


def score(prepared: Prepared) -> Scored:
    """Calibrates and scores, as far as the folder does not have it already.

    Raises:
        ModelError: NaN or infinite activations; names the layer and the text.
    """
    folder, inputs = prepared.context.folder, prepared.inputs
    calibration: Calibration | None = folder.read_step("calibration", inputs, Calibration)
    rows: tuple[SensitivityRow, ...] | None = folder.read_step("sensitivity", inputs, tuple[SensitivityRow, ...])
    scratch = Scratch(folder.path / "work", digest(*inputs.values()))
    if calibration is None or (rows is None and not scratch.note("forward")):
        calibration = _calibrate(prepared, scratch)
    else:
        prepared.context.progress.skip("calibrate", "done by an earlier run")
    if rows is None:
        rows = _sensitivity(prepared, calibration, scratch)
    else:
        prepared.context.progress.skip("sensitivity", "done by an earlier run")
    scratch.clear()
    return Scored(prepared=prepared, calibration=calibration, rows=rows)


def _calibrate(prepared: Prepared, scratch: Scratch) -> Calibration:
    context, stream = prepared.context, prepared.stream
    formats = {g: sorted({prepared.rounder.key_of(g, s) for s in found}) for g, found in prepared.schemes.items()}
    with context.progress.step("calibrate", stream.depth + 1, "blocks") as step:
        found = calibrate(
            stream,
            prepared.groups,
            prepared.calibration_batches,
            context.model.outcome,
            lambda gathered: prepared.rounder.solve_and_keep(gathered, formats),
            scratch,
            probing=len(prepared.probed.batches),
            progress=step.report,
            describe=prepared.documents_of,
        )
        found = replace(found, smoothed=prepared.smoothed)
    context.folder.write_step("calibration", found, prepared.inputs)
    return found


def _sensitivity(prepared: Prepared, calibration: Calibration, scratch: Scratch) -> tuple[SensitivityRow, ...]:
    context, stream = prepared.context, prepared.stream
    with context.progress.step("sensitivity", stream.depth, "blocks") as step:
        found = effects(
            stream,
            prepared.groups,
            prepared.schemes,
            prepared.probed.batches,
            context.model.outcome,
            prepared.rounder.errors,
            calibration,
            scratch,
            context.settings.seed,
            step.report,
            prepared.caches,
        )
    rows = rows_of(found, prepared.groups, prepared.schemes, prepared.rounder.solver_of, prepared.caches)
    context.folder.write_step("sensitivity", rows, prepared.inputs)
    return rows


def check(scored: Scored) -> tuple[CheckedPair, ...]:
    """Measures some (group, scheme) pairs directly, on tuning data, the same number in each scheme.

    sensitivity.json has what was found beside the predictions.
    """
    pairs = _checked(scored)
    measured = {(pair.group, pair.scheme): pair.measured_kl_nats for pair in pairs}
    rows = tuple(replace(row, measured_kl_nats=measured.get((row.group, row.scheme))) for row in scored.rows)
    if rows != scored.rows:
        scored.prepared.context.folder.write_step("sensitivity", rows, scored.prepared.inputs)
    return pairs


def _checked(scored: Scored) -> tuple[CheckedPair, ...]:
    prepared, predicted = scored.prepared, scored.predicted
    context, effort = prepared.context, prepared.context.settings.effort
    some = batched(prepared.splits.tuning.subset(effort.checked_tokens))
    inputs = {**prepared.inputs, "tuning": some.data.digest}
    stored: tuple[CheckedPair, ...] | None = context.folder.read_step("check", inputs, tuple[CheckedPair, ...])
    if stored is not None:
        context.progress.skip("check", "done by an earlier run")
        return stored
    chosen = choose_pairs(list(predicted), effort.checked_pairs, context.settings.seed)
    overlays = {(group, scheme): scored.overlay({group: scheme}) for group, scheme in chosen}
    with context.progress.step("check", prepared.stream.depth, "blocks") as step:
        measured = measure_pairs(prepared.stream, some.batches, overlays, context.metric.divergence, step.report)
    pairs = tuple(
        CheckedPair(
            group=group,
            scheme=scheme,
            predicted_kl_nats=predicted[group, scheme],
            measured_kl_nats=measured[group, scheme],
        )
        for group, scheme in overlays
    )
    context.folder.write_step("check", pairs, inputs)
    return pairs
