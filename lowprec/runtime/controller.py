"""Chooses the rung of a ladder while a model serves. No torch, no clock of its own: time is passed in.

Before each step the scheduler says what is scheduled and what waits, and gets the rung that is wanted (`decide`); each
pass takes the wanted rung or, if higher, the highest floor in its batch (`pass_rung`); after the pass its tokens are
paid for and its time is compared with the ladder's (`settle`).

    feed-forward   Scheduled tokens and measured step times of each rung give the time per output token, and with the
                   queue the wait of whoever comes now (`lowprec.runtime.demand`).
    feedback       Measured times of passes scale the ladder's; measured waits scale the predicted ones by a factor that
                   tracks the objective's percentile of measured / predicted (stochastic approximation of a quantile,
                   Robbins and Monro 1951): it rises fast and falls slowly.
    down           as soon as the wait or the time per token of the present rung comes near its objective (later, where
                   a queue will work itself off), to the highest rung that meets both and can work off the queue.
    up             half of the way at a time, to the highest rung that has room, when nobody waits, all of it for a
                   second: that would make the tokens that are really made at 95 % of its capacity, or serve those who
                   come now so. A low rung makes the last tokens of a burst faster than the top need ever do, and to
                   wait until the slots are free again would keep it low for as long as a request lasts.
    between        half a second from switch to switch, never three within a second; and a rung that costs more than
                   the budget earns is entered only with money for two seconds there. Where that runs out sooner, passes
                   are made higher than wanted until the next switch may come.

Prompts are read at the top rung. A request's first tokens are made there, too, as long as waits are short: what is
decoded late pays first. What the budget cannot pay is made higher, whatever waits. Nothing here raises while serving:
on nonsense (a NaN, a negative count, a clock that goes back) the rung is held, what cannot be true is not entered, and
`events` counts it.

State and work are O(1) but for a loop over the rungs. One scheduler calls it, from one thread.

Compare: brownout (Klein et al., ICSE 2014) closes the loop over response times by a dimmer; MorphServe (Su et al.,
2025) swaps layers on memory pressure; NestedFP (Lee et al., 2025) switches two precisions by load; Sarathi-Serve
(Agrawal et al., OSDI 2024) bounds a step's tokens so that its time can be predicted. None of them budgets the loss.
"""

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from operator import index
from typing import Literal

from lowprec.errors import ConfigError
from lowprec.ladder import PHASES, Ladder, Phase
from lowprec.registry import closest
from lowprec.runtime.demand import MOST, Demand, Reading
from lowprec.runtime.spending import Account, Bucket, LossBudget, is_number, price_of

Effort = Literal["low", "medium", "high"]
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")
LONGEST_S = 3600.0
NONSENSE, BACKWARDS, PENNILESS, OVERDRAWN = "nonsense", "clock went back", "out of budget", "overdrawn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """Latencies that `percentile` of the requests are to stay within.

    `ttft_s` is the time from arrival to the first token, `tpot_s` a request's mean time per token after it.

    Raises:
        ConfigError: no such time or percentile makes sense.
    """

    ttft_s: float
    tpot_s: float
    percentile: float = 0.95

    def __post_init__(self) -> None:
        for name, value in (("time to first token", self.ttft_s), ("time per output token", self.tpot_s)):
            if not (is_number(value) and 0.0 < value <= LONGEST_S):
                raise ConfigError(f"{name} of {_shown(value)} s: give seconds above 0, at most {LONGEST_S:g}")
        if not (is_number(self.percentile) and 0.5 <= self.percentile < 1.0):
            raise ConfigError(f"percentile {_shown(self.percentile)} is outside [0.5, 1): give for example 0.95")


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How the controller acts; the defaults are those of the published figures.

    Attributes:
        dwell_s, hold_s: least time between two switches; how long all must be calm before it goes up.
        wait_down, wait_most, wait_up: share of the time to first token, less what an idle server takes, that is waited
            before going down: where the queue grows, and where it would work itself off; and that would be waited at
            the next rung at most when going up.
        tpot_down, tpot_up: share of the time per output token, the same.
        load_grows: load from which on a queue is taken to grow.
        load_down, load_up: load that a rung is entered with at most, from above and from below.
        ahead_s: how far the growth of the queue is thought ahead.
        reserve_s: how long a rung must be affordable to be entered.
        early_tokens, early_wait: how many tokens of a request are made at the top while less than this share is waited.
        rate_s, longest_rate_s, mix_s, expected_prompt, expected_output: see `Demand`.
    """

    dwell_s: float = 0.5
    hold_s: float = 1.0
    wait_down: float = 0.4
    wait_most: float = 0.7
    wait_up: float = 0.1
    tpot_down: float = 0.95
    tpot_up: float = 0.85
    load_grows: float = 1.0
    load_down: float = 0.95
    load_up: float = 0.95
    ahead_s: float = 1.0
    reserve_s: float = 2.0
    early_tokens: int = 4
    early_wait: float = 0.2
    rate_s: float = 1.5
    longest_rate_s: float = 5.0
    mix_s: float = 60.0
    expected_prompt: int = 256
    expected_output: int = 128


class Controller:
    """See the module. `rung` is what is wanted now, an index into the ladder; it begins at the top.

    Args:
        ladder: the model's, checked against it by `Ladder.check_model`.
        slots: sequences that are decoded together at most.
        longest_prompt: tokens up to which times of passes over prompts are tabulated.
        request_budget: of each request by itself; by default as much as of all together, whose burst lasts one answer
            alone for thousands of tokens. A smaller window binds sooner, and raises whole batches for one long answer.

    Raises:
        ConfigError: objectives or a budget that no rung meets.
    """

    def __init__(
        self,
        ladder: Ladder,
        objectives: Objectives,
        budget: LossBudget,
        *,
        slots: int,
        longest_prompt: int = 2048,
        request_budget: LossBudget | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        if slots < 1 or longest_prompt < 1:
            raise ConfigError(f"{slots} slots and prompts of {longest_prompt} tokens: give 1 or more of each")
        self.ladder, self.objectives, self.tuning = ladder, objectives, tuning or Tuning()
        self.request_budget = request_budget or budget
        self.top = self.rung = ladder.top
        # Bounds are noisy: a rung costs at least what those above it do, or what is earned for good has gaps.
        uppers = accumulate((rung.loss_upper for rung in reversed(ladder.rungs)), max)
        self.prices = tuple(price_of(nats) for nats in uppers)[::-1]
        self.bucket = Bucket(budget)
        self.demand = Demand(
            ladder,
            slots,
            longest_prompt,
            percentile=objectives.percentile,
            rate_s=self.tuning.rate_s,
            longest_rate_s=self.tuning.longest_rate_s,
            mix_s=self.tuning.mix_s,
            prompt=self.tuning.expected_prompt,
            output=self.tuning.expected_output,
        )
        self._check(budget)
        self.floors: dict[str, int] = {"low": 0, "medium": (self.top + 1) // 2, "high": self.top}
        self.tokens = [0] * len(ladder.rungs)
        self.switches = 0
        self.events: Counter[str] = Counter()
        self.spares_early = True
        # The lowest rung that the budget earns for good.
        self.earned = min(r for r, price in enumerate(self.prices) if price <= self.bucket.rate)
        fastest = [max(b / row[b] for b in range(1, slots + 1)) for row in self.demand.decode]
        self._reserve = [
            self.tuning.reserve_s * tokens_s * max(0, price - self.bucket.rate)
            for tokens_s, price in zip(fastest, self.prices, strict=True)
        ]
        self._saving = False
        self._now: float | None = None
        self._last = self._last_but_one = -math.inf
        self._calm_since: float | None = None

    def _check(self, budget: LossBudget) -> None:
        single, prompt = self.demand.decode[0][1], self.demand.prefill[1]
        if self.objectives.tpot_s < single:
            raise ConfigError(
                f"time per output token of {self.objectives.tpot_s:g} s: the lowest rung takes {single:.3g} s for one "
                "sequence alone; allow more"
            )
        if self.objectives.ttft_s < prompt:
            raise ConfigError(
                f"time to first token of {self.objectives.ttft_s:g} s: the shortest prompt takes {prompt:.3g} s alone; "
                "allow more"
            )
        top = self.ladder.rungs[-1]
        for whose, given in (("budget", budget), ("budget of a request", self.request_budget)):
            if given.rate < self.prices[-1]:
                raise ConfigError(
                    f"{whose} of {given.nats_per_token:g} nats per token earns {1e-9 * given.rate:.3g} with a burst "
                    f"share of {given.burst_share:g}, but the top rung {top.name!r} loses up to {top.loss_upper:.3g}: "
                    f"give {top.loss_upper / (1 - given.burst_share) * 1.001:.3g} or more"
                )

    def open(self, effort: str = "low") -> Account:
        """The account of a new request; `effort` bounds how low it may be taken.

        Raises:
            ConfigError: an unknown effort: the request is refused before it is served.
        """
        if effort not in self.floors:
            raise ConfigError(f"unknown effort {effort!r}: {closest(str(effort), EFFORTS)}")
        return Account(floor=self.floors[effort], bucket=Bucket(self.request_budget))

    def decide(self, reading: Reading) -> int:
        """The rung wanted for the next step."""
        if not isinstance(reading, Reading) or not reading.is_sane():
            self.events[NONSENSE] += 1
            return self.rung
        before, self._now = self._now, reading.now_s
        if before is not None and reading.now_s < before:
            # The new time is taken, or a clock that was wrong once would hold the rung for good.
            self.events[BACKWARDS] += 1
            self._last = self._last_but_one = reading.now_s
            self._calm_since = None
            self.demand.forget_wait()
            return self.rung
        self.demand.read(reading, 0.0 if before is None else reading.now_s - before, self.rung)
        self._choose(reading)
        return self.rung

    def _choose(self, reading: Reading) -> None:
        tuning, now = self.tuning, reading.now_s
        if self.rung == self.top and not reading.queue_length:
            # The usual case: nobody waits, and all that could be too slow is the step itself.
            self.spares_early, self._calm_since = True, None
            limit = tuning.tpot_down * self.objectives.tpot_s
            if self.demand.token_s(self.top, reading.decode_tokens) <= limit:
                return
        wait = self.demand.wait_s(self.rung, self.rung, reading.oldest_wait_s, tuning.ahead_s)
        self.spares_early = wait <= tuning.early_wait * self._patience(self.rung)
        if self._saving and self.bucket.balance >= self.bucket.burst // 2:
            self._saving = False
        free = self._may_switch(now)
        grows = self.demand.arrivals_s * self.demand.work_s[self.rung] >= tuning.load_grows
        if not self._meets(self.rung, reading, tuning.wait_down if grows else tuning.wait_most, tuning.tpot_down):
            self._calm_since = None
            if free:
                self._switch(self._lower(reading))
            return
        calm = self._calm_rung(reading)
        if calm == self.rung:
            self._calm_since = None
            return
        if self._calm_since is None:
            self._calm_since = now
        if free and now - self._calm_since >= tuning.hold_s:
            # Half of the way at a time: what the next rung does to the queue is seen before the last is taken.
            self._switch(self.rung + (calm - self.rung + 1) // 2)

    def _calm_rung(self, reading: Reading) -> int:
        """The highest rung, from the present one upwards, at which nobody would wait and there would be room."""
        tuning, rung = self.tuning, self.rung
        while rung < self.top and self.demand.least_load(rung + 1) <= tuning.load_up:
            if not self._meets(rung + 1, reading, tuning.wait_up, tuning.tpot_up):
                break
            rung += 1
        return rung

    def _patience(self, rung: int) -> float:
        """What is left of the time to first token for waiting, at least a tenth of it."""
        return max(self.objectives.ttft_s - self.demand.idle_s(rung), 0.1 * self.objectives.ttft_s)

    def _meets(self, rung: int, reading: Reading, wait: float, tpot: float) -> bool:
        """Whether `rung` keeps to these shares of the objectives."""
        if self.demand.token_s(rung, reading.decode_tokens) > tpot * self.objectives.tpot_s:
            return False
        waited = self.demand.wait_s(rung, self.rung, reading.oldest_wait_s, self.tuning.ahead_s)
        return waited <= wait * self._patience(rung)

    def _lower(self, reading: Reading) -> int:
        """The highest faster rung that meets the objectives and can work off the queue, else the fastest affordable."""
        best, tuning = self.rung, self.tuning
        for rung in range(self.rung - 1, -1, -1):
            if rung < self.earned and not self._affords(rung):
                break
            if self.demand.work_s[rung] >= self.demand.work_s[best]:
                continue
            best = rung
            queue_falls = self.demand.arrivals_s * self.demand.work_s[rung] <= tuning.load_down
            if queue_falls and self._meets(rung, reading, tuning.wait_down, tuning.tpot_down):
                break
        return best

    def _affords(self, rung: int) -> bool:
        """Whether there is money for a while at a rung that costs more than is earned."""
        # A machine that is faster than the ladder says makes more tokens in that while.
        return not self._saving and self.bucket.balance * self.demand.slowness >= self._reserve[rung]

    def _may_switch(self, now_s: float) -> bool:
        return now_s - self._last >= self.tuning.dwell_s and now_s - self._last_but_one > 1.0

    def _switch(self, rung: int) -> None:
        if rung == self.rung:
            return
        self.rung = rung
        self.switches += 1
        self._last_but_one, self._last = self._last, self._now if self._now is not None else -math.inf
        self.demand.forget_wait()

    def floor_of(self, account: Account) -> int:
        """The lowest rung for this request's next token."""
        if self.spares_early and account.made < self.tuning.early_tokens:
            return self.top
        rung = account.floor
        while rung < self.top and not account.bucket.passes(self.prices[rung], 1, 1):
            rung += 1
        return rung

    def pass_rung(self, phase: Phase, accounts: Collection[Account]) -> int:
        """The rung of a pass over the prompts of these requests, or that makes a token for each."""
        if phase == "prefill":
            return self.top
        return self.rung_for(max(map(self.floor_of, accounts), default=0), len(accounts))

    def rung_for(self, floor: int, tokens: int) -> int:
        """The rung of a pass that makes `tokens` tokens and whose highest floor is `floor`."""
        rung = max(self.rung, floor)
        if rung >= self.earned:
            return rung
        if not self._saving and not self.bucket.passes(self.prices[rung], tokens, 1):
            self.events[PENNILESS] += 1
            self._saving = True
        if not self._saving:
            return rung
        # This pass is made higher at once; what is wanted moves when it may.
        if self._now is None or self._may_switch(self._now):
            self._switch(self.earned)
        return max(self.earned, floor)

    def settle(self, phase: Phase, rung: int, accounts: Collection[Account], tokens: int, seconds: float) -> None:
        """Enters a finished pass at `rung` that took `seconds`.

        Args:
            accounts: the requests that got a token: in a pass over prompts those whose prompt is read.
            tokens: of prompts, in such a pass; else as many as accounts.
        """
        if self._can_be(phase, rung, len(accounts), 1):
            for account in accounts:
                if account.add(rung, self.prices[rung], 1):
                    self.events[OVERDRAWN] += 1
        self.count(phase, rung, len(accounts), tokens, seconds)

    def count(self, phase: Phase, rung: int, made: int, tokens: int, seconds: float, passes: int = 1) -> None:
        """`settle` without accounts, for `passes` equal passes that made `made` tokens each."""
        if not self._can_be(phase, rung, made, passes):
            self.events[NONSENSE] += 1
            return
        if made:
            self.tokens[rung] += made * passes
            if self.bucket.pay(self.prices[rung], made * passes):
                self.events[OVERDRAWN] += 1
        if not _can_take(tokens, seconds):
            self.events[NONSENSE] += 1
        elif phase == "prefill":
            self.demand.prompts_read(tokens, seconds + 0.0)
        else:
            self.demand.decoded(rung, made, seconds + 0.0, passes)

    def _can_be(self, phase: Phase, rung: int, made: int, passes: int) -> bool:
        """Whether tokens can have been made so."""
        try:
            rungs = 0 <= index(rung) <= self.top
            return phase in PHASES and rungs and 0 <= index(made) <= MOST and 1 <= index(passes) <= MOST
        except TypeError:
            return False


def _can_take(tokens: int, seconds: float) -> bool:
    """Whether a pass over `tokens` tokens of prompts can have taken `seconds`."""
    try:
        return 0 <= index(tokens) <= MOST and 0.0 < seconds + 0.0 < math.inf
    except (TypeError, ValueError, OverflowError):
        return False
