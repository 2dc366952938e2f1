"""The clock of `lowprec_kernels.timing_cuda` with the limits of a run; in the smoke run the host's clock."""

import time
from collections.abc import Mapping

import torch

from bench.gpu.setting import Setting
from lowprec_kernels.timing import Timing, summary
from lowprec_kernels.timing_cuda import Graph, Launch, copies_for, graph_of, replayed

__all__ = ["Clock", "Graph", "Launch", "copies_for"]


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

    def prepared(self, launch: Launch, copies: int) -> Graph | None:
        """Runs a launch and captures it, often enough to last `graph_us`; None in the smoke run."""
        self.once_us(launch)
        if self.setting.smoke:
            return None
        return graph_of(launch, copies, self.setting.graph_us)

    def interleaved(
        self, launches: Mapping[str, tuple[Launch, int]], *, sample_ms: float | None = None
    ) -> dict[str, Timing]:
        """Times candidates, name -> (launch, copies of its weights).

        Args:
            sample_ms: time for each candidate, None for the setting's.
        """
        graphs = {name: self.prepared(launch, copies) for name, (launch, copies) in launches.items()}
        if self.setting.smoke:
            return {name: summary([self.once_us(launch)]) for name, (launch, _) in launches.items()}
        found = {name: graph for name, graph in graphs.items() if graph is not None}
        return self.replayed(found, self.setting.sample_ms if sample_ms is None else sample_ms)

    def replayed(self, graphs: Mapping[str, Graph], sample_ms: float) -> dict[str, Timing]:
        """Times captured graphs, all with the same number of rounds."""
        return replayed(graphs, sample_ms)
