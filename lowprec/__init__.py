"""lowprec: give it a model and a loss budget; it returns the cheapest model that stays inside, with the evidence.

    report = lowprec.optimize("path/to/model", budget="5%", out="D")

`optimize` is made of stages, each a function from the records of the earlier ones to its own, which it also keeps in
the run's folder:

    begin -> prepare -> score -> check, price -> choose -> export -> prove -> summarise

The stages are made of algorithms that know no settings: split, graph, calibrate, sensitivity, cost, allocate,
token_importance, Compensation, Healing, verify, judge. Most of what they take, a `Prepared` has ready: its stream,
groups, schemes, rounder and batches. A `Scratch` is a folder for hidden states; `Model.outcome` says how outputs are
weighed.

Precision at run time: a `Controller` moves between the rungs of a `Ladder` within a `LossBudget`; `study` replays
arrivals through it, and `serve` serves the weights that `optimize(..., ladder=True)` made with it. `request_cache`
makes the KV cache of a request, in 8 or 16 bits.

Names are imported when they are first used, so that `import lowprec` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lowprec.version import __version__

if TYPE_CHECKING:
    from lowprec.api import begin, complete, optimize
    from lowprec.artifacts.compressed_tensors import write_artefact
    from lowprec.artifacts.folder import RunFolder
    from lowprec.artifacts.loading import apply_artefact, load_artefact
    from lowprec.artifacts.nested import load_nested
    from lowprec.artifacts.own_form import write_own_form
    from lowprec.errors import (
        ArtifactError,
        BudgetError,
        ConfigError,
        DataError,
        LowprecError,
        ModelError,
        UnsupportedError,
    )
    from lowprec.ladder import Ladder, read_ladder
    from lowprec.live import Answer, LiveServer, serve
    from lowprec.nesting import nest_artefact
    from lowprec.onnx import export_onnx
    from lowprec.pipeline.artefact import Loaded, export
    from lowprec.pipeline.choose import Chosen, choose
    from lowprec.pipeline.context import Context
    from lowprec.pipeline.prepare import Prepared, prepare
    from lowprec.pipeline.price import Priced, price
    from lowprec.pipeline.prove import Proved, prove
    from lowprec.pipeline.score import Scored, check, score
    from lowprec.pipeline.summarise import summarise
    from lowprec.records import Budget, Group, PrecisionPlan, Scheme, Workload
    from lowprec.report.progress import RunProgress
    from lowprec.results import Report
    from lowprec.runtime.controller import Controller, Objectives
    from lowprec.runtime.request_cache import RequestCache, request_cache
    from lowprec.runtime.spending import LossBudget
    from lowprec.settings import Effort, Settings, effort_named
    from lowprec.simulate.study import study
    from lowprec.steps.allocate import Option, allocate, frontier
    from lowprec.steps.calibrate import calibrate
    from lowprec.steps.compensate import Compensation
    from lowprec.steps.cost import time_shapes as cost
    from lowprec.steps.data import split
    from lowprec.steps.graph import find_groups as graph
    from lowprec.steps.heal import Healing
    from lowprec.steps.importance import token_importance
    from lowprec.steps.judge import judge
    from lowprec.steps.load import Model, load, wrap
    from lowprec.steps.nest import nest
    from lowprec.steps.scratch import Scratch
    from lowprec.steps.sensitivity import effects as sensitivity
    from lowprec.steps.solve import Rounder
    from lowprec.steps.sources import read_sources as sources
    from lowprec.steps.stream import Stream
    from lowprec.steps.verify import Measured, verify

# Name -> where it lives.
_HOME = {
    "Answer": "live:Answer",
    "ArtifactError": "errors:ArtifactError",
    "Budget": "records:Budget",
    "BudgetError": "errors:BudgetError",
    "Chosen": "pipeline.choose:Chosen",
    "Compensation": "steps.compensate:Compensation",
    "ConfigError": "errors:ConfigError",
    "Context": "pipeline.context:Context",
    "Controller": "runtime.controller:Controller",
    "DataError": "errors:DataError",
    "Effort": "settings:Effort",
    "Group": "records:Group",
    "Healing": "steps.heal:Healing",
    "Ladder": "ladder:Ladder",
    "LiveServer": "live:LiveServer",
    "Loaded": "pipeline.artefact:Loaded",
    "LossBudget": "runtime.spending:LossBudget",
    "LowprecError": "errors:LowprecError",
    "Measured": "steps.verify:Measured",
    "Model": "steps.load:Model",
    "ModelError": "errors:ModelError",
    "Objectives": "runtime.controller:Objectives",
    "Option": "steps.allocate:Option",
    "PrecisionPlan": "records:PrecisionPlan",
    "Prepared": "pipeline.prepare:Prepared",
    "Priced": "pipeline.price:Priced",
    "Proved": "pipeline.prove:Proved",
    "Report": "results:Report",
    "RequestCache": "runtime.request_cache:RequestCache",
    "Rounder": "steps.solve:Rounder",
    "RunFolder": "artifacts.folder:RunFolder",
    "RunProgress": "report.progress:RunProgress",
    "Scheme": "records:Scheme",
    "Scored": "pipeline.score:Scored",
    "Scratch": "steps.scratch:Scratch",
    "Settings": "settings:Settings",
    "Stream": "steps.stream:Stream",
    "UnsupportedError": "errors:UnsupportedError",
    "Workload": "records:Workload",
    "allocate": "steps.allocate:allocate",
    "apply_artefact": "artifacts.loading:apply_artefact",
    "begin": "api:begin",
    "calibrate": "steps.calibrate:calibrate",
    "check": "pipeline.score:check",
    "choose": "pipeline.choose:choose",
    "complete": "api:complete",
    "cost": "steps.cost:time_shapes",
    "effort_named": "settings:effort_named",
    "export": "pipeline.artefact:export",
    "export_onnx": "onnx:export_onnx",
    "frontier": "steps.allocate:frontier",
    "graph": "steps.graph:find_groups",
    "judge": "steps.judge:judge",
    "load": "steps.load:load",
    "load_artefact": "artifacts.loading:load_artefact",
    "load_nested": "artifacts.nested:load_nested",
    "nest": "steps.nest:nest",
    "nest_artefact": "nesting:nest_artefact",
    "optimize": "api:optimize",
    "prepare": "pipeline.prepare:prepare",
    "price": "pipeline.price:price",
    "prove": "pipeline.prove:prove",
    "read_ladder": "ladder:read_ladder",
    "request_cache": "runtime.request_cache:request_cache",
    "score": "pipeline.score:score",
    "sensitivity": "steps.sensitivity:effects",
    "serve": "live:serve",
    "sources": "steps.sources:read_sources",
    "split": "steps.data:split",
    "study": "simulate.study:study",
    "summarise": "pipeline.summarise:summarise",
    "token_importance": "steps.importance:token_importance",
    "verify": "steps.verify:verify",
    "wrap": "steps.load:wrap",
    "write_artefact": "artifacts.compressed_tensors:write_artefact",
    "write_own_form": "artifacts.own_form:write_own_form",
}

__all__ = [
    "Answer",
    "ArtifactError",
    "Budget",
    "BudgetError",
    "Chosen",
    "Compensation",
    "ConfigError",
    "Context",
    "Controller",
    "DataError",
    "Effort",
    "Group",
    "Healing",
    "Ladder",
    "LiveServer",
    "Loaded",
    "LossBudget",
    "LowprecError",
    "Measured",
    "Model",
    "ModelError",
    "Objectives",
    "Option",
    "PrecisionPlan",
    "Prepared",
    "Priced",
    "Proved",
    "Report",
    "RequestCache",
    "Rounder",
    "RunFolder",
    "RunProgress",
    "Scheme",
    "Scored",
    "Scratch",
    "Settings",
    "Stream",
    "UnsupportedError",
    "Workload",
    "__version__",
    "allocate",
    "apply_artefact",
    "begin",
    "calibrate",
    "check",
    "choose",
    "complete",
    "cost",
    "effort_named",
    "export",
    "export_onnx",
    "frontier",
    "graph",
    "judge",
    "load",
    "load_artefact",
    "load_nested",
    "nest",
    "nest_artefact",
    "optimize",
    "prepare",
    "price",
    "prove",
    "read_ladder",
    "request_cache",
    "score",
    "sensitivity",
    "serve",
    "sources",
    "split",
    "study",
    "summarise",
    "token_importance",
    "verify",
    "wrap",
    "write_artefact",
    "write_own_form",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowprec' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(importlib.import_module(f"lowprec.{module}"), attribute)
