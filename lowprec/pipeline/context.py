"""What every stage is given: the model, what is asked of it, and where everything is kept."""

from dataclasses import dataclass, replace

from lowprec.artifacts.folder import RunFolder
from lowprec.artifacts.own_form import is_whole
from lowprec.errors import ConfigError, UnsupportedError
from lowprec.records import Budget
from lowprec.report.progress import RunProgress
from lowprec.settings import KV_CACHES, Settings, parse_budget
from lowprec.steps.load import Model
from lowprec.steps.metrics import Metric, metric_of, text_growth
from lowprec.targets import CacheTarget, RuntimeTarget, Target, target_for


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Context:
    """One run's givens. `target` and `metric` follow from the settings."""

    model: Model
    settings: Settings
    folder: RunFolder
    progress: RunProgress
    target: Target
    metric: Metric

    @property
    def runtime(self) -> RuntimeTarget | None:
        """The target, where its runtime loads files of its own."""
        return self.target if isinstance(self.target, RuntimeTarget) else None

    @property
    def cache_format(self) -> str | None:
        """What the KV cache may be kept in: as is asked for, or what the target offers where time is what counts."""
        settings, target = self.settings, self.target
        timed = self.model.kind == "decoder" and settings.objective != "bytes"
        return settings.cache_format(target.offered_cache if isinstance(target, CacheTarget) and timed else None)

    def with_budget(self, budget: Budget | str | float) -> "Context":
        """The same run with another limit, "2%", 0.02 or a `Budget`.

        Raises:
            ConfigError: a budget of another metric or confidence, which is measured on a text of its own.
        """
        before = self.metric.budget
        found = budget if isinstance(budget, Budget) else parse_budget(budget, before.metric, before.confidence)
        if (found.metric, found.confidence) != (before.metric, before.confidence):
            raise ConfigError(
                f"this run measures {before.metric} at {before.confidence:g}, not {found.metric} at "
                f"{found.confidence:g}: begin another run on the folder, which keeps what was calibrated"
            )
        metric = metric_of(found, self.model, self.settings.seed)
        if (wanted := text_growth(found)) > text_growth(before):
            self.progress.note(
                f"the text stays that of a budget of {before.limit:g}; a run begun with {found.limit:g} takes up to "
                f"{wanted:g} times as much, so that its verdict is less often inconclusive"
            )
        return replace(self, settings=replace(self.settings, budget=found), metric=metric)


def context_of(model: Model, settings: Settings, folder: RunFolder, progress: RunProgress) -> Context:
    """The context of a run of `model`.

    Raises:
        ConfigError: a metric that this model does not have.
        UnsupportedError: a target or device that cannot be planned for, a model that the target cannot hold, or a KV
            cache that it cannot keep.
    """
    made = Context(
        model=model,
        settings=settings,
        folder=folder,
        progress=progress,
        target=target_for(settings.target, None if settings.device == "cpu" else settings.device),
        metric=metric_of(settings.budget, model, settings.seed),
    )
    if made.runtime is not None and not is_whole(model.module):
        raise UnsupportedError(
            f"target {made.target.name} cannot hold {model.name}",
            (
                "it runs whole models of transformers; give a module of your own --target torch, and its artefact to "
                "lowprec.export_onnx",
            ),
        )
    if (fmt := made.cache_format) is not None:
        _require_cache(made.target, fmt)
    return made


def _require_cache(target: Target, fmt: str) -> None:
    if not isinstance(target, CacheTarget):
        raise UnsupportedError(
            f"target {target.name} keeps its KV cache in a form of its own",
            ("leave --kv-cache out, or plan for --target torch, or for onnxruntime with --kv-cache int8-channel",),
        )
    if (reason := target.keeps(fmt)) is not None:
        other = "leave --kv-cache out" if target.keeps(KV_CACHES["8"]) else "give --kv-cache 8"
        raise UnsupportedError(f"{target.name} cannot keep a KV cache in {fmt}", (reason, other))
