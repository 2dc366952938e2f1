"""Scenes that the controller has to hold in, and the bars.

A scene is a ladder, so many slots, and requests of some length. Bursts begin at half of what the top rung can serve and
peak at 1.2 times that, which is at most 0.9 of what the bottom rung can: where the ladder does not span that much, the
scene is refused. Calm traffic is Poisson at 0.3 of the top's capacity (the bar), and at half of it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from lowprec.errors import ConfigError
from lowprec.ladder import Ladder, PassTime
from lowprec.records import Origin
from lowprec.runtime.controller import Controller, Objectives
from lowprec.runtime.spending import LossBudget
from lowprec.simulate.compare import Comparison, compare, static_name
from lowprec.simulate.measure import PolicyResult, capacity
from lowprec.simulate.server import Server, replay
from lowprec.simulate.traces import BURSTS, Lengths, make_trace

BASE, PEAK, MOST_OF_BOTTOM, LOW_LOAD = 0.5, 1.2, 0.9, 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """What must come of every shape, over all seeds; the last two of every seed."""

    violations_change: float = -0.9
    ttft_ratio: float = 2.5
    most_switches_in_a_second: int = 2
    calm_switches: int = 0
    longest_return_s: float = 10.0


BARS = Bars()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A scene with its ladder."""

    ladder: Ladder
    server: Server
    objectives: Objectives
    budget: LossBudget
    top_per_s: float
    bottom_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """`faster` divides the ladder's times; what is not 1 is modelled. `seconds` and objectives are in its own time.

    `ttft_s` is the objective of the time to first token, `tpot_full` that per token in full steps, `budget_share` where
    between the losses of top (0) and bottom (1) the budget lies.
    """

    name: str
    faster: float
    slots: int
    lengths: Lengths
    seconds: float
    ttft_s: float
    tpot_full: float = 1.5
    budget_share: float = 0.9
    burst_share: float = 0.2
    chunk: int = 512

    def setting(self, measured: Ladder) -> Setting:
        """The scene on a measured ladder.

        Raises:
            ConfigError: the ladder does not span what a burst needs.
        """
        made = measured if self.faster == 1.0 else quicker(measured, self.faster)
        server = Server(ladder=made, slots=self.slots, chunk=self.chunk)
        top, bottom = (capacity(server, rung, self.lengths) for rung in (made.top, 0))
        if PEAK * top > MOST_OF_BOTTOM * bottom:
            raise ConfigError(
                f"scene {self.name!r}: the bottom serves {bottom / top:.3f} times what the top does with {self.slots} "
                f"slots, and bursts need {PEAK / MOST_OF_BOTTOM:.3f}"
            )
        low, high = made.rungs[0].loss_upper, made.rungs[-1].loss_upper
        return Setting(
            ladder=made,
            server=server,
            objectives=Objectives(
                ttft_s=self.ttft_s, tpot_s=self.tpot_full * 1e-6 * made.rungs[-1].pass_us("decode", self.slots)
            ),
            budget=LossBudget(nats_per_token=high + self.budget_share * (low - high), burst_share=self.burst_share),
            top_per_s=top,
            bottom_per_s=bottom,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeResult:
    """One shape over all seeds: sums of what missed an objective, medians of percentiles, the worst of the rest.

    `longest_return_s` is what the bar is about; the three after it take it apart (`PolicyResult`): until the top is
    wanted for the first time, until nobody waits any more, and from then until the top.
    """

    shape: str
    requests: int
    static_violations: int
    violations: int
    oracle_violations: int
    change: float
    oracle_change: float
    static_ttft_p95_s: float
    ttft_p95_s: float
    ttft_ratio: float
    least_ttft_ratio: float
    loss_nats: float
    oracle_loss_nats: float
    worst_window_nats: float
    switches: float
    pass_switches: float
    most_switches_in_a_second: int
    median_return_s: float
    longest_return_s: float | None
    longest_regain_s: float | None
    longest_backlog_s: float
    longest_beyond_backlog_s: float | None
    lowest_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneResult:
    """A scene, and which bars it misses."""

    scene: Scene
    origin: Origin
    ttft_s: float
    tpot_s: float
    budget_nats: float
    top_per_s: float
    bottom_per_s: float
    shapes: tuple[ShapeResult, ...]
    calm_switches: int
    calm_requests: int
    half_switches: int
    half_requests: int
    missed: tuple[str, ...]

    @property
    def meets(self) -> bool:
        """Whether no bar is missed."""
        return not self.missed


def quicker(measured: Ladder, factor: float) -> Ladder:
    """The ladder of a machine that takes `factor` times less for every pass: modelled."""

    def scaled(times: tuple[PassTime, ...]) -> tuple[PassTime, ...]:
        return tuple(
            PassTime(
                tokens=t.tokens,
                p20_us=t.p20_us / factor,
                p50_us=t.p50_us / factor,
                p80_us=t.p80_us / factor,
                origin="modelled",
            )
            for t in times
        )

    return dataclasses.replace(
        measured,
        device=f"{measured.device}, {factor:g} times as fast",
        rungs=tuple(dataclasses.replace(r, prefill=scaled(r.prefill), decode=scaled(r.decode)) for r in measured.rungs),
        notes=(*measured.notes, ("modelled", f"every time is the measured one divided by {factor:g}")),
    )


def run_scene(scene: Scene, measured: Ladder, seeds: int, pool: Executor) -> SceneResult:
    """Every shape and calm traffic, for each seed."""
    setting = scene.setting(measured)
    jobs = {shape: [pool.submit(_burst, scene, setting, shape, seed) for seed in range(seeds)] for shape in BURSTS}
    quiet, half = (
        [pool.submit(_calm, scene, setting, load, seed) for seed in range(seeds)] for load in (LOW_LOAD, BASE)
    )
    shapes = tuple(_shape(setting, shape, [job.result() for job in found]) for shape, found in jobs.items())
    (calm_switches, calm_requests), (half_switches, half_requests) = (
        [sum(counts) for counts in zip(*(job.result() for job in jobs), strict=True)] for jobs in (quiet, half)
    )
    return SceneResult(
        scene=scene,
        origin="measured" if all(r.is_measured for r in setting.ladder.rungs) else "modelled",
        ttft_s=setting.objectives.ttft_s,
        tpot_s=setting.objectives.tpot_s,
        budget_nats=setting.budget.nats_per_token,
        top_per_s=setting.top_per_s,
        bottom_per_s=setting.bottom_per_s,
        shapes=shapes,
        calm_switches=calm_switches,
        calm_requests=calm_requests,
        half_switches=half_switches,
        half_requests=half_requests,
        missed=tuple(_missed(shapes, calm_switches, setting.budget.nats_per_token)),
    )


def _calm(scene: Scene, setting: Setting, load: float, seed: int) -> tuple[int, int]:
    """Switches and requests of a calm trace."""
    rate = load * setting.top_per_s
    trace = make_trace(
        "poisson", base_per_s=rate, peak_per_s=rate, seconds=scene.seconds, lengths=scene.lengths, seed=seed
    )
    policy = Controller(
        setting.ladder, setting.objectives, setting.budget, slots=scene.slots, longest_prompt=scene.chunk
    )
    replay(trace, setting.server, policy)
    return policy.switches, len(trace)


def _burst(scene: Scene, setting: Setting, shape: str, seed: int) -> Comparison:
    trace = make_trace(
        shape,
        base_per_s=BASE * setting.top_per_s,
        peak_per_s=PEAK * setting.top_per_s,
        seconds=scene.seconds,
        lengths=scene.lengths,
        seed=seed,
    )
    return compare(trace, setting.server, setting.objectives, setting.budget, statics=[setting.ladder.top], seed=seed)


def _shape(setting: Setting, shape: str, found: Sequence[Comparison]) -> ShapeResult:
    ours = [c.result("controller") for c in found]
    fixed = [c.result(static_name(setting.ladder, setting.ladder.top)) for c in found]
    oracle = [c.result("oracle") for c in found]
    ratios = [s.ttft_s.p95 / r.ttft_s.p95 for s, r in zip(fixed, ours, strict=True)]
    returns = [r.return_s for r in ours]
    regained = [r.regain_s for r in ours]
    backlogs = [r.backlog_s or 0.0 for r in ours]
    beyond = [None if r is None else max(0.0, r - b) for r, b in zip(regained, backlogs, strict=True)]
    before = sum(r.violations for r in fixed)
    return ShapeResult(
        shape=shape,
        requests=sum(r.requests for r in ours),
        static_violations=before,
        violations=sum(r.violations for r in ours),
        oracle_violations=sum(r.violations for r in oracle),
        change=change_of(ours, before),
        oracle_change=change_of(oracle, before),
        static_ttft_p95_s=float(np.median([r.ttft_s.p95 for r in fixed])),
        ttft_p95_s=float(np.median([r.ttft_s.p95 for r in ours])),
        ttft_ratio=float(np.median(ratios)),
        least_ttft_ratio=min(ratios),
        loss_nats=float(np.mean([r.loss_nats for r in ours])),
        oracle_loss_nats=float(np.mean([r.loss_nats for r in oracle])),
        worst_window_nats=max(r.worst_window_nats for r in ours),
        switches=float(np.mean([r.switches for r in ours])),
        pass_switches=float(np.mean([r.pass_switches for r in ours])),
        most_switches_in_a_second=max(r.most_switches_in_a_second for r in ours),
        median_return_s=float(np.median([r for r in returns if r is not None] or [0.0])),
        longest_return_s=_longest(returns),
        longest_regain_s=_longest(regained),
        longest_backlog_s=max(backlogs),
        longest_beyond_backlog_s=_longest(beyond),
        lowest_share=float(np.mean([r.tokens[0].tokens / sum(t.tokens for t in r.tokens) for r in ours])),
    )


def change_of(results: Sequence[PolicyResult], before: int) -> float:
    """Relative change of violations from `before`; 0 where there were none to lower."""
    return sum(r.violations for r in results) / before - 1 if before else 0.0


def late_missed(before: int, change: float) -> str | None:
    """How the bar of violations is missed, None if it is met. Where nothing was late nothing can be won."""
    if not before:
        return "no request was late at static INT8: nothing to win"
    return None if change <= BARS.violations_change else f"violations -90 %: {100 * change:+.1f} %"


def _longest(seconds: Sequence[float | None]) -> float | None:
    """None where one of them never came."""
    known = [s for s in seconds if s is not None]
    return max(known) if len(known) == len(seconds) else None


def _missed(shapes: tuple[ShapeResult, ...], calm_switches: int, budget: float) -> list[str]:
    checks: list[tuple[str, Callable[[ShapeResult], bool]]] = [
        ("95th percentile of the time to first token 2.5 times better", lambda s: s.ttft_ratio >= BARS.ttft_ratio),
        ("loss within the budget in every window", lambda s: s.worst_window_nats <= budget),
        ("two switches a second", lambda s: s.most_switches_in_a_second <= BARS.most_switches_in_a_second),
        (
            "back at the top within 10 s, every seed",
            lambda s: s.longest_return_s is not None and s.longest_return_s <= BARS.longest_return_s,
        ),
    ]
    late = [(s.shape, late_missed(s.static_violations, s.change)) for s in shapes]
    missed = [f"{words}: {shape}" for shape, words in late if words]
    missed += [f"{words}: {s.shape}" for words, holds in checks for s in shapes if not holds(s)]
    if calm_switches > BARS.calm_switches:
        missed.append(f"no switch at low load: {calm_switches}")
    return missed


SCENES = (
    Scene(
        name="CPU as measured", faster=1.0, slots=8, lengths=Lengths(prompt=32, output=96), seconds=900.0, ttft_s=15.0
    ),
    Scene(
        name="ten times as fast", faster=10.0, slots=8, lengths=Lengths(prompt=32, output=96), seconds=300.0, ttft_s=2.0
    ),
)
