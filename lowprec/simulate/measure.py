"""What came of a replay: latencies, violations, tokens at each rung, loss, switches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowprec.ladder import Ladder
from lowprec.runtime.controller import Objectives
from lowprec.simulate.policies import Static
from lowprec.simulate.server import Outcome, Server, replay
from lowprec.simulate.traces import Floats, Lengths, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Percentiles over requests, in seconds."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RungTokens:
    """Tokens that were made at a rung, first tokens included."""

    rung: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """One policy on one trace.

    Attributes:
        violations: requests whose first token, or whose mean time per token, came later than its objective.
        meets: whether both hold at the objectives' percentile.
        loss_nats: mean per token, by the upper bounds of the rungs' losses.
        worst_window_nats: the largest mean over any window of consecutive tokens, as many as the budget's.
        switches: changes of the wanted rung, and how many there were within one second at most.
        pass_switches: changes from one decoding pass to the next, floors of batches included.
        return_s: from the end of the last burst until the top is wanted for good; None where there was no burst, or
            no coming back. A chance clump of requests long after the burst that takes the rung down counts in.
        regain_s: the same until the top is wanted for the first time.
        backlog_s: the same until nobody waits for the first time: what the burst has left is taken on then.
        stays_low: whether the top is not wanted at the end.
        events: (what, how often) of what the controller counts.
        busy: share of the time until the last token in which passes ran.
    """

    policy: str
    requests: int
    ttft_s: Latency
    tpot_s: Latency
    violations: int
    meets: bool
    tokens: tuple[RungTokens, ...]
    loss_nats: float
    worst_window_nats: float
    switches: int
    most_switches_in_a_second: int
    pass_switches: int
    return_s: float | None
    stays_low: bool
    busy: float
    events: tuple[tuple[str, int], ...] = ()
    regain_s: float | None = None
    backlog_s: float | None = None

    @property
    def violation_share(self) -> float:
        """Violations over requests."""
        return self.violations / self.requests if self.requests else 0.0


def latencies(trace: Trace, outcome: Outcome) -> tuple[Floats, Floats]:
    """Times to first token [N], and times per output token of the requests with two or more [M], in seconds."""
    several = trace.output > 1
    lasted = outcome.finish_s[several] - outcome.first_s[several]
    return outcome.first_s - trace.arrival_s, lasted / (trace.output[several] - 1)


def violated(trace: Trace, outcome: Outcome, objectives: Objectives) -> np.ndarray:
    """[N] whether a request missed an objective."""
    first, each = latencies(trace, outcome)
    missed = first > objectives.ttft_s
    missed[trace.output > 1] |= each > objectives.tpot_s
    return missed


def worst_window(stretches: Sequence[Sequence[int]], losses: Sequence[float], window: int) -> float:
    """The largest mean loss over `window` consecutive tokens; over all of them where there are fewer.

    Args:
        stretches: (rung, tokens) in the order the tokens were made.
        losses: nats per token of each rung.

    Summed losses are piecewise linear in the number of tokens, so the worst window begins or ends at a joint.
    """
    if not stretches:
        return 0.0
    rungs, counts = np.array(stretches).T
    joints = np.concatenate([[0], np.cumsum(counts)]).astype(float)
    sums = np.concatenate([[0.0], np.cumsum(counts * np.array(losses)[rungs])])
    if joints[-1] <= window:
        return float(sums[-1] / joints[-1])
    begins = np.concatenate([joints, joints - window])
    begins = begins[(begins >= 0) & (begins <= joints[-1] - window)]
    spent = np.interp(begins + window, joints, sums) - np.interp(begins, joints, sums)
    return float(spent.max() / window)


def most_within(times: Sequence[float], seconds: float) -> int:
    """The most of the rising `times` that fall within a half-open interval of this length."""
    at = np.array(times)
    return int((np.searchsorted(at, at + seconds, side="left") - np.arange(len(at))).max()) if len(at) else 0


def return_time(trace: Trace, outcome: Outcome, top: int) -> float | None:
    """See `PolicyResult.return_s`."""
    if not trace.bursts or outcome.wanted[-1][1] < top:
        return None
    return max(0.0, outcome.wanted[-1][0] - trace.bursts[-1][1])


def regain_time(trace: Trace, outcome: Outcome, top: int) -> float | None:
    """See `PolicyResult.regain_s`."""
    if not trace.bursts:
        return None
    end = trace.bursts[-1][1]
    if [rung for time, rung in outcome.wanted if time <= end][-1] == top:
        return 0.0
    return next((time - end for time, rung in outcome.wanted if time > end and rung == top), None)


def backlog_time(trace: Trace, outcome: Outcome) -> float | None:
    """See `PolicyResult.backlog_s`. Requests leave the queue in the order of arrival."""
    if not trace.bursts:
        return None
    end = trace.bursts[-1][1]
    first = int(np.searchsorted(trace.arrival_s, end, side="right"))
    free = max(end, float(outcome.start_s[first - 1])) if first else end
    # Who came meanwhile waits as well.
    for arrival, start in zip(trace.arrival_s[first:], outcome.start_s[first:], strict=True):
        if arrival > free:
            break
        free = max(free, float(start))
    return free - end


def summarise(
    name: str,
    trace: Trace,
    outcome: Outcome,
    ladder: Ladder,
    objectives: Objectives,
    window: int,
    events: Sequence[tuple[str, int]] = (),
    *,
    returns: bool = True,
) -> PolicyResult:
    """The figures of one replay; `returns` says whether the policy is one that should come back to the top."""
    first, each = latencies(trace, outcome)
    losses = [rung.loss_upper for rung in ladder.rungs]
    made = np.zeros(len(losses), dtype=np.int64)
    for rung, tokens in outcome.tokens:
        made[rung] += tokens
    share = 1.0 - objectives.percentile
    late = float((first > objectives.ttft_s).mean()) if len(first) else 0.0
    slow = float((each > objectives.tpot_s).mean()) if len(each) else 0.0
    over = float(outcome.finish_s.max()) if len(first) else 0.0
    return PolicyResult(
        policy=name,
        requests=len(trace),
        ttft_s=_percentiles(first),
        tpot_s=_percentiles(each),
        violations=int(violated(trace, outcome, objectives).sum()),
        meets=max(late, slow) <= share,
        tokens=tuple(RungTokens(rung=rung.name, tokens=int(n)) for rung, n in zip(ladder.rungs, made, strict=True)),
        loss_nats=float((made * np.array(losses)).sum() / max(1, made.sum())),
        worst_window_nats=worst_window(outcome.tokens, losses, window),
        switches=len(outcome.wanted) - 1,
        most_switches_in_a_second=most_within([time for time, _ in outcome.wanted[1:]], 1.0),
        pass_switches=max(0, len(outcome.steps) - 1),
        return_s=return_time(trace, outcome, ladder.top) if returns else None,
        stays_low=outcome.wanted[-1][1] < ladder.top,
        regain_s=regain_time(trace, outcome, ladder.top) if returns else None,
        backlog_s=backlog_time(trace, outcome),
        busy=outcome.busy_s / over if over else 0.0,
        events=tuple(sorted(events)),
    )


def _percentiles(values: Floats) -> Latency:
    p50, p95, p99 = np.percentile(values, [50, 95, 99]).tolist() if len(values) else (0.0, 0.0, 0.0)
    return Latency(p50=p50, p95=p95, p99=p99)


def capacity(server: Server, rung: int, lengths: Lengths, seed: int = 0) -> float:
    """Requests a second that a server at one rung takes from an endless queue of such requests."""
    rng, count = np.random.default_rng(seed), max(2000, 100 * server.slots)
    trace = Trace(
        name="saturation",
        arrival_s=np.zeros(count),
        prompt=lengths.draw(rng, lengths.prompt, count),
        output=lengths.draw(rng, lengths.output, count),
        effort=np.zeros(count, dtype=np.int64),
        end_s=0.0,
    )
    outcome = replay(trace, server, Static(server.ladder, rung, prompts=server.ladder.top))
    # From when the slots are full until nobody waits any more.
    return float((count - server.slots) / (outcome.start_s[-1] - outcome.start_s[server.slots]))
