"""What picks the rung in a replay: a fixed one, the controller, or one that has read the trace.

All pay from the same bucket and keep to the same floors; only the wanted rung differs.
"""

from collections.abc import Collection
from typing import Protocol

import numpy as np

from lowprec.ladder import Ladder, Phase
from lowprec.runtime.controller import Controller
from lowprec.runtime.demand import Reading
from lowprec.runtime.spending import Account, Bucket, LossBudget, price_of
from lowprec.simulate.traces import Trace

FORESIGHT_S, LOOKS_S = 30.0, 0.1


class Policy(Protocol):
    """What the server asks; `lowprec.runtime.controller.Controller` is one."""

    rung: int
    top: int
    prices: tuple[int, ...]
    bucket: Bucket
    floors: dict[str, int]
    spares_early: bool
    earned: int

    def decide(self, reading: Reading) -> int:
        """The wanted rung."""

    def rung_for(self, floor: int, tokens: int) -> int:
        """The rung of a pass that makes `tokens` tokens and whose highest floor is `floor`."""

    def open(self, effort: str) -> Account:
        """The account of a new request."""

    def floor_of(self, account: Account) -> int:
        """The lowest rung for its next token."""

    def count(self, phase: Phase, rung: int, made: int, tokens: int, seconds: float, passes: int = 1) -> None:
        """Enters finished passes."""


class Static:
    """One rung for every pass, whatever it loses: a server without a controller.

    `prompts` is the rung for prompts where that is another.
    """

    def __init__(self, ladder: Ladder, rung: int, prompts: int | None = None) -> None:
        self.rung, self.top = rung, rung if prompts is None else prompts
        self.prices = tuple(price_of(r.loss_upper) for r in ladder.rungs)
        # Nothing is refused: the bucket earns as much as the dearest token costs.
        self.bucket = Bucket(LossBudget(nats_per_token=max(1e-9, max(r.loss_upper for r in ladder.rungs)) * 4))
        self.floors = dict.fromkeys(("low", "medium", "high"), rung)
        self.spares_early, self.earned = False, 0

    def decide(self, reading: Reading) -> int:
        """Always the same."""
        return self.rung

    def rung_for(self, floor: int, tokens: int) -> int:
        """Always the same."""
        return self.rung

    def open(self, effort: str) -> Account:
        """An account that is never overdrawn."""
        return Account(floor=self.rung, bucket=self.bucket)

    def floor_of(self, account: Account) -> int:
        """Always the same."""
        return self.rung

    def count(self, phase: Phase, rung: int, made: int, tokens: int, seconds: float, passes: int = 1) -> None:
        """Keeps no books."""

    def pass_rung(self, phase: Phase, accounts: Collection[Account]) -> int:
        """Always the same, that for prompts aside."""
        return self.top if phase == "prefill" else self.rung

    def settle(self, phase: Phase, rung: int, accounts: Collection[Account], tokens: int, seconds: float) -> None:
        """Enters the rungs of tokens."""
        for account in accounts:
            account.add(rung, self.prices[rung], 1)


class Foresight(Controller):
    """An oracle: it knows every arrival of the next 30 s, and how long each request's prompt and answer are.

    Ten times a second it works through them, and through who waits already, as a fluid in order of arrival, and takes
    the highest rung at which nobody waits longer than half of what the objective leaves. It switches at once, as often
    as it likes, needs no margin for what it cannot know, and makes early tokens at any rung. It pays from the same
    budget but does not plan for it. That is perfect knowledge with a simple rule, not the best of all schedules.
    """

    trace: Trace
    _head: int

    def follow(self, trace: Trace) -> "Foresight":
        """Reads the trace in advance."""
        self.trace, self._head, self._next_look, self.spares_early = trace, 0, 0.0, False
        decode = [row[self.demand.slots] / self.demand.slots for row in self.demand.decode]
        prefill = np.array([self.demand.prefill_s(int(n)) for n in trace.prompt])
        self._work = [prefill + per_token * trace.output for per_token in decode]
        return self

    def _choose(self, reading: Reading) -> None:
        self._head += reading.admitted
        if reading.now_s < self._next_look:
            return
        self._next_look = reading.now_s + LOOKS_S
        wanted = self._highest(reading)
        if wanted < self.earned and not self._affords(wanted):
            self._saving = self.bucket.balance < self.bucket.burst // 2
            wanted = self.earned
        self._switch(wanted)

    def _highest(self, reading: Reading) -> int:
        first = self._head
        last = int(np.searchsorted(self.trace.arrival_s, reading.now_s + FORESIGHT_S))
        if first >= last:
            return self.top
        arrival = np.maximum(self.trace.arrival_s[first:last], reading.now_s)
        gaps = np.diff(arrival, prepend=reading.now_s)
        free = max(0, self.demand.slots - reading.decode_tokens)
        for rung in range(self.top, 0, -1):
            work = self._work[rung][first:last]
            # Free slots take that many requests before anyone waits, in the fluid work that is negative.
            credit = work.mean()
            flow = np.concatenate([[-free * credit], work[:-1]]) - gaps
            level = np.cumsum(flow)
            lowest = np.minimum.accumulate(np.minimum(level + self.demand.slots * credit, 0.0))
            if (level - lowest).max() <= self._patience(rung) / 2:
                return rung
        return 0
