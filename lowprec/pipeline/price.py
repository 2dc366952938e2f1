"""Stage 3: what every (group, scheme) costs on the target, for the workload."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lowprec.pipeline.prepare import Prepared
from lowprec.records import CostSample
from lowprec.steps.cost import GroupCost, cache_costs, group_costs, time_caches, time_shapes
from lowprec.targets import CacheTarget


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Priced:
    """The timed (or modelled) shapes, and the groups' sums: (group, scheme) -> cost; those of the KV cache included."""

    samples: tuple[CostSample, ...]
    costs: Mapping[tuple[str, str], GroupCost]


def price(prepared: Prepared) -> Priced:
    """Times every shape in every scheme that the folder has no time of, and adds up the groups."""
    context = prepared.context
    target, workload = context.target, context.settings.workload
    inputs = {
        "model": context.model.revision,
        "schemes": prepared.inputs["schemes"],
        "workload": repr(workload),
        "target": f"{target.name} on {target.device}",
        "torch": torch.__version__,
    }
    samples: tuple[CostSample, ...] | None = context.folder.read_step("cost", inputs, tuple[CostSample, ...])
    if samples is None:
        with context.progress.step("cost", unit="shapes") as step:
            samples = tuple(
                time_shapes(prepared.groups, prepared.widths, prepared.allowed, workload, target, step.report)
            )
        context.folder.write_step("cost", samples, inputs)
    else:
        context.progress.skip("cost", "timed by an earlier run")
    own_bytes = target.dense_bytes(context.model.dtype.itemsize)
    costs = group_costs(
        prepared.groups,
        prepared.widths,
        prepared.allowed,
        workload,
        samples,
        target.products,
        tied_groups(prepared),
        own_bytes,
    )
    return Priced(samples=samples, costs={**costs, **_cached(prepared, inputs)})


def _cached(prepared: Prepared, inputs: Mapping[str, str]) -> dict[tuple[str, str], GroupCost]:
    """The costs of the cache's groups; their times are kept apart from those that kernels are chosen by."""
    context, caches = prepared.context, prepared.caches
    if not caches.groups:
        return {}
    target, workload = context.target, context.settings.workload
    assert isinstance(target, CacheTarget)
    inputs = {**inputs, "cache": prepared.inputs["cache"]}
    samples: tuple[CostSample, ...] | None = context.folder.read_step("cost-cache", inputs, tuple[CostSample, ...])
    if samples is None:
        with context.progress.step("cost of the cache"):
            samples = tuple(time_caches(caches, workload, target))
        context.folder.write_step("cost-cache", samples, inputs)
    return cache_costs(caches, workload, samples, target.dense_bytes(context.model.dtype.itemsize))


def tied_groups(prepared: Prepared) -> list[str]:
    """Groups whose weight is the parameter of an embedding that is not in the group."""
    embeddings = {id(m.weight) for m in prepared.context.model.module.modules() if isinstance(m, nn.Embedding)}
    layers = prepared.stream.layers
    groups = [g for g in prepared.groups if not g.tables]
    return [g.name for g in groups if any(id(layers[x].weight) in embeddings for x in g.layers)]
