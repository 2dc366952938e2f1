"""lowprec: give it a model and a loss budget; it returns the cheapest model that stays inside, with the evidence.

    report = lowprec.optimize("path/to/model", budget="5%", out="D")

Names are imported when they are first used, so that `import lowprec` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lowprec.version import __version__

if TYPE_CHECKING:
    from lowprec.api import complete, optimize
    from lowprec.artifacts.compressed_tensors import write_artefact as export
    from lowprec.artifacts.loading import apply_artefact, load_artefact
    from lowprec.artifacts.own_form import write_own_form as export_own
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
    from lowprec.settings import Settings
    from lowprec.steps.allocate import allocate, frontier
    from lowprec.steps.calibrate import calibrate
    from lowprec.steps.cost import time_shapes as cost
    from lowprec.steps.data import split
    from lowprec.steps.graph import find_groups as graph
    from lowprec.steps.judge import judge
    from lowprec.steps.load import Model, load, wrap
    from lowprec.steps.sensitivity import effects as sensitivity
    from lowprec.steps.solve import solve_plan as solve
    from lowprec.steps.sources import read_sources as sources
    from lowprec.steps.stream import Stream
    from lowprec.steps.verify import verify

# Name -> where it lives; the verbs are the steps of a run, in the words of the report.
_HOME = {
    "ArtifactError": "errors:ArtifactError",
    "Budget": "records:Budget",
    "BudgetError": "errors:BudgetError",
    "ConfigError": "errors:ConfigError",
    "DataError": "errors:DataError",
    "Group": "records:Group",
    "LowprecError": "errors:LowprecError",
    "Model": "steps.load:Model",
    "ModelError": "errors:ModelError",
    "PrecisionPlan": "records:PrecisionPlan",
    "Report": "results:Report",
    "Scheme": "records:Scheme",
    "Settings": "settings:Settings",
    "Stream": "steps.stream:Stream",
    "UnsupportedError": "errors:UnsupportedError",
    "Workload": "records:Workload",
    "allocate": "steps.allocate:allocate",
    "apply_artefact": "artifacts.loading:apply_artefact",
    "calibrate": "steps.calibrate:calibrate",
    "complete": "api:complete",
    "cost": "steps.cost:time_shapes",
    "export": "artifacts.compressed_tensors:write_artefact",
    "export_own": "artifacts.own_form:write_own_form",
    "frontier": "steps.allocate:frontier",
    "graph": "steps.graph:find_groups",
    "judge": "steps.judge:judge",
    "load": "steps.load:load",
    "load_artefact": "artifacts.loading:load_artefact",
    "optimize": "api:optimize",
    "sensitivity": "steps.sensitivity:effects",
    "solve": "steps.solve:solve_plan",
    "sources": "steps.sources:read_sources",
    "split": "steps.data:split",
    "verify": "steps.verify:verify",
    "wrap": "steps.load:wrap",
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
    "Scheme",
    "Settings",
    "Stream",
    "UnsupportedError",
    "Workload",
    "__version__",
    "allocate",
    "apply_artefact",
    "calibrate",
    "complete",
    "cost",
    "export",
    "export_own",
    "frontier",
    "graph",
    "judge",
    "load",
    "load_artefact",
    "optimize",
    "sensitivity",
    "solve",
    "sources",
    "split",
    "verify",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowprec' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(importlib.import_module(f"lowprec.{module}"), attribute)
