"""What a controller knows of the load: how much work waits, and how long it will take at each rung.

Rates and means decay with time, so that all of it is a few numbers however long a server runs. What a reading brings is
added up and worked in when some time has gone by: a step that changes nothing must cost next to nothing.

`work_s[r]`, the seconds of the machine that one request takes at rung r with all slots busy, is read off the ladder:

    work = slowness x (prefill(prompt) + output x decode(r, slots) / slots)
"""

import math
from operator import index
from typing import NamedTuple

from lowprec.ladder import Ladder

LARGEST_FACTOR = 8.0
SMALLEST_FACTOR = 1e-3
FEW = 8.0
QUANTILE_STEP = 0.1
UPDATES_PER_CONSTANT = 15
TELLING = 12.0
MOST = 1 << 40
LATEST_S = 1e15


class Reading(NamedTuple):
    """What the scheduler sees before a step; one is made at every step, hence the cheap kind of record.

    Attributes:
        now_s: any clock that does not go back.
        prefill_tokens, decode_tokens: scheduled for this step: of prompts, and sequences that get their next token.
        queue_length, oldest_wait_s: requests that wait and are not scheduled, and how long the first of them has.
        admitted: requests taken from the queue since the last reading.
    """

    now_s: float
    prefill_tokens: int
    decode_tokens: int
    queue_length: int
    oldest_wait_s: float
    admitted: int

    def is_sane(self) -> bool:
        """Whether all of it is numbers that can be true."""
        try:
            return (
                # A sum, for float() would take text.
                -LATEST_S <= self.now_s + 0.0 <= LATEST_S
                and 0.0 <= self.oldest_wait_s + 0.0 <= LATEST_S
                and 0 <= index(self.prefill_tokens) <= MOST
                and 0 <= index(self.decode_tokens) <= MOST
                and 0 <= index(self.queue_length) <= MOST
                and 0 <= index(self.admitted) <= MOST
            )
        except (TypeError, ValueError, OverflowError):
            return False


class Demand:
    """Estimates from readings and finished passes.

    Args:
        slots: sequences that are decoded together at most.
        longest_prompt: tokens up to which times of passes over prompts are tabulated.
        percentile: of measured over predicted waits that `wait_factor` tracks.
        rate_s, longest_rate_s: bounds of the time constant of rates, which is as long as so many requests take that
            they tell a rate (`TELLING`).
        mix_s: time constant of the mean prompt and output.
        prompt, output: tokens of a request, until some were seen.
    """

    def __init__(
        self,
        ladder: Ladder,
        slots: int,
        longest_prompt: int,
        *,
        percentile: float,
        rate_s: float,
        longest_rate_s: float,
        mix_s: float,
        prompt: int,
        output: int,
    ) -> None:
        self.slots, self.percentile, self.mix_s = slots, percentile, mix_s
        self.rate_s, self.longest_rate_s = rate_s, longest_rate_s
        # Prompts are read at the top.
        self.prefill = ladder.seconds("prefill", longest_prompt)[ladder.top]
        self.decode = ladder.seconds("decode", slots)
        self.arrivals_s = self.tokens_s = 0.0
        self.slowness = self.wait_factor = 1.0
        self.queue = 0
        self._requests, self._prompts, self._outputs = FEW, FEW * prompt, FEW * output
        self._elapsed = 0.0
        self._arrived = self._admitted = self._read = self._made = self._passes = 0
        self._took = self._expected = 0.0
        self._probe: tuple[int, float, float] | None = None
        self._derive()

    def read(self, reading: Reading, elapsed_s: float, rung: int) -> None:
        """Takes a sane reading, `elapsed_s` after the last one; `rung` is the present one."""
        self._arrived += reading.queue_length - self.queue + reading.admitted
        self._admitted += reading.admitted
        self._elapsed += elapsed_s
        self.queue = reading.queue_length
        if self._elapsed * UPDATES_PER_CONSTANT >= self.rate_s:
            self._work_in()
        if self.queue or self._probe is not None:
            self._measure_wait(reading, rung)

    def prompts_read(self, tokens: int, seconds: float) -> None:
        """Takes a finished pass over `tokens` tokens of prompts."""
        self._read += tokens
        self._compare(seconds, self.prefill_s(tokens), 1)

    def decoded(self, rung: int, sequences: int, seconds: float, passes: int) -> None:
        """Takes `passes` finished passes, each of one token for `sequences` sequences in `seconds`."""
        self._made += sequences * passes
        self._compare(seconds, self.decode[rung][sequences if sequences < self.slots else self.slots], passes)

    def _compare(self, seconds: float, expected: float, passes: int) -> None:
        # One pass that hung says little about the next, and none takes next to no time.
        self._took += min(max(seconds, expected * SMALLEST_FACTOR), expected * LARGEST_FACTOR) * passes
        self._expected += expected * passes
        self._passes += passes

    def _work_in(self) -> None:
        """Takes what has been added up since the last time."""
        elapsed, self._elapsed = self._elapsed, 0.0
        decay = math.exp(-elapsed / min(max(TELLING * self.work_s[-1], self.rate_s), self.longest_rate_s))
        self.arrivals_s = self.arrivals_s * decay + (1 - decay) * max(0, self._arrived) / elapsed
        self.tokens_s = self.tokens_s * decay + (1 - decay) * self._made / elapsed
        # The mean over the last requests, however long ago they were: a night without any leaves a few.
        decay = max(math.exp(-elapsed / self.mix_s), min(1.0, FEW / self._requests))
        self._requests = self._requests * decay + self._admitted
        self._prompts = self._prompts * decay + self._read
        self._outputs = self._outputs * decay + self._made
        if self._expected > 0:
            self.slowness += (1 - 0.95**self._passes) * (self._took / self._expected - self.slowness)
        self._arrived = self._admitted = self._read = self._made = self._passes = 0
        self._took = self._expected = 0.0
        self._derive()

    def _derive(self) -> None:
        """What follows from the estimates, for every rung.

        `prompt_s`: what the mean prompt takes. `stretch`: how much longer than its pass a token takes, for the steps
        have prompts between them.
        """
        slow, slots, output = self.slowness, self.slots, self._outputs / self._requests
        self.prompt_s = slow * self.prefill_s(self._prompts / self._requests)
        self.work_s = [self.prompt_s + slow * output * row[slots] / slots for row in self.decode]
        self.stretch = [slow / (1 - min(0.9, self.prompt_s * min(self.arrivals_s, 1 / w))) for w in self.work_s]

    def prefill_s(self, tokens: float) -> float:
        """Seconds of a pass over `tokens` tokens of prompts, by the ladder."""
        last = len(self.prefill) - 1
        return self.prefill[math.ceil(tokens)] if tokens <= last else self.prefill[last] * tokens / last

    def idle_s(self, rung: int) -> float:
        """Time to first token that nobody waited for."""
        return self.prompt_s + self.slowness * self.decode[rung][self.slots]

    def wait_s(self, rung: int, present: int, oldest_s: float, ahead_s: float) -> float:
        """How long who comes now, or will have come in `ahead_s`, waits at `rung`; or has, if that is longer."""
        if not self.queue:
            return 0.0
        work = self.work_s[rung]
        growth = max(0.0, self.arrivals_s * work - 1.0) * ahead_s
        return max(self.wait_factor * self.queue * work + growth, oldest_s * work / self.work_s[present])

    def token_s(self, rung: int, sequences: int) -> float:
        """Seconds from token to token for each of `sequences`, steps with prompts between them."""
        return self.stretch[rung] * self.decode[rung][sequences if sequences < self.slots else self.slots]

    def load(self, rung: int) -> float:
        """Share of a rung's capacity that the tokens really made, and their prompts, take."""
        return self.tokens_s * self.work_s[rung] / max(self._outputs / self._requests, 1.0)

    def least_load(self, rung: int) -> float:
        """The load, or where nobody waits that of the present arrivals, if it is less."""
        load = self.load(rung)
        return load if self.queue else min(load, self.arrivals_s * self.work_s[rung])

    def forget_wait(self) -> None:
        """Gives up a wait that is being measured: the rung it was predicted at is left."""
        self._probe = None

    def _measure_wait(self, reading: Reading, rung: int) -> None:
        """Compares how long a queue took with what was predicted, one queue at a time."""
        if self._probe is not None:
            left, start, predicted = self._probe
            left -= reading.admitted
            if left > 0:
                self._probe = (left, start, predicted)
                return
            above = reading.now_s - start > predicted
            step = QUANTILE_STEP * (self.percentile - (0.0 if above else 1.0))
            self.wait_factor = min(max(self.wait_factor * math.exp(step), 0.5), LARGEST_FACTOR)
            self._probe = None
        # When the next slot becomes free is chance; that of half the slots can be predicted.
        if self.queue >= max(2, self.slots // 2):
            self._probe = (self.queue, reading.now_s, self.wait_factor * self.queue * self.work_s[rung])
