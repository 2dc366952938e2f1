"""What every stage is given: the model, what is asked of it, and where everything is kept."""

from dataclasses import dataclass

from lowprec.artifacts.folder import RunFolder
from lowprec.report.progress import RunProgress
from lowprec.settings import Settings
from lowprec.steps.load import Model
from lowprec.steps.metrics import Metric, metric_of
from lowprec.targets import Target, target_for


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Context:
    """One run's givens. `target` and `metric` follow from the settings."""

    model: Model
    settings: Settings
    folder: RunFolder
    progress: RunProgress
    target: Target
    metric: Metric


def context_of(model: Model, settings: Settings, folder: RunFolder, progress: RunProgress) -> Context:
    """The context of a run of `model`.

    Raises:
        ConfigError: a metric that this model does not have.
        UnsupportedError: a target or device that cannot be planned for.
    """
    return Context(
        model=model,
        settings=settings,
        folder=folder,
        progress=progress,
        target=target_for(settings.target, None if settings.device == "cpu" else settings.device),
        metric=metric_of(settings.budget, model, settings.seed),
    )
