"""One simulation from what a user says: a ladder, a trace, objectives, a budget."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowprec.errors import ConfigError
from lowprec.ladder import Ladder
from lowprec.registry import closest
from lowprec.runtime.controller import EFFORTS, Objectives
from lowprec.runtime.spending import LossBudget
from lowprec.simulate.compare import Comparison, compare
from lowprec.simulate.measure import capacity
from lowprec.simulate.server import Server
from lowprec.simulate.traces import PROFILES, Lengths, Trace, make_trace, read_trace

IDLE_FACTOR, FULL_FACTOR = 10.0, 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a made trace is like: rates in shares of what the top rung can serve.

    Attributes:
        base, peak: 1.0 is the top rung's capacity for requests of these lengths.
        efforts: shares of low, medium and high effort.
    """

    base: float = 0.5
    peak: float = 1.2
    seconds: float = 300.0
    lengths: Lengths = field(default_factory=Lengths)
    efforts: tuple[float, float, float] = (1.0, 0.0, 0.0)


def parse_efforts(text: str) -> tuple[float, float, float]:
    """Shares of low, medium and high effort from "medium" or "low:0.7,high:0.3".

    Raises:
        ConfigError: an unknown effort, or shares that do not add up to 1.
    """
    shares = dict.fromkeys(EFFORTS, 0.0)
    for part in text.split(","):
        name, _, share = (word.strip() for word in part.partition(":"))
        if name not in shares:
            raise ConfigError(f"unknown effort {name!r}: {closest(name, EFFORTS)}")
        try:
            shares[name] = float(share or 1.0)
        except ValueError as error:
            raise ConfigError(f"effort {part.strip()!r}: give a share like low:0.7") from error
    low, medium, high = shares.values()
    if min(low, medium, high) < 0 or abs(low + medium + high - 1.0) > 1e-6:
        raise ConfigError(f"shares of efforts in {text!r} add up to {low + medium + high:g}, not to 1")
    return low, medium, high


def default_objectives(server: Server, lengths: Lengths) -> Objectives:
    """Ten times what an idle server takes to the first token, and 1.5 times a full batch's step, both at the top.

    Multiples of an idle server's latencies are how serving systems are compared (AlpaServe, DistServe).
    """
    top = server.ladder.rungs[-1]
    idle = 1e-6 * (top.pass_us("prefill", lengths.prompt) + top.pass_us("decode", 1))
    return Objectives(ttft_s=IDLE_FACTOR * idle, tpot_s=FULL_FACTOR * 1e-6 * top.pass_us("decode", server.slots))


def default_budget(ladder: Ladder) -> LossBudget:
    """Half way between what the top and the bottom lose at most."""
    return LossBudget(nats_per_token=(ladder.rungs[0].loss_upper + ladder.rungs[-1].loss_upper) / 2)


def study(
    ladder: Ladder,
    trace: str | Path = "burst-step",
    *,
    load: Load | None = None,
    slots: int = 8,
    chunk: int = 512,
    truth: float = 1.0,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    percentile: float = 0.95,
    budget: LossBudget | None = None,
    statics: Sequence[str] | None = None,
    speedup: float = 1.0,
    seed: int = 0,
) -> Comparison:
    """Replays a trace under the controller, static rungs and the oracle.

    Args:
        trace: a profile (`PROFILES`), or a CSV file (`read_trace`).
        load: of a profile; a file has its own, made `speedup` times as fast, and takes only the efforts from it.
        truth: how many times as long as the ladder says everything really takes.
        ttft_s, tpot_s, budget: objectives and budget; left out, `default_objectives` and `default_budget`.
        statics: names of rungs to compare with; the top and the bottom when left out.

    Raises:
        ArtifactError, ConfigError: what is given cannot be used; the message has the value and the remedy.
    """
    load, server = load or Load(), Server(ladder=ladder, slots=slots, chunk=chunk, truth=truth)
    made = str(trace) in PROFILES
    if made or not Path(trace).suffix:
        rates = [capacity(server, rung, load.lengths) for rung in range(len(ladder.rungs))]
        replayed: Trace = make_trace(
            str(trace),
            base_per_s=load.base * rates[-1],
            peak_per_s=max(load.base, load.peak) * rates[-1],
            seconds=load.seconds,
            lengths=load.lengths,
            seed=seed,
            efforts=load.efforts,
        )
        capacities = [(rung.name, rate) for rung, rate in zip(ladder.rungs, rates, strict=True)]
        lengths = load.lengths
    else:
        replayed = read_trace(Path(trace), EFFORTS[load.efforts.index(max(load.efforts))]).faster(speedup)
        capacities = []
        lengths = Lengths(prompt=round(replayed.prompt.mean()), output=round(replayed.output.mean()))
    usual = default_objectives(server, lengths)
    objectives = Objectives(
        ttft_s=usual.ttft_s if ttft_s is None else ttft_s,
        tpot_s=usual.tpot_s if tpot_s is None else tpot_s,
        percentile=percentile,
    )
    return compare(
        replayed,
        server,
        objectives,
        budget or default_budget(ladder),
        statics=None if statics is None else [ladder.rung_named(name) for name in statics],
        seed=seed if made else None,
        capacities=capacities,
    )
