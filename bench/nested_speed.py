"""How long one row of x takes at each level of nested weights on this CPU, against plain INT8, weights cold.

Each candidate has copies of its own, so that none reads what another has just brought into the cache. Plain INT8 is
every kernel that a runtime here could choose for it: weights alone (w8a16, what level 8 computes) and, with inputs
rounded to INT8, w8a8; the bar is the fastest of the former, both ratios are given. Machines that others compute on
have quiet moments: the bars are on the 20th percentile.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from lowprec.runtime.measure import nested_candidate, nested_copies, random_nested
from lowprec_kernels.cpu_nested import few_rows_form
from lowprec_kernels.kernel import Kernel, Operands, State, kernels_for
from lowprec_kernels.slow import NAME as REFERENCE
from lowprec_kernels.timing import Timing, copies_for, last_level_cache_bytes, time_interleaved

SHAPES = ((2048, 2048), (4096, 4096), (1536, 576))
GROUPS = (64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """Microseconds (p20, p50, p80) of one shape, and ratios of the medians of rounds.

    `level8_over_level4` is how much faster level 4 is; the others how level 8 compares with plain INT8.
    """

    n: int
    k: int
    group: int
    threads: int
    copies: int
    form: str
    times_us: dict[str, tuple[float, float, float]]
    fastest_w8a16: str
    fastest_w8a8: str
    level8_over_level4: float
    level8_over_w8a16: float
    level8_over_w8a8: float


def _int8(n: int, k: int) -> Operands:
    return Operands(
        weight="int8", codes=torch.randint(-127, 128, (n, k), dtype=torch.int8), scale=0.001 + 0.02 * torch.rand(n, 1)
    )


def plain(n: int, k: int, activation: str | None) -> dict[str, Kernel]:
    """The INT8 kernels that run this shape."""
    found = kernels_for("int8", activation, "cpu")
    return {
        name: kernel
        for name, kernel in found.items()
        if name != REFERENCE and not name.startswith("dequantize") and kernel.supports(1, n, k) is None
    }


def _run(kernel: Kernel, states: list[State], x: Tensor) -> Callable[[int], object]:
    return lambda copy: kernel.run(states[copy], x)


def measure(n: int, k: int, group: int, seconds: float) -> SpeedRow:
    """One shape, on the threads that torch has."""
    x = torch.randn(1, k).to(torch.bfloat16)
    int8 = {f"w8a16 {name}": kernel for name, kernel in plain(n, k, None).items()}
    int8 |= {f"w8a8 {name}": kernel for name, kernel in plain(n, k, "int8").items()}
    copies = copies_for(n * k * (1.5 + len(int8)), last_level_cache_bytes())
    fmt = f"int4-g{group}"
    candidates = {
        f"level {level}": nested_candidate(nested_copies(random_nested(fmt, n, k), copies), level, x)
        for level in (4, 8)
    }
    for name, kernel in int8.items():
        candidates[name] = _run(kernel, [kernel.prepare(_int8(n, k)) for _ in range(copies)], x)
    times = time_interleaved(candidates, copies=copies, seconds_per_candidate=seconds, max_runs=4000)

    def fastest(kind: str) -> str:
        return min((name for name in times if name.startswith(f"{kind} ")), key=lambda name: times[name].p20_us)

    def ratio(one: str, other: str) -> float:
        # The lower percentile: others compute on such machines, and what they take is no part of a kernel's time.
        return times[one].p20_us / times[other].p20_us

    weights, inputs = fastest("w8a16"), fastest("w8a8")
    return SpeedRow(
        n=n, k=k, group=group, threads=torch.get_num_threads(), copies=copies, form=few_rows_form(group),
        times_us={name: _percentiles(t) for name, t in times.items()}, fastest_w8a16=weights, fastest_w8a8=inputs,
        level8_over_level4=ratio("level 8", "level 4"), level8_over_w8a16=ratio("level 8", weights),
        level8_over_w8a8=ratio("level 8", inputs),
    )  # fmt: skip


def _percentiles(time: Timing) -> tuple[float, float, float]:
    return round(time.p20_us, 1), round(time.p50_us, 1), round(time.p80_us, 1)


def rows(seconds: float) -> list[SpeedRow]:
    """All shapes and groups that fit."""
    return [measure(n, k, group, seconds) for n, k in SHAPES for group in GROUPS if k % group == 0]
