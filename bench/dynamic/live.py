"""The controller live: a load generator against `lowprec.live` on this machine, the same arrivals with and without it.

Requests arrive by the clock, as a trace of the simulator says, whatever the server does. *static* is the top rung alone
(INT8 in every group), *controller* the ladder. Both serve each seed's trace, the order turning from seed to seed, since
what else the machine does changes from minute to minute. Rates and objectives are in shares of what the top serves here
and now, which is measured first: from an endless queue, at the top and at the bottom, in turns.

Where the bottom does not serve `PEAK / MOST_OF_BOTTOM` times what the top does, a burst of `PEAK` is more than it can
work off, and not what the bars are about: that is said first among what is missed.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.dynamic.scenes import BARS, BASE, MOST_OF_BOTTOM, PEAK, change_of, late_missed
from lowprec.api import begin
from lowprec.artifacts.nested import load_nested
from lowprec.ladder import Ladder, Phase, read_ladder
from lowprec.live import LiveServer, Request
from lowprec.live.from_run import LADDER, NESTED
from lowprec.live.server import Policy
from lowprec.pipeline.choose import choose
from lowprec.pipeline.ladder import ladder
from lowprec.pipeline.prepare import prepare
from lowprec.pipeline.price import price
from lowprec.pipeline.score import score
from lowprec.runtime.controller import EFFORTS, Controller, Objectives
from lowprec.runtime.demand import Reading
from lowprec.runtime.spending import LossBudget
from lowprec.runtime.switch import Switch
from lowprec.settings import Settings, effort_named
from lowprec.simulate.compare import CONTROLLER, static_name
from lowprec.simulate.measure import PolicyResult, summarise
from lowprec.simulate.policies import Static
from lowprec.simulate.server import Outcome
from lowprec.simulate.traces import Floats, Lengths, Trace, make_trace
from lowprec.steps.data import MINIMUM_TOKENS

LADDER_EFFORT = dataclasses.replace(
    effort_named("fast"), name="ladder", calibration_tokens=8_192, sensitivity_tokens=4_096, tuning_tokens=8_192,
    held_out_tokens=MINIMUM_TOKENS, rounds=1,
)  # fmt: skip
BUDGET_SHARE, BURST_SHARE = 0.9, 0.2
# Of the time that a request holds a full server's slot: what may pass until its first token.
TTFT_HELD, TPOT_FULL = 2.0, 1.5
FILLS, ROUNDS = 3, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveScene:
    """What is asked of the server."""

    seconds: float = 90.0
    seeds: int = 2
    slots: int = 8
    chunk: int = 512
    shape: str = "burst-step"
    lengths: Lengths = dataclasses.field(default_factory=lambda: Lengths(prompt=32, output=32))


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveResult:
    """What came of it. `results` are by seed, static and controller each; rates in requests a second."""

    scene: LiveScene
    model: str
    device: str
    rungs: tuple[str, ...]
    model_digest: str
    machine_load: tuple[float, float, float]
    threads: int
    top_per_s: float
    bottom_per_s: float
    base_per_s: float
    peak_per_s: float
    ttft_s: float
    tpot_s: float
    budget_nats: float
    results: tuple[tuple[PolicyResult, PolicyResult], ...]
    violations_change: float
    ttft_ratio: float
    missed: tuple[str, ...]


class Watched:
    """A policy that keeps what it was asked and told, for the figures."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.prices = inner, inner.prices
        self.wanted, self.steps, self.tokens = [(0.0, inner.rung)], list[tuple[int, int]](), list[list[int]]()
        self.start_s, self.busy_s, self._passes = 0.0, 0.0, 0

    @property
    def rung(self) -> int:
        """The wanted one."""
        found: int = self.inner.rung
        return found

    def decide(self, reading: Reading) -> int:
        """Notes a change."""
        found: int = self.inner.decide(reading)
        self._note(reading.now_s)
        return found

    def _note(self, now_s: float) -> None:
        if self.wanted[-1][1] != self.inner.rung:
            self.wanted.append((now_s - self.start_s, self.inner.rung))

    def open(self, effort: str) -> Any:
        """As it does."""
        return self.inner.open(effort)

    def pass_rung(self, phase: Phase, accounts: Any) -> int:
        """As it does."""
        found: int = self.inner.pass_rung(phase, accounts)
        return found

    def settle(self, phase: Phase, rung: int, accounts: Any, tokens: int, seconds: float) -> None:
        """Notes the tokens."""
        self.inner.settle(phase, rung, accounts, tokens, seconds)
        self.busy_s += seconds
        if phase == "decode":
            self._passes += 1
            if not self.steps or self.steps[-1][1] != rung:
                self.steps.append((self._passes, rung))
        if accounts and self.tokens and self.tokens[-1][0] == rung:
            self.tokens[-1][1] += len(accounts)
        elif accounts:
            self.tokens.append([rung, len(accounts)])


def run_of(source: Path, work: Path) -> Path:
    """The run folder that `source` is, or one with the ladder of the model that it is, and nothing beside it."""
    if (source / LADDER).exists():
        return source
    settings = Settings(
        out=work / source.stem, effort=LADDER_EFFORT, schemes=("w4a16", "w8a16"), smooth=False, ladder=True
    )
    # What a run does but for writing and judging its plan.
    with begin(str(source), settings, "30%") as context:
        prepared = prepare(context)
        ladder(choose(score(prepared), price(prepared)))
    return settings.out


def play(server: LiveServer, trace: Trace, start_s: float, vocabulary: int, seed: int) -> list[Request]:
    """Submits every request of `trace` at its time and takes steps until all are served; raises what one failed by."""
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(0, vocabulary, n).tolist() for n in trace.prompt]
    sent: list[Request] = []
    while True:
        now = server.clock() - start_s
        while len(sent) < len(trace) and trace.arrival_s[len(sent)] <= now:
            index = len(sent)
            # When it came, not when the step before let us look.
            sent.append(
                server.submit(
                    prompts[index], int(trace.output[index]), EFFORTS[trace.effort[index]], stop=(),
                    arrival_s=start_s + float(trace.arrival_s[index]),
                )
            )  # fmt: skip
        if not server.step():
            if len(sent) == len(trace):
                for request in sent:
                    server.answer(request)
                return sent
            time.sleep(max(0.0, min(0.05, trace.arrival_s[len(sent)] - now)))


def outcome_of(sent: Sequence[Request], policy: Watched, start_s: float, top: int) -> Outcome:
    """What happened, as the simulator says it."""

    def times(name: str) -> Floats:
        found: Floats = np.array([getattr(request, name) - start_s for request in sent])
        return found

    return Outcome(
        start_s=times("start_s"),
        first_s=times("first_s"),
        finish_s=times("finish_s"),
        first_step=np.zeros(len(sent), dtype=np.int64),
        steps=policy.steps,
        tokens=policy.tokens,
        wanted=policy.wanted,
        prompt_rung=top,
        busy_s=policy.busy_s,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """A loaded model, and what is asked of it."""

    model: Any
    switch: Switch
    ladder: Ladder
    scene: LiveScene

    def _server(self, policy: Policy) -> LiveServer:
        return LiveServer(self.model, None, self.switch, policy, slots=self.scene.slots, chunk=self.scene.chunk)

    def _vocabulary(self) -> int:
        found: int = self.model.config.vocab_size
        return found

    def served(self, trace: Trace, make: Callable[[], Any], seed: int) -> tuple[Outcome, Watched]:
        """One policy on one trace, by the clock."""
        policy = Watched(make())
        server = self._server(policy)
        policy.start_s = server.clock()
        sent = play(server, trace, policy.start_s, self._vocabulary(), seed)
        return outcome_of(sent, policy, policy.start_s, self.ladder.top), policy

    def capacities(self) -> tuple[float, float]:
        """Requests a second from an endless queue at the top and at the bottom, in turns, prompts at the top."""
        found: dict[int, list[float]] = {self.ladder.top: [], 0: []}
        count, slots = (1 + FILLS) * self.scene.slots, self.scene.slots
        for seed in range(ROUNDS):
            rng, zeros = np.random.default_rng(seed), np.zeros(count)
            lengths = self.scene.lengths
            trace = Trace(
                name="saturation",
                arrival_s=zeros,
                prompt=lengths.draw(rng, lengths.prompt, count),
                output=lengths.draw(rng, lengths.output, count),
                effort=zeros.astype(np.int64),
                end_s=0.0,
            )
            for rung, rates in found.items():
                made, _ = self.served(trace, lambda rung=rung: Static(self.ladder, rung, self.ladder.top), seed)
                # From when the slots are full until nobody waits any more.
                rates.append((count - slots) / (made.start_s[-1] - made.start_s[slots - 1]))
        return float(np.median(found[self.ladder.top])), float(np.median(found[0]))


def measure(run: Path, scene: LiveScene) -> LiveResult:
    """Loads the run's nested model and serves every seed's trace with and without the controller."""
    rungs = read_ladder(run / LADDER)
    model, _, switch = load_nested(run / NESTED, ladder=rungs)
    bench = Bench(model, switch, rungs, scene)
    top, bottom = bench.capacities()
    objectives = _objectives(scene, top)
    low, high = rungs.rungs[0].loss_upper, rungs.rungs[-1].loss_upper
    budget = LossBudget(nats_per_token=high / (1 - BURST_SHARE) + BUDGET_SHARE * (low - high), burst_share=BURST_SHARE)
    peak = PEAK * top
    makers: dict[str, Callable[[], Any]] = {
        static_name(rungs, rungs.top): lambda: Static(rungs, rungs.top),
        CONTROLLER: lambda: Controller(
            rungs, objectives, budget, slots=scene.slots, longest_prompt=scene.chunk
        ),
    }  # fmt: skip
    results = []
    for seed in range(scene.seeds):
        trace = make_trace(
            scene.shape, base_per_s=BASE * top, peak_per_s=peak, seconds=scene.seconds, lengths=scene.lengths, seed=seed
        )
        found: dict[str, PolicyResult] = {}
        for name in list(makers)[:: -1 if seed % 2 else 1]:
            outcome, policy = bench.served(trace, makers[name], seed)
            events = tuple(getattr(policy.inner, "events", {}).items())
            returns = name == CONTROLLER
            found[name] = summarise(
                name, trace, outcome, rungs, objectives, budget.window_tokens, events, returns=returns
            )
        fixed, ours = (found[name] for name in makers)
        results.append((fixed, ours))
    change = change_of([ours for _, ours in results], sum(fixed.violations for fixed, _ in results))
    ratio = float(np.median([fixed.ttft_s.p95 / ours.ttft_s.p95 for fixed, ours in results]))
    return LiveResult(
        scene=scene,
        model=rungs.model,
        device=rungs.device,
        rungs=tuple(rung.name for rung in rungs.rungs),
        model_digest=rungs.model_digest,
        machine_load=os.getloadavg(),
        threads=torch.get_num_threads(),
        top_per_s=top,
        bottom_per_s=bottom,
        base_per_s=BASE * top,
        peak_per_s=peak,
        ttft_s=objectives.ttft_s,
        tpot_s=objectives.tpot_s,
        budget_nats=budget.nats_per_token,
        results=tuple(results),
        violations_change=change,
        ttft_ratio=ratio,
        missed=tuple(_missed(results, change, ratio, budget.nats_per_token, bottom / top)),
    )


def _objectives(scene: LiveScene, top_per_s: float) -> Objectives:
    """In what a request and a token take here and now with all slots busy, other prompts between them included."""
    held = scene.slots / top_per_s
    return Objectives(ttft_s=TTFT_HELD * held, tpot_s=TPOT_FULL * held / scene.lengths.output)


def _missed(
    results: Sequence[tuple[PolicyResult, PolicyResult]], change: float, ratio: float, budget: float, span: float
) -> list[str]:
    found = []
    if span < PEAK / MOST_OF_BOTTOM:
        found.append(
            f"the bottom serves {span:.2f} times what the top does, and the bursts of the bars need "
            f"{PEAK / MOST_OF_BOTTOM:.2f}"
        )
    if late := late_missed(sum(fixed.violations for fixed, _ in results), change):
        found.append(late)
    if ratio < BARS.ttft_ratio:
        found.append(f"95th percentile of the time to first token 2.5 times better: {ratio:.2f}")
    worst = max(ours.worst_window_nats for _, ours in results)
    if worst > budget:
        found.append(f"loss within the budget in every window: {worst:.4f}")
    most = max(ours.most_switches_in_a_second for _, ours in results)
    if most > BARS.most_switches_in_a_second:
        found.append(f"two switches a second: {most}")
    back = [ours.return_s for _, ours in results]
    if any(s is None or s > BARS.longest_return_s for s in back):
        found.append(f"back at the top within 10 s: {['never' if s is None else round(s, 1) for s in back]}")
    return found
