"""A server with continuous batching, replayed event by event: what `lowprec.live` does.

Requests queue in the order of arrival and get one of `slots`. A step reads up to `chunk` tokens of prompts, each
prompt's piece in a pass of its own, and then makes one token for every sequence that has had its prompt read before, in
one pass together; the times of all are the ladder's. A prompt's last pass makes the request's first token. A runtime
that reads several prompts in one pass (Sarathi-Serve's chunks) takes less.

As long as nothing changes, steps of decoding are taken together: up to the next completion, the next arrival that finds
a free slot, the end of someone's early tokens, of the money, or of `period_s` where the policy may change its mind. All
sequences advance by one token per step, so what ends when is a heap over step numbers, and the time that a trace takes
depends on its requests, not on its tokens.

Left out: the growth of the cache (a free slot can be used), preemption, lengths of contexts, overhead between steps and
noise of step times.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lowprec.errors import ConfigError
from lowprec.ladder import Ladder
from lowprec.runtime.controller import EFFORTS
from lowprec.runtime.demand import Reading
from lowprec.runtime.spending import Account
from lowprec.simulate.policies import Policy, Static
from lowprec.simulate.traces import Floats, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What serves: a ladder's model with so many slots.

    `truth` is how many times as long as the ladder says everything really takes; `period_s` how often a policy is asked
    while nothing else happens.
    """

    ladder: Ladder
    slots: int = 16
    chunk: int = 512
    truth: float = 1.0
    period_s: float = 0.1

    def __post_init__(self) -> None:
        if self.slots < 1 or self.chunk < 1:
            raise ConfigError(f"{self.slots} slots and chunks of {self.chunk} tokens: give 1 or more of each")
        if not (0.0 < self.truth < math.inf and 0.0 < self.period_s < math.inf):
            raise ConfigError(f"times {self.truth:g} as long, asked every {self.period_s:g} s: give numbers above 0")


@dataclass(slots=True, kw_only=True, eq=False)
class Outcome:
    """What happened to every request, and at which rungs.

    Attributes:
        start_s, first_s, finish_s: [N] when it left the queue, got its first token, got its last.
        first_step: [N] number of the decoding step that made its second token.
        steps: (first step, rung) of each stretch of decoding at one rung, in order.
        tokens: (rung, tokens) of each stretch of tokens at one rung, in the order they were made, first ones included.
        wanted: (time, rung) whenever the policy changed its mind.
        prompt_rung: of all passes over prompts.
        busy_s: time spent in passes.
    """

    start_s: Floats
    first_s: Floats
    finish_s: Floats
    first_step: NDArray[np.int64]
    steps: list[tuple[int, int]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    wanted: list[tuple[float, int]] = field(default_factory=list)
    prompt_rung: int = 0
    busy_s: float = 0.0

    def rungs_of(self, request: int, output: int) -> list[int]:
        """The rung of each of a request's `output` tokens."""
        begin = int(self.first_step[request])
        starts = [step for step, _ in self.steps]
        made = [self.steps[bisect_right(starts, step) - 1][1] for step in range(begin, begin + output - 1)]
        return [self.prompt_rung, *made]


def replay(trace: Trace, server: Server, policy: Policy) -> Outcome:
    """Serves all of `trace`; deterministic."""
    return _Replay(trace, server, policy).run()


class _Replay:
    """One replay's state; the loop keeps what it touches at every step in local names."""

    def __init__(self, trace: Trace, server: Server, policy: Policy) -> None:
        self.server, self.policy = server, policy
        self.arrival, self.prompt = trace.arrival_s.tolist(), trace.prompt.tolist()
        self.output, self.effort = trace.output.tolist(), trace.effort.tolist()
        seconds = server.ladder.seconds
        self.prefill = [server.truth * t for t in seconds("prefill", server.chunk)[policy.top]]
        self.decode = [[server.truth * t for t in row] for row in seconds("decode", server.slots)]
        self.start, self.first, self.finish = ([0.0] * len(trace) for _ in range(3))
        self.first_step = [0] * len(trace)
        self.steps: list[tuple[int, int]] = []
        self.tokens: list[list[int]] = []
        self.wanted: list[tuple[float, int]] = [(0.0, policy.rung)]
        self.accounts: dict[int, Account] = {}
        self.floors = [policy.floors[effort] for effort in EFFORTS]
        self.bounded, self.floor = [0] * len(EFFORTS), self.floors[0]
        self.early = getattr(getattr(policy, "tuning", None), "early_tokens", 0)
        self.early_until = 0
        self.heap: list[tuple[int, int]] = []
        self.step = self.active = 0
        self.allowance = self._allowance()

    def _allowance(self) -> float:
        """Tokens that any request may get at any rung: only longer ones need an account."""
        bucket = self.policy.open("low").bucket
        drain = self.policy.prices[0] - bucket.rate
        return bucket.burst // drain if drain > 0 else math.inf

    def run(self) -> Outcome:
        """The loop over events."""
        arrival, prompt, policy = self.arrival, self.prompt, self.policy
        slots, chunk, period = self.server.slots, self.server.chunk, self.server.period_s
        count, watches = len(arrival), not isinstance(policy, Static)
        now = busy = 0.0
        head = arrived = left = 0
        while True:
            arrived = bisect_right(arrival, now, arrived)
            if not self.active and not left and head == arrived:
                if head == count:
                    break
                now = arrival[head]
                arrived = bisect_right(arrival, now, arrived)
            room, admitted, pieces = chunk, 0, []
            if left:
                taken = min(left, room)
                left, room = left - taken, room - taken
                pieces.append((head - 1, taken))
            while room and head < arrived and self.active + len(pieces) < slots:
                self.start[head] = now
                taken = min(prompt[head], room)
                left, room = prompt[head] - taken, room - taken
                pieces.append((head, taken))
                head += 1
                admitted += 1
            if watches:
                queue = arrived - head
                oldest = now - arrival[head] if queue else 0.0
                before = policy.rung
                policy.decide(Reading(now, chunk - room, self.active, queue, oldest, admitted))
                if policy.rung != before:
                    self.wanted.append((now, policy.rung))
            took = self._read(pieces, left, now) if pieces else 0.0
            if self.active:
                limit_s = 0.0
                if room == chunk:
                    # Who arrives while a slot is free ends a stretch of steps, and so does the policy's next look.
                    limit_s = arrival[arrived] - now if arrived < count and self.active < slots else math.inf
                    if watches and limit_s > period and (policy.rung < policy.top or head < arrived):
                        limit_s = period
                took += self._decode(limit_s, now)
            now += took
            busy += took
            if self.heap and self.heap[0][0] <= self.step:
                self._finish(now)
            # Only the last piece can be one that leaves something to read.
            for request, _ in pieces[:-1] if left else pieces:
                self._begin(request)
        return self._outcome(busy)

    def _read(self, pieces: Sequence[tuple[int, int]], left: int, now: float) -> float:
        """A pass over each (request, tokens of its prompt), `left` tokens short of the last one's end -> seconds."""
        policy, took = self.policy, 0.0
        for place, (request, tokens) in enumerate(pieces, start=1):
            ends = not left or place < len(pieces)
            took += self.prefill[tokens]
            policy.count("prefill", policy.top, int(ends), tokens, self.prefill[tokens])
            self.first[request] = now + took
        self._made(policy.top, len(pieces) - (left > 0))
        return took

    def _decode(self, limit_s: float, now: float) -> float:
        """Steps at one rung until something may change, within `limit_s` or just beyond -> seconds."""
        policy, active, steps = self.policy, self.active, self.heap[0][0] - self.step
        floor = self.floor
        if policy.spares_early and self.step < self.early_until:
            floor = policy.top
        elif self.accounts:
            floor = max(floor, *map(policy.floor_of, self.accounts.values()))
        rung = max(policy.rung, floor)
        if rung < policy.earned:
            before = policy.rung
            rung = policy.rung_for(floor, active)
            if policy.rung != before:
                self.wanted.append((now, policy.rung))
            steps = policy.bucket.passes(policy.prices[rung], active, steps)
        if self.step < self.early_until < self.step + steps:
            steps = self.early_until - self.step
        pace = self.decode[rung][active]
        if limit_s < steps * pace:
            steps = math.ceil(limit_s / pace)
        for account in self.accounts.values():
            steps = account.bucket.passes(policy.prices[rung], 1, steps)
        steps = max(steps, 1)
        for account in self.accounts.values():
            account.add(rung, policy.prices[rung], steps)
        policy.count("decode", rung, active, active, pace, steps)
        if not self.steps or self.steps[-1][1] != rung:
            self.steps.append((self.step, rung))
        self._made(rung, active * steps)
        self.step += steps
        return pace * steps

    def _made(self, rung: int, tokens: int) -> None:
        if not tokens:
            return
        if self.tokens and self.tokens[-1][0] == rung:
            self.tokens[-1][1] += tokens
        else:
            self.tokens.append([rung, tokens])

    def _begin(self, request: int) -> None:
        """Its prompt is read and its first token made: from the next step on it is decoded."""
        self.first_step[request] = self.step
        if self.output[request] == 1:
            self.finish[request] = self.first[request]
            return
        heapq.heappush(self.heap, (self.step + self.output[request] - 1, request))
        self.active += 1
        self._bound(self.effort[request], 1)
        self.early_until = max(self.early_until, self.step + self.early - 1)
        if self.output[request] > self.allowance:
            account = self.policy.open(EFFORTS[self.effort[request]])
            account.add(self.policy.top, self.policy.prices[self.policy.top], 1)
            self.accounts[request] = account

    def _bound(self, effort: int, change: int) -> None:
        """One sequence of this effort more, or less."""
        self.bounded[effort] += change
        self.floor = next((self.floors[e] for e in (2, 1) if self.bounded[e]), self.floors[0])

    def _finish(self, now: float) -> None:
        heap = self.heap
        while heap and heap[0][0] <= self.step:
            request = heapq.heappop(heap)[1]
            self.finish[request] = now
            self.active -= 1
            self._bound(self.effort[request], -1)
            self.accounts.pop(request, None)

    def _outcome(self, busy: float) -> Outcome:
        return Outcome(
            start_s=np.array(self.start),
            first_s=np.array(self.first),
            finish_s=np.array(self.finish),
            first_step=np.array(self.first_step, dtype=np.int64),
            steps=self.steps,
            tokens=self.tokens,
            wanted=self.wanted,
            prompt_rung=self.policy.top,
            busy_s=busy,
        )
