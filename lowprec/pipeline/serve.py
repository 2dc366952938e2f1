"""The model in our runtime: its layers replaced by ones that compute with kernels, and put back afterwards."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lowprec.formats import QuantizedWeight, scheme_named
from lowprec.pipeline.artefact import input_scales, tables_of
from lowprec.pipeline.choose import Chosen
from lowprec.records import Scheme
from lowprec.runtime.convert import convert_
from lowprec.runtime.dispatch import KernelTable

BF16 = scheme_named("bf16")


def baseline(chosen: Chosen) -> contextlib.AbstractContextManager[nn.Module]:
    """The unquantised model, every layer in the runtime's fastest bfloat16 form; put back afterwards."""
    return converted(chosen, {}, dict.fromkeys(chosen.scheme_of_layer, BF16))


def optimised(chosen: Chosen, solved: Mapping[str, QuantizedWeight]) -> contextlib.AbstractContextManager[nn.Module]:
    """The model with the plan's layers in our runtime; put back afterwards."""
    return converted(chosen, solved, chosen.scheme_of_layer)


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
