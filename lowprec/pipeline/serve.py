"""The model in our runtime: its layers replaced by ones that compute with kernels, and put back afterwards."""

import contextlib
from collections.abc import Iterator, Mapping

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
    module = chosen.prepared.context.model.module
    tables = {layer: names for layer, names in tables_of(chosen).items() if layer in solved}
    named = [*schemes, *(table for found in tables.values() for table in found)]
    originals = {name: module.get_submodule(name) for name in named}
    scales = {layer: scale for layer, scale in input_scales(chosen).items() if layer in solved}
    kernels = KernelTable(chosen.priced.samples)
    try:
        yield convert_(module, solved, schemes, kernels=kernels, activation_scales=scales, tables=tables)
    finally:
        for layer, original in originals.items():
            parent, _, child = layer.rpartition(".")
            setattr(module.get_submodule(parent), child, original)
