"""The model in the target's runtime, as a module that is called like the model itself.

A runtime with files of its own loads them. In torch the model's layers are replaced by ones that compute with kernels,
and put back afterwards.
"""

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from lowprec.artifacts.stored_cache import read_cache
from lowprec.formats import QuantizedWeight, scheme_named
from lowprec.pipeline.artefact import Artefact, input_scales, tables_of
from lowprec.pipeline.choose import Chosen
from lowprec.pipeline.deploy import deployed_path, loaded_by
from lowprec.records import Scheme
from lowprec.runtime.convert import convert_
from lowprec.runtime.dispatch import KernelTable
from lowprec.runtime.serving_cache import serving_cache
from lowprec.steps.memory import give_back_memory
from lowprec.targets import RuntimeTarget

BF16 = scheme_named("bf16")
UNQUANTISED = "unquantised-"


def baseline(chosen: Chosen) -> contextlib.AbstractContextManager[nn.Module]:
    """The unquantised model: its own graph in a runtime with files, else every layer in its fastest bfloat16 form."""
    runtime = chosen.prepared.context.runtime
    if runtime is not None:
        return _unquantised(chosen, runtime)
    return converted(chosen, {}, dict.fromkeys(chosen.scheme_of_layer, BF16))


def optimised(
    chosen: Chosen, artefact: Artefact, served: nn.Module | None = None
) -> contextlib.AbstractContextManager[nn.Module]:
    """The model with the plan's layers; `served` is the one that a runtime with files has loaded already, if it has."""
    runtime = chosen.prepared.context.runtime
    if runtime is None:
        return _with_cache(chosen, artefact)
    return contextlib.nullcontext(served or loaded_by(chosen, runtime, deployed_path(chosen, runtime)))


@contextlib.contextmanager
def _with_cache(chosen: Chosen, artefact: Artefact) -> Iterator[nn.Module]:
    """Our kernels on the codes, and the KV cache as the artefact on disk says."""
    kernels = converted(chosen, artefact.solved, chosen.scheme_of_layer)
    with kernels as module, serving_cache(module, read_cache(artefact.path)):
        yield module


@contextlib.contextmanager
def _unquantised(chosen: Chosen, runtime: RuntimeTarget) -> Iterator[nn.Module]:
    context = chosen.prepared.context
    for left in context.folder.path.glob(f"{UNQUANTISED}*"):
        # By a run that was killed.
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=UNQUANTISED, dir=context.folder.path) as place:
        path = Path(place) / runtime.form
        whole = copy.deepcopy(context.model.module).float()
        runtime.deploy_unquantised(whole, path)
        del whole
        give_back_memory()
        yield loaded_by(chosen, runtime, path)


@contextlib.contextmanager
def converted(
    chosen: Chosen, solved: Mapping[str, QuantizedWeight], schemes: Mapping[str, Scheme]
) -> Iterator[nn.Module]:
    model = chosen.prepared.context.model
    module = model.module
    tables = {layer: names for layer, names in tables_of(chosen).items() if layer in solved}
    named = [*schemes, *(table for found in tables.values() for table in found)]
    originals = {name: module.get_submodule(name) for name in named}
    scales = {layer: scale for layer, scale in input_scales(chosen).items() if layer in solved}
    kernels = KernelTable(chosen.priced.samples)
    # Kernels run what is stored, not the float32 that a turned model is held in.
    with contextlib.nullcontext() if model.original is None else _in_dtype(module, model.dtype):
        try:
            yield convert_(module, solved, schemes, kernels=kernels, activation_scales=scales, tables=tables)
        finally:
            for layer, original in originals.items():
                parent, _, child = layer.rpartition(".")
                setattr(module.get_submodule(parent), child, original)


@contextlib.contextmanager
def _in_dtype(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The module with its weights in `dtype` while open."""
    kept = [(m._parameters, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None]
    try:
        for table, name, parameter in kept:
            table[name] = nn.Parameter(parameter.to(dtype), requires_grad=False)
        yield
    finally:
        for table, name, parameter in kept:
            table[name] = parameter
