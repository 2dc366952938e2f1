"""What every (group, scheme) costs on the target, for the workload and in the objective's unit.

    time     us per request batch: prefill once at M = batch x prompt, decode `output_tokens` times at M = batch
    bytes    stored bytes, scales included; of the KV cache those of all of the workload's tokens
    dollars  the time, at the device's price per hour

A head outside the blocks computes one position per sequence in prefill, as generation does. A tied head that stays
bfloat16 shares the embedding's bytes and costs none of its own, unless the two share a scheme, too: then the bytes are
those of the group.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lowprec.artifacts.ct_schemes import storage_format
from lowprec.errors import UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, for_tables, resolve, scheme_named
from lowprec.records import CostSample, Group, Objective, Scheme, Workload
from lowprec.results import StruckOut
from lowprec.steps.caches import Caches, cache_bytes
from lowprec.steps.calibrate import Progress
from lowprec.targets import CacheTarget, Target

Widths = Mapping[str, tuple[int, ...]]
"""Group -> output width of each of its layers."""
Products = Callable[[Scheme, tuple[int, ...]], tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCost:
    """Cost of one group in one scheme."""

    group: str
    scheme: str
    us: float
    bytes: float


def candidates(
    groups: Sequence[Group], widths: Widths, schemes: Sequence[Scheme], target: Target
) -> tuple[dict[str, tuple[Scheme, ...]], tuple[StruckOut, ...]]:
    """The schemes that the target can run for each group, bfloat16 always first, and what was struck out and why.

    Of names that come to the same numbers for a group, the first one stands for all.
    """
    allowed: dict[str, tuple[Scheme, ...]] = {}
    struck: dict[tuple[str, int, int], StruckOut] = {}
    for group in groups:
        kept = [scheme_named("bf16")]
        for scheme in schemes:
            if (for_tables(scheme) and not group.tables) or (group.is_embedding and scheme.activation is not None):
                continue
            reason, settled = None, scheme
            try:
                settled = resolve(scheme, group.k)
            except UnsupportedError as error:
                reason = str(error)
            for n in widths[group.name]:
                reason = reason or target.supports(settled, n, group.k)
                if reason:
                    struck[scheme.name, n, group.k] = StruckOut(scheme=settled.name, n=n, k=group.k, reason=reason)
                    break
            if reason is None and settled.name != "bf16":
                kept.append(settled)
        distinct: dict[tuple[str | None, str | None], Scheme] = {}
        for scheme in kept:
            distinct.setdefault((scheme.weight, scheme.activation), scheme)
        allowed[group.name] = tuple(distinct.values())
    return allowed, tuple(struck.values())


def rows_of(group: Group, workload: Workload) -> tuple[int, int]:
    """(M in prefill, M in decode) of the group's matmuls."""
    return (workload.decode_m if group.block is None else workload.prefill_m), workload.decode_m


def time_shapes(
    groups: Sequence[Group],
    widths: Widths,
    allowed: Mapping[str, Sequence[Scheme]],
    workload: Workload,
    target: Target,
    progress: Progress = lambda done, total: None,
) -> list[CostSample]:
    """Times every distinct (shape, scheme, M) that some group needs, once."""
    wanted: dict[tuple[int, ...], dict[tuple[int, int], None]] = {}
    needed: dict[tuple[tuple[int, int], tuple[int, ...]], dict[str, Scheme]] = {}
    for group in groups:
        if group.is_embedding:
            continue
        ms = tuple(sorted(set(rows_of(group, workload))))
        for scheme in allowed[group.name]:
            for n in target.products(scheme, widths[group.name]):
                wanted.setdefault(ms, {})[n, group.k] = None
                needed.setdefault(((n, group.k), ms), {})[scheme.name] = scheme
    jobs = [(shape, ms) for ms, shapes in wanted.items() for shape in shapes]
    samples: list[CostSample] = []
    for done, (shape, ms) in enumerate(jobs):
        samples += target.time([shape], list(needed[shape, ms].values()), list(ms))
        progress(done + 1, len(jobs))
    return samples


def group_costs(
    groups: Sequence[Group],
    widths: Widths,
    allowed: Mapping[str, Sequence[Scheme]],
    workload: Workload,
    samples: Sequence[CostSample],
    products: Products = lambda scheme, widths: widths,
    tied: Sequence[str] = (),
    own_bytes: int = 2,
) -> dict[tuple[str, str], GroupCost]:
    """(group, scheme) -> cost.

    Args:
        products: the target's (`lowprec.targets.Target.products`).
        tied: groups whose unquantised weight is that of an embedding which stays as it is.
        own_bytes: of one unquantised weight.
    """
    time = {(s.scheme, s.n, s.k, s.m): s.p50_us for s in samples}
    costs = {}
    for group in groups:
        prefill, decode = rows_of(group, workload)
        for scheme in allowed[group.name]:
            # A few rows are read of an embedding, nothing is multiplied.
            multiplied = () if group.is_embedding else products(scheme, widths[group.name])
            us = sum(
                time[scheme.name, n, group.k, prefill] + workload.output_tokens * time[scheme.name, n, group.k, decode]
                for n in multiplied
            )
            size = 0.0 if scheme.weight is None and group.name in tied else stored_bytes(group, scheme, own_bytes)
            costs[group.name, scheme.name] = GroupCost(group=group.name, scheme=scheme.name, us=us, bytes=size)
    return costs


Held = tuple[int, int]
"""(tokens that are stored at a time, tokens that are there before)."""


def _held(workload: Workload) -> tuple[Held, Held]:
    """Of prefill, and of the middle step of decoding."""
    return (workload.prompt_tokens, 0), (1, workload.prompt_tokens + workload.output_tokens // 2)


def time_caches(caches: Caches, workload: Workload, target: CacheTarget) -> list[CostSample]:
    """Times what storing and handing out takes, in prefill and in decode, for every distinct size of a layer's part."""
    sizes = {(p.heads, p.width, p.queries): p for group in caches.groups for p in group.places}
    formats = (None, caches.format)
    return [
        sample
        for place in sizes.values()
        for added, held in _held(workload)
        for sample in target.time_cache(place, formats, workload.batch, added, held)
    ]


def cache_costs(
    caches: Caches, workload: Workload, samples: Sequence[CostSample], own_bytes: int = 2
) -> dict[tuple[str, str], GroupCost]:
    """(group of the cache, scheme) -> cost; `own_bytes` of a number that is not rounded."""
    time = {(s.scheme, s.k, s.n, s.m): s.p50_us for s in samples}
    (prompt, _), (step, held) = _held(workload)
    costs = {}
    for group in caches.groups:
        for scheme in ("bf16", caches.format):
            us = sum(
                time[scheme, p.heads * p.width, prompt, workload.batch * prompt]
                + workload.output_tokens * time[scheme, p.heads * p.width, held + step, workload.batch * step]
                for p in group.places
            )
            size = cache_bytes(group.places, None if scheme == "bf16" else scheme, workload, own_bytes)
            costs[group.name, scheme] = GroupCost(group=group.name, scheme=scheme, us=us, bytes=size)
    return costs


def stored_bytes(group: Group, scheme: Scheme, own_bytes: int = 2) -> float:
    """Bytes of the group's weights in `scheme`, scales included; `own_bytes` for each unquantised weight."""
    if scheme.weight is None:
        return float(own_bytes * group.parameters)
    fmt = WEIGHT_FORMATS[scheme.weight]
    codes = group.n * fmt.bytes_per_row(group.k)
    if storage_format(scheme) == "int-quantized" and fmt.bits < 8:
        # Runtimes read 4-bit weights that meet INT8 activations one to a byte.
        codes += group.parameters * (8 - fmt.bits) / 8
    return codes


def in_unit(cost: GroupCost, objective: Objective) -> float:
    """The cost that the allocation minimises; dollars are proportional to time."""
    return cost.bytes if objective == "bytes" else cost.us
