"""Stage 1: splits the text, cuts the model into blocks, finds the groups, strikes out what the target cannot run."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from lowprec.artifacts.own_form import is_whole
from lowprec.errors import ConfigError, DataError, UnsupportedError
from lowprec.formats import CACHE_FORMATS, scheme_named, schemes_named
from lowprec.pipeline.context import Context
from lowprec.records import Group, Scheme, digest
from lowprec.results import StruckOut, Unquantised
from lowprec.settings import Effort
from lowprec.steps.caches import NO_CACHES, REMEDY, Caches, find_caches, ranges, scales_of
from lowprec.steps.cost import candidates
from lowprec.steps.data import Splits, SplitSizes, split
from lowprec.steps.frequency import token_frequency
from lowprec.steps.graph import find_groups
from lowprec.steps.linear import output_width
from lowprec.steps.measure import compare, run_through
from lowprec.steps.metrics import text_growth
from lowprec.steps.solve import Rounder
from lowprec.steps.sources import read_sources
from lowprec.steps.stream import Stream
from lowprec.steps.tokens import Batch, Batched, TokenSet, batched
from lowprec.steps.transform import smooth
from lowprec.targets.base import CacheTarget, RuntimeTarget
from lowprec.transforms import Smoothed
from lowprec.version import __version__

PROBE_WINDOW = 128
STATISTICS_BATCH_TOKENS = 2048
SMOOTHED_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """The model and its text, ready to be measured.

    Attributes:
        stream: the model in blocks.
        groups, unquantised: what may be quantised, and what stays as it is.
        caches: the groups of the KV cache; none where it stays as it is.
        widths: group -> output width of each of its layers.
        allowed, struck_out: group -> schemes that the target runs, bf16 first; and those that it does not.
        gathered, probed: the two halves of the calibration text: for Hessians, for the sensitivity.
        tuning, held_out: what mixes are measured on, and what each look of the judge is taken at.
        smoothed: scales to be merged between layers where a group's inputs are rounded.
        rounder: rounds groups and remembers them.
        inputs: digests of everything that calibration depends on.
        metric_key: digest of the metric and of its tuning text.
    """

    context: Context
    splits: Splits
    stream: Stream
    groups: tuple[Group, ...]
    unquantised: tuple[Unquantised, ...]
    caches: Caches
    widths: Mapping[str, tuple[int, ...]]
    allowed: Mapping[str, tuple[Scheme, ...]]
    struck_out: tuple[StruckOut, ...]
    gathered: Batched
    probed: Batched
    tuning: Batched
    held_out: tuple[TokenSet, ...]
    smoothed: tuple[Smoothed, ...]
    rounder: Rounder
    inputs: Mapping[str, str]
    metric_key: str

    @property
    def as_stored(self) -> Stream:
        """The model as an artefact holds what it does not round.

        A turned model is held in float32 and stored in its original's dtype. What is scored is what will be loaded, so
        that loss counts as any other: candidates run here, the reference in `stream`. For other models both are one.
        """
        original = self.context.model.original
        return self.stream if original is None else self.stream.stored_in(original.dtype)

    @property
    def schemes(self) -> dict[str, tuple[Scheme, ...]]:
        """Group -> the schemes that quantise it."""
        return quantising(self.allowed)

    @property
    def looks(self) -> int:
        """How many looks of the judge are planned."""
        return max(len(self.held_out), 1)

    @property
    def names(self) -> list[str]:
        """The groups' names, as the model runs."""
        return [*(group.name for group in self.groups), *self.caches.names]

    @property
    def calibration_batches(self) -> list[Batch]:
        """All of the calibration text, the probed part last."""
        return [*self.gathered.batches, *self.probed.batches]

    @property
    def statistics_batches(self) -> list[Batch]:
        """The text for Hessians in larger batches, which are faster; the probed text scores what was fitted to this."""
        return self.gathered.data.batches(STATISTICS_BATCH_TOKENS)

    def documents_of(self, batch: Batch) -> str:
        """Names the text of a calibration batch, for messages."""
        data = self.probed.data if any(batch is b for b in self.probed.batches) else self.gathered.data
        return ", ".join(dict.fromkeys(data.documents[i] for i in batch.index))


def quantising(allowed: Mapping[str, tuple[Scheme, ...]]) -> dict[str, tuple[Scheme, ...]]:
    """Group -> schemes that change its weights."""
    return {group: tuple(s for s in schemes if s.weight is not None) for group, schemes in allowed.items()}


def prepare(context: Context) -> Prepared:
    """Reads the data and finds the groups.

    Raises:
        DataError: too little text.
        ConfigError: a model without a tokenizer or without a layer to quantise; a task at chance level.
    """
    settings, model = context.settings, context.model
    with context.progress.step("data"):
        splits = _split(context)
    with context.progress.step("graph"):
        stream = Stream(model.module, model.forward, example(splits), device=settings.calibration_device)
        stored = None if model.original is None else model.dtype
        groups, unquantised = find_groups(stream, settings.rounds_embeddings, stored, settings.fuses)
        if not groups:
            raise ConfigError(f"{model.name} has no linear layer that can be quantised")
        widths = {g.name: tuple(output_width(stream.weighted[layer]) for layer in g.layers) for g in groups}
        offered = schemes_named(settings.schemes or _families(context))
        allowed, struck_out = candidates(groups, widths, offered, context.target)
        caches = _caches(context, stream, splits)
        allowed |= {name: (scheme_named("bf16"), scheme_named(caches.format)) for name in caches.names}
    gathered, probed = _halves(splits.calibration, settings.effort)
    tuning, held_out = context.metric.sets(splits)
    inputs = _inputs(context, splits, allowed)
    smoothed = _smoothed(context, stream, groups, allowed, gathered.data, inputs)
    if smoothed:
        inputs["smoothed"] = digest(repr(smoothed))
    if caches.groups:
        caches = _scaled(context, stream, caches, gathered.data, inputs)
        inputs["cache"] = digest(repr(caches))
    metric_key = _metric_key(context, splits, tuning)
    _require_sight(context, stream, batched(tuning), {"model": inputs["model"], "metric": metric_key})
    return Prepared(
        context=context,
        splits=splits,
        stream=stream,
        groups=groups,
        unquantised=unquantised,
        caches=caches,
        widths=widths,
        allowed=allowed,
        struck_out=struck_out,
        gathered=gathered,
        probed=probed,
        tuning=batched(tuning),
        held_out=held_out,
        smoothed=smoothed,
        rounder=Rounder(
            stream,
            groups,
            context.folder,
            inputs,
            settings.effort.solver,
            settings.workers,
            {g.name: _frequency(stream, g, gathered.data) for g in groups if g.tables},
            smoothed,
        ),
        inputs=inputs,
        metric_key=metric_key,
    )


def _families(context: Context) -> tuple[str, ...]:
    """What is offered where nothing is asked for: INT6, which runs as INT8, where the file's bytes are what counts and
    only our own runtime reads it.
    """
    settings, target = context.settings, context.target
    in_files = settings.objective == "bytes" and settings.rounds_embeddings and not isinstance(target, RuntimeTarget)
    return (*target.schemes, "int6") if in_files else target.schemes


def _smoothed(
    context: Context,
    stream: Stream,
    groups: tuple[Group, ...],
    allowed: Mapping[str, tuple[Scheme, ...]],
    data: TokenSet,
    inputs: Mapping[str, str],
) -> tuple[Smoothed, ...]:
    """The scales that would be merged. An artefact that is not the whole model could not hold the layers before, which
    they change: such a model has none.
    """
    if not context.settings.smooth or not is_whole(context.model.module):
        return ()
    found: tuple[Smoothed, ...] | None = context.folder.read_step("transform", inputs, tuple[Smoothed, ...])
    if found is None:
        with context.progress.step("transform", stream.depth, "blocks") as step:
            batches = data.subset(SMOOTHED_TOKENS).batches(STATISTICS_BATCH_TOKENS)
            found = smooth(stream, groups, quantising(allowed), batches, _few(data), step.report)
        context.folder.write_step("transform", found, inputs)
    return found


def _caches(context: Context, stream: Stream, splits: Splits) -> Caches:
    """The groups of the KV cache, if it may be rounded."""
    if (fmt := context.cache_format) is None:
        return NO_CACHES
    try:
        found = find_caches(stream, example(splits).ids, fmt)
        _require_place(context, found)
    except UnsupportedError as error:
        if context.settings.kv_cache is not None:
            raise
        context.progress.note(f"the KV cache stays as it is: {error.reasons[0]}")
        return NO_CACHES
    if found.left:
        more = f" (and {len(found.left) - 1} more)" if len(found.left) > 1 else ""
        context.progress.note(f"part of the KV cache stays as it is: {found.left[0]}{more}")
    return found


def _require_place(context: Context, caches: Caches) -> None:
    """Raises UnsupportedError where the target's attention cannot keep this model's keys and values in codes."""
    target = context.target
    assert isinstance(target, CacheTarget)
    places = [place for group in caches.groups for place in group.places]
    if (reason := target.fits(context.model.module, places)) is not None:
        raise UnsupportedError(f"{target.name} cannot keep the KV cache in {caches.format}", (reason, REMEDY))


def _scaled(context: Context, stream: Stream, caches: Caches, data: TokenSet, inputs: Mapping[str, str]) -> Caches:
    """With the scales of a static format, from as much text as smoothing looks at."""
    if CACHE_FORMATS[caches.format].largest is None:
        return caches
    inputs = {**inputs, "cache": digest(repr(caches))}
    found: Caches | None = context.folder.read_step("cache", inputs, Caches)
    if found is None:
        with context.progress.step("cache"):
            batches = data.subset(SMOOTHED_TOKENS).batches(STATISTICS_BATCH_TOKENS)
            found = replace(caches, scales=scales_of(ranges(stream, caches.groups, batches), caches.format))
        context.folder.write_step("cache", found, inputs)
    return found


def _frequency(stream: Stream, group: Group, data: TokenSet) -> Callable[[], torch.Tensor]:
    """Makes the importance of the rows of a group's table, once, when it is first asked for."""

    @functools.cache
    def made() -> torch.Tensor:
        return token_frequency(stream, group, data)

    return made


def _require_sight(context: Context, stream: Stream, tuning: Batched, inputs: Mapping[str, str]) -> None:
    """Refuses a task that the reference answers no better than chance, before anything is spent on it."""
    metric = context.metric
    if not metric.may_be_blind or context.folder.read_step("reference", inputs) is not None:
        return
    with context.progress.step("reference", stream.depth, "blocks") as step:
        reference = run_through(stream, tuning.batches, progress=step.report)
        table = compare(reference, [reference], tuning.batches, metric.compare(tuning.data))[0]
        metric.looked(table, tuning.data, tuning.batches)
    context.folder.write_step("reference", {"may be judged": True}, inputs)


def example(splits: Splits) -> Batch:
    """A few tokens, to find a model's cut with."""
    return _few(splits.calibration)


def _few(data: TokenSet) -> Batch:
    ids = data.ids[0][:8]
    return Batch(ids=ids[None], lengths=torch.tensor([len(ids)]), index=(0,))


def _split(context: Context) -> Splits:
    effort = context.settings.effort
    if context.model.tokenizer is None:
        raise ConfigError("a model without a tokenizer needs one to read the calibration text: give tokenizer=...")
    sizes = SplitSizes(
        calibration=effort.calibration_tokens + effort.sensitivity_tokens,
        tuning=effort.tuning_tokens,
        held_out=effort.held_out_tokens,
        window=effort.window,
        growth=text_growth(context.metric.budget),
    )
    splits = split(read_sources(context.settings.data), context.model.tokenizer, sizes, context.settings.seed)
    context.folder.write_step("data", splits.summary, {"data": splits.calibration.digest})
    return splits


def _halves(whole: TokenSet, effort: Effort) -> tuple[Batched, Batched]:
    """The text for Hessians and that for the sensitivity; where there is too little, both shrink alike."""
    share = effort.calibration_tokens / (effort.calibration_tokens + effort.sensitivity_tokens)
    gathered = whole.subset(round(share * whole.tokens))
    # More and shorter sequences: the prediction's variance falls with their number.
    probed = batched(whole.after(len(gathered)).cut(PROBE_WINDOW))
    if not probed.batches:
        raise DataError("the calibration text is one single window; give more text")
    return batched(gathered), probed


def _inputs(context: Context, splits: Splits, allowed: Mapping[str, tuple[Scheme, ...]]) -> dict[str, str]:
    settings = context.settings
    schemes = {group: [s.name for s in found] for group, found in quantising(allowed).items()}
    embeddings = " embeddings" if settings.rounds_embeddings else ""
    effort = settings.effort
    return {
        "model": context.model.revision,
        "data": splits.calibration.digest,
        "schemes": digest(json.dumps(schemes, sort_keys=True) + embeddings),
        "output": _output_digest(context, splits),
        # The text says how much of it there is; what only later stages use does not make calibration anew.
        "effort": digest(effort.solver, str(effort.calibration_tokens), str(effort.sensitivity_tokens)),
        "seed": str(settings.seed),
        "version": __version__,
    }


def _output_digest(context: Context, splits: Splits) -> str:
    """What the model makes of the example: another configuration or forward function is another model."""
    with torch.no_grad():
        output = context.model.forward(context.model.module, example(splits))
    return f"{float(output.double().abs().mean()):.3e}"


def _metric_key(context: Context, splits: Splits, tuning: TokenSet) -> str:
    budget = context.metric.budget
    return digest(budget.metric, f"{budget.confidence:g}", tuning.digest, _metric_value(context, splits))


def _metric_value(context: Context, splits: Splits) -> str:
    """What the user's metric says of a changed output; empty where there is no such metric."""
    model = context.model
    if model.metric is None:
        return ""
    with torch.no_grad():
        output = model.forward(model.module, example(splits)).float()
    return f"{float(model.metric(output, output * torch.linspace(0.5, 2, output.shape[-1])).mean()):.3e}"
