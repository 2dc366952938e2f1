"""lowprec: give it a model and a loss budget; it returns the cheapest model that stays inside, with the evidence.

    report = lowprec.optimize("path/to/model", budget="5%", out="D")

Names are imported when they are first used, so that `import lowprec` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lowprec.version import __version__

if TYPE_CHECKING:
    from lowprec.api import complete, optimize
    from lowprec.artifacts.loading import load_artefact
    from lowprec.errors import (
        ArtifactError,
        BudgetError,
        ConfigError,
        DataError,
        LowprecError,
        ModelError,
        UnsupportedError,
    )
    from lowprec.records import Budget, Group, PrecisionPlan, Scheme, Workload
    from lowprec.results import Report
    from lowprec.run import Run
    from lowprec.settings import Settings
    from lowprec.steps.allocate import allocate, frontier
    from lowprec.steps.calibrate import calibrate
    from lowprec.steps.cost import time_shapes
    from lowprec.steps.graph import find_groups
    from lowprec.steps.judge import judge
    from lowprec.steps.load import Model, load, wrap
    from lowprec.steps.sensitivity import effects
    from lowprec.steps.solve import solve_plan
    from lowprec.steps.stream import Stream
    from lowprec.steps.verify import verify

_HOME = {
    "allocate": "steps.allocate",
    "ArtifactError": "errors",
    "Budget": "records",
    "BudgetError": "errors",
    "calibrate": "steps.calibrate",
    "complete": "api",
    "ConfigError": "errors",
    "DataError": "errors",
    "effects": "steps.sensitivity",
    "find_groups": "steps.graph",
    "frontier": "steps.allocate",
    "Group": "records",
    "judge": "steps.judge",
    "load": "steps.load",
    "load_artefact": "artifacts.loading",
    "LowprecError": "errors",
    "Model": "steps.load",
    "ModelError": "errors",
    "optimize": "api",
    "PrecisionPlan": "records",
    "Report": "results",
    "Run": "run",
    "Scheme": "records",
    "Settings": "settings",
    "solve_plan": "steps.solve",
    "Stream": "steps.stream",
    "time_shapes": "steps.cost",
    "UnsupportedError": "errors",
    "verify": "steps.verify",
    "Workload": "records",
    "wrap": "steps.load",
}

__all__ = [
    "ArtifactError",
    "Budget",
    "BudgetError",
    "ConfigError",
    "DataError",
    "Group",
    "LowprecError",
    "Model",
    "ModelError",
    "PrecisionPlan",
    "Report",
    "Run",
    "Scheme",
    "Settings",
    "Stream",
    "UnsupportedError",
    "Workload",
    "__version__",
    "allocate",
    "calibrate",
    "complete",
    "effects",
    "find_groups",
    "frontier",
    "judge",
    "load",
    "load_artefact",
    "optimize",
    "solve_plan",
    "time_shapes",
    "verify",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowprec' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lowprec.{_HOME[name]}"), name)
