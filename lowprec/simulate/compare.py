"""The controller, every static rung that is asked for, and the oracle on one trace."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowprec.ladder import Ladder
from lowprec.records import SCHEMA_VERSION, Origin
from lowprec.runtime.controller import Controller, Objectives, Tuning
from lowprec.runtime.spending import LossBudget
from lowprec.simulate.measure import PolicyResult, summarise
from lowprec.simulate.policies import Foresight, Static
from lowprec.simulate.server import Outcome, Server, replay
from lowprec.simulate.traces import Floats, Trace

CONTROLLER, ORACLE = "controller", "oracle"
MOMENTS = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One stretch of the trace's time under one policy.

    Attributes:
        start_s: where it begins.
        arrivals_per_s: requests.
        rung: mean index of the wanted rung.
        waiting: mean requests in the queue.
        ttft_s: 95th percentile of those that arrived in it; None where nobody did.
    """

    start_s: float
    arrivals_per_s: float
    rung: float
    waiting: float
    ttft_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A policy over time."""

    policy: str
    moments: tuple[Moment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a simulation found. Losses are nats per token, the rungs' upper bounds.

    Attributes:
        origin: measured where every time and loss of the ladder is.
        capacities: (rung, requests a second that it can serve), where it is known.
    """

    trace: str
    seed: int | None
    seconds: float
    requests: int
    ladder_model: str
    ladder_device: str
    origin: Origin
    rungs: tuple[str, ...]
    slots: int
    chunk: int
    truth: float
    ttft_s: float
    tpot_s: float
    percentile: float
    budget_nats: float
    window_tokens: int
    capacities: tuple[tuple[str, float], ...]
    results: tuple[PolicyResult, ...]
    series: tuple[Series, ...]
    bursts: tuple[tuple[float, float], ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    schema_version: int = SCHEMA_VERSION

    def result(self, policy: str) -> PolicyResult:
        """The result of a policy by name."""
        return next(r for r in self.results if r.policy == policy)


def static_name(ladder: Ladder, rung: int) -> str:
    """What a fixed rung is called in results."""
    return f"static {ladder.rungs[rung].name}"


def compare(
    trace: Trace,
    server: Server,
    objectives: Objectives,
    budget: LossBudget,
    *,
    statics: Sequence[int] | None = None,
    oracle: bool = True,
    seed: int | None = None,
    capacities: Sequence[tuple[str, float]] = (),
    tuning: Tuning | None = None,
) -> Comparison:
    """Replays `trace` under each policy.

    Args:
        statics: indices of the fixed rungs to compare with; the top and the bottom by default.

    Raises:
        ConfigError: objectives or a budget that no rung meets.
    """
    ladder, window = server.ladder, budget.window_tokens
    results: list[PolicyResult] = []
    series: list[Series] = []

    def enter(name: str, outcome: Outcome, events: Sequence[tuple[str, int]] = (), *, returns: bool = True) -> None:
        results.append(summarise(name, trace, outcome, ladder, objectives, window, events, returns=returns))
        series.append(Series(policy=name, moments=_moments(trace, outcome)))

    def controller(kind: type[Controller]) -> Controller:
        return kind(ladder, objectives, budget, slots=server.slots, longest_prompt=server.chunk, tuning=tuning)

    live = controller(Controller)
    enter(CONTROLLER, replay(trace, server, live), tuple(live.events.items()))
    for rung in sorted({ladder.top, 0} if statics is None else set(statics), reverse=True):
        enter(static_name(ladder, rung), replay(trace, server, Static(ladder, rung)), returns=False)
    if oracle:
        seer = controller(Foresight)
        assert isinstance(seer, Foresight)
        enter(ORACLE, replay(trace, server, seer.follow(trace)), tuple(seer.events.items()))
    return Comparison(
        trace=trace.name,
        seed=seed,
        seconds=trace.end_s,
        requests=len(trace),
        ladder_model=ladder.model,
        ladder_device=ladder.device,
        origin="measured" if all(rung.is_measured for rung in ladder.rungs) else "modelled",
        rungs=tuple(rung.name for rung in ladder.rungs),
        slots=server.slots,
        chunk=server.chunk,
        truth=server.truth,
        ttft_s=objectives.ttft_s,
        tpot_s=objectives.tpot_s,
        percentile=objectives.percentile,
        budget_nats=budget.nats_per_token,
        window_tokens=window,
        capacities=tuple(capacities),
        results=tuple(results),
        series=tuple(series),
        bursts=trace.bursts,
        notes=ladder.notes,
    )


def _moments(trace: Trace, outcome: Outcome) -> tuple[Moment, ...]:
    """The trace's time in `MOMENTS` equal stretches."""
    if not len(trace) or trace.end_s <= 0:
        return ()
    edges = np.linspace(0.0, trace.end_s, MOMENTS + 1)
    length = edges[1]
    first = np.searchsorted(trace.arrival_s, edges)
    ttft = outcome.first_s - trace.arrival_s
    rung = _mean_over(edges, np.array([t for t, _ in outcome.wanted]), np.array([float(r) for _, r in outcome.wanted]))
    # The integral of the queue's length: what has waited until then, summed over requests.
    events = np.concatenate([trace.arrival_s, outcome.start_s])
    order = np.argsort(events, kind="stable")
    steps = np.cumsum(np.concatenate([np.ones(len(trace)), -np.ones(len(trace))])[order])
    waiting = _mean_over(edges, np.concatenate([[0.0], events[order]]), np.concatenate([[0.0], steps]))
    return tuple(
        Moment(
            start_s=float(edges[i]),
            arrivals_per_s=float((first[i + 1] - first[i]) / length),
            rung=float(rung[i]),
            waiting=float(waiting[i]),
            ttft_s=float(np.percentile(ttft[first[i] : first[i + 1]], 95)) if first[i + 1] > first[i] else None,
        )
        for i in range(MOMENTS)
    )


def _mean_over(edges: Floats, times: Floats, values: Floats) -> Floats:
    """Mean between neighbouring edges of a function that steps to `values` at `times`."""
    sums = np.concatenate([[0.0], np.cumsum(np.diff(times) * values[:-1])])
    beyond = np.maximum(edges - times[-1], 0.0) * values[-1]
    means: Floats = np.diff(np.interp(edges, times, sums) + beyond) / np.diff(edges)
    return means
