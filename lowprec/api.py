"""The library: `optimize` for all of a run, and `begin` for a run whose stages are taken one by one.

report = lowprec.optimize("path/to/model", budget="5%", out="D")

model = lowprec.wrap(module, forward, tokenizer=tokenizer, metric=metric)  # any nn.Module of yours
report = lowprec.optimize(model, budget="0.01 abs", out="D")

with lowprec.begin("path/to/model", lowprec.Settings(out=Path("D"))) as run:
    scored = lowprec.score(lowprec.prepare(run))
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from torch import nn

from lowprec.artifacts.folder import RunFolder, require_space
from lowprec.economics import price_of
from lowprec.errors import LowprecError, UnsupportedError
from lowprec.formats import schemes_named
from lowprec.pipeline.artefact import export
from lowprec.pipeline.choose import choose
from lowprec.pipeline.context import Context, context_of
from lowprec.pipeline.estimate import Estimate, estimate
from lowprec.pipeline.ladder import ladder, require_levels, require_switchable, require_tokens
from lowprec.pipeline.prepare import prepare
from lowprec.pipeline.price import price
from lowprec.pipeline.prove import prove
from lowprec.pipeline.score import check, score
from lowprec.pipeline.summarise import summarise
from lowprec.records import Budget, Objective, Workload
from lowprec.report import RunProgress, numbers, report_html, report_json
from lowprec.results import Report
from lowprec.settings import Effort, Settings, effort_named, parse_budget
from lowprec.steps.load import Model, load, wrap
from lowprec.steps.memory import give_back_memory
from lowprec.steps.rotate import turned
from lowprec.targets import target_for

REPORT_JSON, REPORT_HTML = "report.json", "report.html"


def optimize(
    model: Model | str | Path,
    *,
    out: str | Path,
    budget: Budget | str | float = "5%",
    target: str = "torch",
    device: str = "cpu",
    objective: Objective = "time",
    workload: Workload | None = None,
    effort: Effort | str = "balanced",
    smooth: bool = True,
    rotate: bool = False,
    heal: bool | None = None,
    embeddings: bool | None = None,
    ladder: bool = False,
    kv_cache: str | None = None,
    schemes: Sequence[str] = (),
    data: Sequence[str | Path] = (),
    dollars_per_hour: float | None = None,
    calibration_device: str = "cpu",
    seed: int = 0,
    workers: int = 2,
    trust_remote_code: bool = False,
    progress: RunProgress | None = None,
) -> Report:
    """Finds the cheapest mix of schemes that loses no more than the budget, proves it, and writes it to `out`.

    Args:
        model: a Hugging Face name or folder, a GGUF file, or what `load` or `wrap` returned.
        out: the run's folder; a second run on it resumes, or re-allocates for another budget.
        budget: "5%", 0.05, or a `Budget` with a metric of its own.
        device: "cpu", "cuda", or a device to plan for by its published figures ("h100", "mi300x", ...).
        effort: "fast", "balanced" or "best".
        smooth: whether scales are merged between layers before anything is rounded; the model's function stays.
        rotate: whether hidden states are put into a random basis before anything else; the model's function stays,
            but a head that was tied to the embedding gets a weight of its own.
        heal: whether the scales of each mix are tuned end to end; None leaves it to the effort.
        embeddings: whether embeddings are rounded as well, in lowprec's own form; None: when bytes are the objective.
        ladder: whether rungs are made, too, between which one set of weights switches while it serves; `out`/nested has
            the weights then, `out`/ladder.json the rungs (`lowprec.serve`).
        kv_cache: "8", "fp8" or "int8-channel": what the KV cache may be kept in, where that pays; "none" leaves it as
            it is, None offers what the target's attention computes with.
        schemes: families or names of schemes that may be chosen, none for what the target offers; bf16 always may.
        data: text, JSONL or Parquet files, or `datasets` names; empty for the offline default.

    Returns:
        The report, whose verdict is "within", "over" or "inconclusive". It lies in `out` as report.json and
        report.html, beside the artefact in `out`/model.

    Raises:
        LowprecError: bad input of any kind; what had been computed stays in `out`.
    """
    # What is asked for is checked before anything heavy begins.
    if not isinstance(budget, Budget):
        parse_budget(budget)
    offered = target_for(target, None if device == "cpu" else device).schemes
    schemes_named(schemes or offered)
    if objective == "dollars":
        price_of(device, dollars_per_hour)
    asked = Settings(
        out=Path(out),
        target=target,
        device=device,
        objective=objective,
        workload=workload or Workload(),
        effort=effort if isinstance(effort, Effort) else effort_named(effort),
        smooth=smooth,
        rotate=rotate,
        heal=heal,
        embeddings=embeddings,
        ladder=ladder,
        kv_cache=kv_cache,
        schemes=tuple(schemes),
        data=tuple(str(item) for item in data),
        dollars_per_hour=dollars_per_hour,
        calibration_device=calibration_device,
        seed=seed,
        workers=workers,
    )
    with begin(model, asked, budget, trust_remote_code=trust_remote_code, progress=progress) as context:
        return complete(context)


@contextlib.contextmanager
def begin(
    model: Model | str | Path,
    settings: Settings,
    budget: Budget | str | float | None = None,
    *,
    trust_remote_code: bool = False,
    progress: RunProgress | None = None,
) -> Iterator[Context]:
    """Opens the run's folder and loads the model; the context that it yields is what `prepare` takes.

    The folder is locked until the context ends. Each stage keeps its results there, so that a later run on it, of
    `begin` or of `optimize`, goes on from them.

    Args:
        model: a Hugging Face name or folder, a GGUF file, or what `load` or `wrap` returned.
        budget: "5%", 0.05, or a `Budget`; None takes that of the settings.

    Raises:
        LowprecError: bad input, a folder that is in use, a model that cannot be turned and should be, or a run that
            would not fit into memory or onto the disk.
    """
    require_switchable(settings)
    # A target that is not there is found before a model is loaded for it.
    target_for(settings.target, None if settings.device == "cpu" else settings.device)
    with RunFolder(settings.out) as folder, progress or RunProgress() as shown:

        def look(module: nn.Module) -> None:
            require_fit(module, asked, shown)

        # Before a model is loaded it is taken for a decoder: small budgets of perplexity take more text.
        metric = default_metric(model) if isinstance(model, Model) else "perplexity"
        asked = settings if budget is None else _with_budget(settings, budget, metric)

        if isinstance(model, Model):
            look(model.module)
        else:
            with shown.step("load"):
                model = load(model, trust_remote_code=trust_remote_code, before_weights=look)
        if settings.rotate:
            model = _turned(model, settings, shown)
        if budget is not None:
            settings = _with_budget(settings, budget, default_metric(model))
        context = context_of(model, settings, folder, shown)
        require_tokens(context)
        yield context


def _with_budget(settings: Settings, budget: Budget | str | float, metric: str) -> Settings:
    found = budget if isinstance(budget, Budget) else parse_budget(budget, metric)
    return dataclasses.replace(settings, budget=found)


def _turned(model: Model, settings: Settings, progress: RunProgress) -> Model:
    """The model in another basis, and a word on what was turned and what that costs."""
    with progress.step("rotate"):
        made = turned(model, settings.seed)
    heads = made.original.heads if made.original else 0
    progress.note(f"turned: the hidden states, and heads in {heads} places")
    if more := made.bytes - model.bytes:
        size = numbers.plain(numbers.byte_size(more))
        progress.note(f"turned, the head is not tied to the embedding any more: {size} more before rounding")
    return made


def default_metric(model: Model) -> str:
    """The metric of a budget that names none: perplexity where there are logits."""
    if model.kind == "decoder":
        return "perplexity"
    return getattr(model.metric, "__name__", "metric") if model.metric else "squared error"


def complete(context: Context) -> Report:
    """Takes a run through all of its stages and writes the reports."""
    prepared = prepare(context)
    require_levels(prepared)
    scored = score(prepared)
    give_back_memory()
    pairs = check(scored)
    priced = price(prepared)
    give_back_memory()
    chosen = choose(scored, priced)
    loaded = export(chosen)
    proved, artefact = prove(chosen, loaded), loaded.artefact
    # The loaded model is not needed any more, and the end-to-end timing makes copies of its own.
    del loaded
    give_back_memory()
    try:
        rungs = ladder(chosen) if context.settings.ladder else None
    except LowprecError:
        # The plan stands without it.
        _report(context, summarise(chosen, artefact, proved, pairs))
        raise
    return _report(context, summarise(chosen, artefact, proved, pairs, rungs))


def _report(context: Context, report: Report) -> Report:
    context.folder.write_text(REPORT_JSON, report_json(report))
    context.folder.write_text(REPORT_HTML, report_html(report))
    return report


def require_fit(module: nn.Module, settings: Settings, progress: RunProgress) -> Estimate:
    """Says what a run will take, and refuses one that cannot fit; `module` needs no weights (meta device).

    Raises:
        UnsupportedError: more memory than there is; names memory and time.
        ArtifactError: less disk than it needs.
    """
    expected = estimate(module, settings)
    free = psutil.virtual_memory().available
    progress.note(f"expected: {expected}")
    if expected.memory_bytes > free:
        raise UnsupportedError(
            f"the run would take {expected}, but only {free / 1e9:.1f} GB of memory are free",
            ("use a machine with more memory, or --effort fast",),
        )
    require_space(settings.out, expected.disk_bytes)
    return expected


__all__ = ["begin", "complete", "load", "optimize", "require_fit", "wrap"]
