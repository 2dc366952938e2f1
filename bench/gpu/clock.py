"""Times of launches on a GPU: CUDA graphs over rotated weights, candidates interleaved, p20 / p50 / p80 of a launch.

A graph holds one launch for each copy of the weights (or more, until it lasts `graph_us`), so that neither the launch
from Python nor its gap is in the time, and no launch finds its weights in the L2 cache: `rotate_bytes` pass between two
uses of a copy. In every round each candidate's graph is replayed once, between two events; the order shifts by one from
round to round. The queue is filled by a short wait first, so that the device never waits for the host.

On a CPU (the smoke run) there are no graphs, and the host's clock is read.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping

import torch

from bench.gpu.setting import Setting
from lowprec_kernels.timing import Timing, percentile

Launch = Callable[[int], object]
MOST_LAUNCHES = 64
MOST_ROUNDS = 40
FEWEST_ROUNDS = 3
# Cycles that the device waits, about a millisecond.
HEAD_START = 2_000_000


def copies_for(bytes_each: float, rotate_bytes: float) -> int:
    """Copies of a weight of `bytes_each` so that `rotate_bytes` are read before one is read again."""
    return max(1, min(MOST_LAUNCHES, math.ceil(rotate_bytes / max(bytes_each, 1.0))))


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


@functools.cache
def _stream_and_pool() -> tuple[torch.cuda.Stream, tuple[int, int], torch.cuda.CUDAGraph]:
    """What all captures use: one stream, one pool of memory, since graphs run one after the other and nobody reads
    their results, and a graph that keeps the pool when all others are gone."""
    stream, pool, keeper = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
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


class Clock:
    """Measures candidates, each a launch that takes the number of a copy."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def once_us(self, launch: Launch) -> float:
        """Runs it twice, for everything that happens at first use; the second run's time."""
        launch(0)
        if self.setting.smoke:
            start = time.perf_counter_ns()
            launch(0)
            return (time.perf_counter_ns() - start) / 1e3
        torch.cuda.synchronize()
        start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start_event.record()
        launch(0)
        end_event.record()
        torch.cuda.synchronize()
        return start_event.elapsed_time(end_event) * 1e3

    def prepared(self, launch: Launch, copies: int) -> "Graph | None":
        """Runs a launch and captures it, often enough to last `graph_us`; None in the smoke run."""
        self.once_us(launch)
        if self.setting.smoke:
            return None
        graph = Graph(launch, copies, copies)
        # The first replay of a graph also loads it.
        us = min(self._rounds({"": graph}, [""], 2)[""])
        wanted = min(MOST_LAUNCHES, math.ceil(self.setting.graph_us / max(us, 0.1)))
        if wanted <= copies:
            return graph
        return Graph(launch, copies * math.ceil(wanted / copies), copies)

    def interleaved(
        self, launches: Mapping[str, tuple[Launch, int]], *, sample_ms: float | None = None
    ) -> dict[str, Timing]:
        """Times candidates, name -> (launch, copies of its weights).

        Args:
            sample_ms: time for each candidate, None for the setting's.
        """
        graphs = {name: self.prepared(launch, copies) for name, (launch, copies) in launches.items()}
        captured = {name: graph for name, graph in graphs.items() if graph is not None}
        if self.setting.smoke:
            return {name: _host_timing(launch) for name, (launch, _) in launches.items()}
        return self.replayed(captured, self.setting.sample_ms if sample_ms is None else sample_ms)

    def replayed(self, graphs: Mapping[str, Graph], sample_ms: float) -> dict[str, Timing]:
        """Times captured graphs, all with the same number of rounds."""
        names = list(graphs)
        first = self._rounds(graphs, names, 1)
        slowest_ms = max(first[name][0] * graphs[name].count for name in names) / 1e3
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, math.ceil(sample_ms / max(slowest_ms, 1e-3))))
        samples = self._rounds(graphs, names, rounds)
        return {name: _summary(sorted(samples[name])) for name in names}

    @staticmethod
    def _rounds(graphs: Mapping[str, Graph], names: list[str], rounds: int) -> dict[str, list[float]]:
        """Microseconds of a launch, by name, for each round."""
        events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        torch.cuda._sleep(HEAD_START)
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                before.record()
                graphs[name].replay()
                after.record()
                events.append((name, before, after))
        torch.cuda.synchronize()
        found: dict[str, list[float]] = {name: [] for name in names}
        for name, before, after in events:
            found[name].append(before.elapsed_time(after) * 1e3 / graphs[name].count)
        return found


def _host_timing(launch: Launch) -> Timing:
    start = time.perf_counter_ns()
    launch(0)
    return _summary([(time.perf_counter_ns() - start) / 1e3])


def _summary(values: list[float]) -> Timing:
    return Timing(
        p20_us=percentile(values, 0.2), p50_us=percentile(values, 0.5), p80_us=percentile(values, 0.8), runs=len(values)
    )
