"""The one clock: candidates interleaved, weights cold, p20 / p50 / p80 in microseconds.

In every round each candidate runs once on the next copy of its weights, so drifts of the machine (frequency, other
tenants) hit all candidates alike and only ratios within one call are meant to be compared. Weights are cold when at
least four times the last-level cache passes between two uses of the same copy: with `c` copies and B bytes of
weights that all candidates together read in one round, that is c B >= 4 LLC. Copies thus shrink as candidates are
added, and memory stays at about 4 LLC for the whole set. Activations stay warm, as they do in a model.

Left out: an explicit cache flush between runs (it costs as much memory and empties the instruction and page caches
too, which real use does not).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CACHE_BYTES = 32 << 20
MEMORY_LIMIT_BYTES = 512 << 20
CACHE_MULTIPLE = 4
# Small weights would need thousands of copies; a model made of such small layers sits in the cache anyway.
MAX_COPIES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Percentiles of one candidate's time in microseconds, over `runs` runs."""

    p20_us: float
    p50_us: float
    p80_us: float
    runs: int

    def per(self, parts: float) -> "Timing":
        """That of one of `parts` equal parts."""
        return Timing(
            p20_us=self.p20_us / parts, p50_us=self.p50_us / parts, p80_us=self.p80_us / parts, runs=self.runs
        )


def last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the processor's largest-level data cache; 32 MiB where the system does not tell."""
    found: list[tuple[int, int]] = []
    for index in root.glob("index*"):
        try:
            level, size = (index / "level").read_text().strip(), (index / "size").read_text().strip()
        except OSError:
            continue
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:], 1)
        digits = size.rstrip("KMG")
        if level.isdigit() and digits.isdigit():
            found.append((int(level), int(digits) * unit))
    return max(found)[1] if found else DEFAULT_CACHE_BYTES


def copies_for(bytes_per_round: float, cache_bytes: int | None = None, limit_bytes: int = MEMORY_LIMIT_BYTES) -> int:
    """How many copies of the weights make them cold, at least 1 and at most `MAX_COPIES`.

    Args:
        bytes_per_round: weight bytes that all candidates of one `time_interleaved` call read in a round.
        cache_bytes: last-level cache, None to ask the system.
        limit_bytes: most memory that all copies together may take; it wins, so a cache above a quarter of it is not
            fully displaced.
    """
    cache = last_level_cache_bytes() if cache_bytes is None else cache_bytes
    wanted = math.ceil(CACHE_MULTIPLE * cache / max(bytes_per_round, 1.0))
    return max(1, min(wanted, MAX_COPIES, int(limit_bytes // max(bytes_per_round, 1.0))))


def percentile(sorted_values: list[float], share: float) -> float:
    """Linear interpolation between closest ranks; `sorted_values` is not empty."""
    position = share * (len(sorted_values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(sorted_values) - 1)
    return sorted_values[low] + (position - low) * (sorted_values[high] - sorted_values[low])


def time_interleaved(
    candidates: dict[str, Callable[[int], object]],
    *,
    copies: int = 1,
    seconds_per_candidate: float = 0.15,
    min_runs: int = 5,
    max_runs: int = 400,
    synchronize: Callable[[], None] | None = None,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """Times each candidate, all with the same number of runs.

    Args:
        candidates: name -> function of the copy index in [0, `copies`).
        copies: copies of the weights in rotation, see `copies_for`.
        seconds_per_candidate: time per candidate on average; rounds stop when it is spent and `min_runs` are done.
        synchronize: waits for the device, called inside the timed span.
        clock_ns: the clock, in nanoseconds.
    """
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}

    def once(name: str, copy: int) -> float:
        start = clock_ns()
        candidates[name](copy)
        if synchronize is not None:
            synchronize()
        return (clock_ns() - start) / 1e3

    for name in names:
        once(name, copies - 1)
    deadline = clock_ns() + int(seconds_per_candidate * len(names) * 1e9)
    for turn in range(max_runs):
        if turn >= min_runs and clock_ns() >= deadline:
            break
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            samples[name].append(once(name, turn % copies))
    return {name: summary(sorted(values)) for name, values in samples.items()}


def summary(values: list[float]) -> Timing:
    """Percentiles of sorted microseconds."""
    return Timing(
        p20_us=percentile(values, 0.2),
        p50_us=percentile(values, 0.5),
        p80_us=percentile(values, 0.8),
        runs=len(values),
    )
