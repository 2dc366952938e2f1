"""One set of weights of two levels for all groups that can switch, and what each level takes.

The lower level is the INT4 rounding of this run's own solver and effort, of every group that can have one, whatever the
plan chose: as a mix it is rounded, and the better of its roundings taken, as those of the plan are. The higher level is
fitted to it (`lowprec.steps.nest`). Both are written to nested/ and read back; a killed run goes on from what is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lowprec.artifacts.digests import FILE_NAME as DIGESTS
from lowprec.artifacts.digests import verify_digests
from lowprec.artifacts.nested import is_nested, read_nested, stored_digest, with_residual
from lowprec.formats import scheme_named
from lowprec.formats.nested import LEVEL_NAMES, NestedWeight
from lowprec.pipeline.artefact import finish, write
from lowprec.pipeline.choose import Chosen, solver_of
from lowprec.pipeline.mixes import Mixes, lower_level
from lowprec.records import CostSample, Group, digest
from lowprec.steps.memory import give_back_memory
from lowprec.steps.nest import nest
from lowprec.steps.scratch import Scratch
from lowprec.targets.passes import level_name, time_levels
from lowprec.version import __version__

FOLDER = "nested"
# A lone sequence and a full batch: what a group's level takes is the mean over both.
SLOTS = 8
ROWS = (1, SLOTS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Levels:
    """What rungs are made of.

    Attributes:
        lower: group -> scheme of its lower level; bf16 where it has none and stays as it is.
        path: the artefact of both planes.
        inputs: digests of what the planes depend on.
    """

    chosen: Chosen
    lower: Mapping[str, str]
    path: Path
    inputs: Mapping[str, str]

    @property
    def groups(self) -> tuple[Group, ...]:
        """Those that switch, as the model runs."""
        return tuple(group for group in self.chosen.prepared.groups if self.lower[group.name] != "bf16")

    def format_of(self, group: str) -> str:
        """The weight format of its lower level."""
        return str(scheme_named(self.lower[group]).weight)

    @property
    def is_written(self) -> bool:
        """Whether the artefact is there, whole."""
        return is_nested(self.path) and (self.path / DIGESTS).exists() and not verify_digests(self.path)

    @property
    def digest(self) -> str:
        """What a ladder names the artefact by."""
        return stored_digest(self.path)


def levels_of(chosen: Chosen) -> Levels:
    """What can switch in this run's model; nothing is computed."""
    prepared, settings = chosen.prepared, chosen.prepared.context.settings
    lower = lower_level(chosen.scored)
    inputs = {
        **prepared.inputs,
        "lower": digest(repr(sorted(lower.items()))),
        # Which rounding a mix gets hangs on both.
        "tuning": prepared.tuning.data.digest,
        "rounding": digest(repr(settings.effort), f"{settings.healing_passes:g}", prepared.metric_key),
    }
    return Levels(chosen=chosen, lower=lower, path=prepared.context.folder.path / FOLDER, inputs=inputs)


def planes(levels: Levels) -> dict[str, NestedWeight]:
    """Layer -> both planes, as they are read back from nested/; written unless it is there and of these inputs."""
    chosen, prepared, context = levels.chosen, levels.chosen.prepared, levels.chosen.prepared.context
    if levels.is_written and context.folder.read_step(FOLDER, levels.inputs) == levels.digest:
        context.progress.skip("nest", "done by an earlier run")
        return read_nested(levels.path)
    mixes = Mixes(chosen.scored)
    with context.progress.step("lower level"):
        solved = mixes.kept(levels.lower)
    groups, roundings = tuple(levels.lower.items()), mixes.roundings_of(levels.lower)
    plan = replace(chosen.plan, groups=groups, solver=solver_of(context.settings.effort, roundings))
    base = replace(chosen, plan=plan, merges=(), solved=solved)
    scratch = Scratch(context.folder.path / "work-nest", digest(*levels.inputs.values()))
    with context.progress.step("nest", prepared.stream.depth + 1, "blocks") as step:
        batches, outcome = prepared.statistics_batches, context.model.outcome
        made = nest(prepared.stream, prepared.groups, solved, batches, outcome, scratch, step.report)
    write(base, levels.path, with_residual(made, lambda folder: finish(base, folder, levels=True)))
    context.folder.write_step(FOLDER, levels.digest, levels.inputs)
    give_back_memory()
    return read_nested(levels.path)


def group_us(levels: Levels) -> dict[tuple[str, int], float]:
    """(group, level) -> microseconds of its layers' products, the mean over `ROWS`; measured here."""
    prepared, context = levels.chosen.prepared, levels.chosen.prepared.context
    shapes = sorted(
        {(levels.format_of(group.name), n, group.k) for group in levels.groups for n in prepared.widths[group.name]}
    )
    inputs = {
        "shapes": digest(repr(shapes), repr(ROWS)),
        "target": f"{context.target.name} on {context.target.device}",
        "version": __version__,
    }
    samples: tuple[CostSample, ...] | None = context.folder.read_step("levels", inputs, tuple[CostSample, ...])
    if samples is None:
        with context.progress.step("levels", len(shapes), "shapes") as step:
            found: list[CostSample] = []
            for done, (fmt, n, k) in enumerate(shapes):
                found += time_levels(fmt, n, k, ROWS)
                step.report(done + 1, len(shapes))
        samples = tuple(found)
        context.folder.write_step("levels", samples, inputs)
    us = {(s.scheme, s.n, s.k, s.m): s.p50_us for s in samples}

    def mean(group: Group, level: int) -> float:
        name = level_name(levels.format_of(group.name), level)
        return sum(us[name, n, group.k, m] for n in prepared.widths[group.name] for m in ROWS) / len(ROWS)

    return {(group.name, level): mean(group, level) for group in levels.groups for level in LEVEL_NAMES.values()}
