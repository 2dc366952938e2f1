"""Gives every INT4 weight of a solved model its second plane: one streaming pass that gathers Hessians again.

The Hessians are those of the inputs as the unrounded model has them, whatever those were that plane 1 was solved with:
at level 8 the layers before have changed next to nothing of a layer's input.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats import QuantizedWeight
from lowprec.formats.nested import NestedWeight, base_reason
from lowprec.records import Group
from lowprec.registry import closest
from lowprec.solvers import LayerStatistics
from lowprec.solvers.residual import fit_residual
from lowprec.steps.calibrate import Progress, calibrate
from lowprec.steps.linear import weight_of
from lowprec.steps.outcome import Outcome
from lowprec.steps.scratch import Scratch
from lowprec.steps.stream import Stream


def nest(
    stream: Stream,
    groups: Sequence[Group],
    solved: Mapping[str, QuantizedWeight],
    batches: Sequence[Any],
    outcome: Outcome,
    scratch: Scratch,
    progress: Progress = lambda done, total: None,
    fit: Callable[..., NestedWeight] = fit_residual,
) -> dict[str, NestedWeight]:
    """Layer -> its nested weight, for every layer of `solved` that is INT4 in groups; the others are left out.

    Args:
        stream, groups: the model as it was before anything was rounded, and its groups.
        solved: layer -> codes and scales, from any solver; they stay bit for bit what they are.
        batches: calibration text.
        fit: what fits a residual.

    Raises:
        ConfigError: a layer that the groups do not have.
        UnsupportedError: no layer is INT4 in groups.
        ModelError: NaN or infinite activations; names the layer.
    """
    known = {layer: group for group in groups for layer in group.layers}
    if unknown := [layer for layer in solved if layer not in known]:
        raise ConfigError(f"{unknown[0]!r} is in no group of this model: {closest(unknown[0], list(known))}")
    bases = {layer: weight for layer, weight in solved.items() if base_reason(weight.format) is None}
    if not bases:
        kinds = sorted({weight.format for weight in solved.values()})
        raise UnsupportedError(
            "this model has no weight to nest: none is INT4 in groups", tuple(f"it has {kind}" for kind in kinds)
        )
    found: dict[str, NestedWeight] = {}

    def on_groups(gathered: Sequence[tuple[Group, LayerStatistics]]) -> None:
        for group, statistics in gathered:
            layers = [layer for layer in group.layers if layer in bases]
            if layers:
                found.update(_together(stream, layers, bases, statistics, fit))

    # Rows of an embedding are read one at a time: there is no input that errors could be made up for in.
    rows = [g for g in groups if g.is_embedding and any(layer in bases for layer in g.layers)]
    for layer in (layer for group in rows for layer in group.layers):
        found[layer] = fit(weight_of(stream.weighted[layer]).float(), bases[layer], None)
    wanted = [g for g in groups if not g.is_embedding and any(layer in bases for layer in g.layers)]
    # Residuals are kept in memory alone: a pass that was cut begins anew.
    scratch.clear()
    calibrate(stream, wanted, batches, outcome, on_groups, scratch, progress=progress)
    scratch.clear()
    return {layer: found[layer] for layer in bases}


def _together(
    stream: Stream,
    layers: Sequence[str],
    bases: Mapping[str, QuantizedWeight],
    statistics: LayerStatistics,
    fit: Callable[..., NestedWeight],
) -> dict[str, NestedWeight]:
    """Layers that read one input, stacked, so that their Hessian is factorised once."""
    found: dict[str, NestedWeight] = {}
    for fmt in sorted({bases[layer].format for layer in layers}):
        members = [layer for layer in layers if bases[layer].format == fmt]
        parts = [bases[layer] for layer in members]
        stacked = QuantizedWeight(
            format=fmt, codes=torch.cat([p.codes for p in parts]), scale=torch.cat([p.scale for p in parts])
        )
        w = torch.cat([weight_of(stream.weighted[layer]).float() for layer in members])
        whole = fit(w, stacked, statistics)
        heights = [len(p.codes) for p in parts]
        planes = zip(members, torch.split(whole.residual, heights), torch.split(whole.ratio, heights), strict=True)
        for layer, residual, ratio in planes:
            found[layer] = replace(whole, base=bases[layer], residual=residual.clone(), ratio=ratio.clone())
    return found
