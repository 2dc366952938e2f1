"""The clock on a GPU: CUDA graphs over rotated weights, candidates interleaved, p20 / p50 / p80 of a launch.

A graph holds one launch for each copy of the weights, so that neither a launch from Python nor the gap before it is in
the time, and no launch finds its weights in the L2 cache: what `timing.py` says of cold weights holds here for the L2.
In every round each candidate's graph is replayed once, between two events; the order shifts by one from round to round.
The queue is filled behind a short wait, so that the device never waits for the host.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lowprec_kernels.timing import Timing, summary

Launch = Callable[[int], object]
MOST_LAUNCHES = 64
MOST_ROUNDS = 40
FEWEST_ROUNDS = 3
# A graph that is shorter holds its copies more than once.
GRAPH_US = 200.0
# Cycles that the device waits, about a millisecond.
HEAD_START = 2_000_000


def copies_for(bytes_each: float, rotate_bytes: float) -> int:
    """Copies of a weight of `bytes_each` so that `rotate_bytes` are read before one is read again."""
    return max(1, min(MOST_LAUNCHES, math.ceil(rotate_bytes / max(bytes_each, 1.0))))


@functools.cache
def _stream_and_pool() -> tuple[torch.cuda.Stream, Any, torch.cuda.CUDAGraph]:
    """What all captures use: one stream, one pool of memory, since graphs run one after the other and nobody reads
    their results, and a graph that keeps the pool when all others are gone."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    pool: Any = torch.cuda.graph_pool_handle()
    keeper = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        keeper.capture_begin(pool=pool, capture_error_mode="thread_local")
        torch.zeros(1, device="cuda")
        keeper.capture_end()
    return stream, pool, keeper


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of what `work` launches; what it launches must have run before.

    `torch.cuda.graph` would empty the allocator's cache each time, which costs more than the capture.
    """
    stream, pool, _ = _stream_and_pool()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            # What is left of the capture is ended as well as it can be, and stream and pool are not used again.
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            _stream_and_pool.cache_clear()
            raise
        graph.capture_end()
    return graph


class Graph:
    """A captured sequence of launches, `launch(i % copies)` for i in [0, count)."""

    def __init__(self, launch: Launch, count: int, copies: int) -> None:
        self.count = count
        # What was launched holds the inputs, which are read at every replay.
        self._launch = launch
        self._graph = captured(lambda: self._launch_all(copies))

    def _launch_all(self, copies: int) -> None:
        for i in range(self.count):
            self._launch(i % copies)

    def replay(self) -> None:
        """Runs it on the current stream."""
        self._graph.replay()


def graph_of(launch: Launch, copies: int, graph_us: float = GRAPH_US) -> Graph:
    """Captures a launch, which must have run before, often enough to last `graph_us`."""
    graph = Graph(launch, copies, copies)
    # The first replay of a graph also loads it.
    us = min(rounds({"": graph}, 2)[""])
    wanted = min(MOST_LAUNCHES, math.ceil(graph_us / max(us, 0.1)))
    return graph if wanted <= copies else Graph(launch, copies * math.ceil(wanted / copies), copies)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def rounds(graphs: Mapping[str, Graph], count: int) -> dict[str, list[float]]:
    """Microseconds of a launch, by name, for each of `count` rounds."""
    names = list(graphs)
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
    torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
    for turn in range(count):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            before, after = _event(), _event()
            before.record()
            graphs[name].replay()
            after.record()
            events.append((name, before, after))
    torch.cuda.synchronize()
    found: dict[str, list[float]] = {name: [] for name in names}
    for name, before, after in events:
        found[name].append(before.elapsed_time(after) * 1e3 / graphs[name].count)
    return found


def replayed(graphs: Mapping[str, Graph], sample_ms: float) -> dict[str, Timing]:
    """Times captured graphs, all with the same number of rounds, about `sample_ms` each."""
    first = rounds(graphs, 1)
    slowest_ms = max(first[name][0] * graphs[name].count for name in graphs) / 1e3
    count = max(FEWEST_ROUNDS, min(MOST_ROUNDS, math.ceil(sample_ms / max(slowest_ms, 1e-3))))
    return {name: summary(sorted(values)) for name, values in rounds(graphs, count).items()}


def time_graphed(candidates: Mapping[str, Launch], *, copies: int, sample_ms: float = 30.0) -> dict[str, Timing]:
    """Times candidates, each a launch that takes the number of a copy in [0, `copies`)."""
    for launch in candidates.values():
        launch(0)
    torch.cuda.synchronize()
    return replayed({name: graph_of(launch, copies) for name, launch in candidates.items()}, sample_ms)
