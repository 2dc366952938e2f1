"""Which configuration a Triton kernel is launched with: looked up in a table, never searched for on the request path.

A `Family` is a kernel with its candidates, at most `MOST_CANDIDATES` for a problem, the best guess first, those that
the device cannot hold dropped by a resource model. `tune` measures them once per device, shape and bucket of rows; what
wins goes into a JSON table. Tables for the devices that were at hand ship in `tuned/`; another place can be named by
the environment variable `LOWPREC_TUNED`. `config_for` takes the entry of the nearest shape in the same bucket, and the
best guess where there is no entry: it reads a dictionary and neither compiles nor measures.
"""

import functools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

MOST_CANDIDATES = 20
# Upper ends of the buckets of rows; more rows than the last are in the last.
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
# What a block of sm_80 (164 KB) to sm_90 (227 KB) may hold; the smaller of sm_86 and sm_89 is asked of the device.
DEFAULT_SHARED_BYTES = 227 << 10
MEMORY_OR_FORM = re.compile(r"\d+gb|hbm\w*|sxm\d*|pcie|nvl")
TABLES = Path(__file__).parent / "tuned"
VARIABLE = "LOWPREC_TUNED"
LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one launch is cut up.

    Attributes:
        block_m, block_n, block_k: tile in rows of x, rows of w, and the summed dimension.
        warps: warps of a block.
        stages: depth of the software pipeline.
        split_k: blocks that share one tile's sum.
        group_m: tiles of rows that run side by side, so that they share weights in the L2 cache.
        form: which of the family's kernels, where it has several.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    split_k: int = 1
    group_m: int = 8
    form: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """x[m, k] @ w[n, k]^T; with `experts`, m is the mean number of rows of one."""

    m: int
    n: int
    k: int
    experts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kernel and what it may be launched with.

    Attributes:
        name: unique; also names what changes the best choice (the group size, the format of the scales).
        candidates: problem -> configurations, the best guess first.
        bytes_x, bytes_w: bytes of one element of the tiles in shared memory, for the resource model.
    """

    name: str
    candidates: Callable[[Problem], Sequence[Config]]
    bytes_x: float
    bytes_w: float

    def shared_bytes(self, config: Config) -> float:
        """Shared memory of a block: every stage holds a tile of x and one of w."""
        tile = config.block_m * config.block_k * self.bytes_x + config.block_n * config.block_k * self.bytes_w
        return tile * config.stages

    def fitting(self, problem: Problem, shared_bytes: int = DEFAULT_SHARED_BYTES) -> tuple[Config, ...]:
        """The candidates that fit, in order.

        Raises:
            ValueError: none fits, or there are too many.
        """
        found = tuple(self.candidates(problem))
        if len(found) > MOST_CANDIDATES:
            raise ValueError(f"{self.name}: {len(found)} candidates, at most {MOST_CANDIDATES} are tuned")
        fitting = tuple(c for c in found if self.shared_bytes(c) <= shared_bytes)
        if not fitting:
            raise ValueError(
                f"{self.name}: none of {len(found)} configurations fits {shared_bytes} bytes of shared memory"
            )
        return fitting


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A measured choice."""

    problem: Problem
    config: Config
    p50_us: float


def bucket(m: int) -> int:
    """The upper end of the bucket that `m` rows fall into."""
    return next((end for end in BUCKETS if m <= end), BUCKETS[-1])


def device_slug(name: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'nvidia-h100': the product, without memory and form factor."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if not MEMORY_OR_FORM.fullmatch(word))


def table_path(name: str) -> Path:
    """Where the table of the device called `name` is kept."""
    return Path(os.environ.get(VARIABLE, TABLES)) / f"{device_slug(name)}.json"


@functools.cache
def load_table(path: Path) -> dict[tuple[str, int], dict[tuple[int, int, int], Entry]]:
    """(family, bucket) -> (n, k, experts) -> entry; empty where the file does not exist."""
    table: dict[tuple[str, int], dict[tuple[int, int, int], Entry]] = {}
    if not path.exists():
        return table
    for family, rows in json.loads(path.read_text())["families"].items():
        for row in rows:
            problem = Problem(**row["problem"])
            entry = Entry(problem=problem, config=Config(**row["config"]), p50_us=row["p50_us"])
            table.setdefault((family, bucket(problem.m)), {})[problem.n, problem.k, problem.experts] = entry
    return table


def save_table(path: Path, device: str, versions: dict[str, str], entries: dict[str, Sequence[Entry]]) -> None:
    """Writes a table: device, versions and, by family, what was measured."""
    content: dict[str, Any] = {
        "device": device,
        "versions": versions,
        "families": {
            family: [
                {"problem": asdict(e.problem), "config": asdict(e.config), "p50_us": round(e.p50_us, 2)} for e in rows
            ]
            for family, rows in sorted(entries.items())
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    load_table.cache_clear()
    _config_for.cache_clear()


def tune(
    work: Iterable[tuple[Family, Problem]],
    time_one: Callable[[Family, Problem, Config], float | None],
    shared_bytes: int = DEFAULT_SHARED_BYTES,
) -> dict[str, tuple[Entry, ...]]:
    """Times the candidates of each problem -> family -> the fastest of each, as `save_table` takes them.

    Args:
        work: families with the problems that they are measured on.
        time_one: (family, problem, configuration) -> microseconds, or None if it did not run.
        shared_bytes: what a block may hold on the device.

    A problem on which no candidate ran has no entry.
    """
    entries: dict[str, list[Entry]] = {}
    for family, problem in work:
        # Those that `config_for` will look for, who knows the bucket alone.
        candidates = family.fitting(replace(problem, m=bucket(problem.m)), shared_bytes)
        times = [(us, config) for config in candidates if (us := time_one(family, problem, config)) is not None]
        if not times:
            LOG.warning("%s: none of %d configurations ran for %s", family.name, len(candidates), problem)
            continue
        p50_us, config = min(times, key=lambda timed: timed[0])
        entries.setdefault(family.name, []).append(Entry(problem=problem, config=config, p50_us=p50_us))
    return {name: tuple(rows) for name, rows in entries.items()}


@functools.cache
def device_of(index: int) -> tuple[str, int]:
    """Name and shared memory per block of a CUDA device."""
    # The stubs of torch's CPU build do not know the second.
    properties: Any = torch.cuda.get_device_properties(index)
    return str(properties.name), int(properties.shared_memory_per_block_optin)


def config_for(family: Family, problem: Problem, device: torch.device) -> Config:
    """The configuration to launch `family` with; on a CPU (Triton's interpreter) the best guess."""
    if device.type != "cuda":
        return family.fitting(replace(problem, m=bucket(problem.m)))[0]
    index = torch.cuda.current_device() if device.index is None else device.index
    return _config_for(family, problem.n, problem.k, problem.experts, bucket(problem.m), index)


@functools.cache
def _config_for(family: Family, n: int, k: int, experts: int, end: int, index: int) -> Config:
    name, shared = device_of(index)
    fitting = family.fitting(Problem(m=end, n=n, k=k, experts=experts), shared)
    table = load_table(table_path(name))
    for other in sorted(BUCKETS, key=lambda b: abs(math.log(b / end))):
        known = table.get((family.name, other), {})
        near = sorted(known, key=lambda shape: (_distance(shape, (n, k, experts)), shape))
        for shape in near:
            # An entry outlives the list of candidates it was chosen from only as long as it is on the list.
            if known[shape].config in fitting:
                return known[shape].config
    return fitting[0]


def _distance(shape: tuple[int, ...], other: tuple[int, ...]) -> float:
    return sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in zip(shape, other, strict=True))
