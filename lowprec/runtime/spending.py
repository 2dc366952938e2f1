"""A loss budget that is spent like money: token buckets, and what each request has been given.

A bucket earns `rate` for every token, pays the expected loss of the rung that the token is made at, and holds at most
`burst`. Who asks before each pass and pays after it never overdraws it, so that for any window of n consecutive tokens

    sum of losses  <=  burst + n rate          (what it held before, at most burst, and what it earned)

and with rate x 10,000 + burst <= budget x 10,000 no window of 10,000 tokens loses more than the budget. This is the
arrival curve of a token bucket (Cruz 1991, "A calculus for network delay", I), with nats in place of bits and tokens
in place of seconds. All of a pass's tokens are paid at once; they cost the same, so what holds at both ends holds
between them.

Money is counted in whole nanonats, losses rounded up, earnings down: no sum of rounding errors can overspend.

A token's loss is that of its own rung. What a token inherits from keys and values that lower rungs have written is not
counted: it was not measured.
"""

import math
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Real
from typing import Any

from lowprec.errors import ConfigError

NANONATS = 1_000_000_000
MOST_NATS = 100.0
"""Of a budget: one that is higher than any vocabulary's entropy is a mistake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossBudget:
    """At most `nats_per_token` on average over any `window_tokens` consecutive tokens.

    `burst_share` of it may be saved up and spent at once, the rest is earned token by token: a high share serves long
    bursts after long calm, a low one spends evenly.

    Raises:
        ConfigError: a value that no budget can have.
    """

    nats_per_token: float
    window_tokens: int = 10_000
    burst_share: float = 0.2

    def __post_init__(self) -> None:
        if not (is_number(self.nats_per_token) and 0.0 < self.nats_per_token <= MOST_NATS):
            raise ConfigError(
                f"budget {self.nats_per_token!r} nats per token is outside (0, {MOST_NATS:g}]: give for example 0.05"
            )
        # Whole, or money would no longer be.
        if not (is_number(self.window_tokens) and isinstance(self.window_tokens, int) and self.window_tokens >= 1):
            raise ConfigError(
                f"a window of {self.window_tokens!r} tokens: give a whole number, 1 or more, for example 10000"
            )
        if not (is_number(self.burst_share) and 0.0 <= self.burst_share < 1.0):
            raise ConfigError(f"burst share {self.burst_share!r} is outside [0, 1): give for example 0.2")

    @property
    def rate(self) -> int:
        """Nanonats earned per token; rate x window + burst is at most the budget of a window."""
        return (self._window - self.burst) // self.window_tokens

    @property
    def burst(self) -> int:
        """Nanonats that are held at most."""
        return int(self._window * self.burst_share)

    @property
    def _window(self) -> int:
        return math.floor(Fraction(self.nats_per_token) * self.window_tokens * NANONATS)


def price_of(nats: float) -> int:
    """Nanonats of a loss, rounded up."""
    return math.ceil(Fraction(nats) * NANONATS)


class Bucket:
    """What may still be lost. It begins full."""

    __slots__ = ("balance", "burst", "rate")

    def __init__(self, budget: LossBudget) -> None:
        self.rate, self.burst = budget.rate, budget.burst
        self.balance = self.burst

    def passes(self, price: int, tokens: int, most: int) -> int:
        """How many passes in a row can be paid, up to `most`: `tokens` tokens each, at `price` nanonats a token."""
        drain = (price - self.rate) * tokens
        return most if drain <= 0 else max(0, min(most, self.balance // drain))

    def pay(self, price: int, tokens: int) -> bool:
        """Earns for `tokens` tokens and pays for them. What cannot be paid overdraws: ask `passes` first.

        Returns:
            whether it did overdraw; until that is earned again no pass that costs more than it earns can be paid.
        """
        drain = (price - self.rate) * tokens
        self.balance = min(self.burst, self.balance - drain)
        return self.balance < 0 < drain


@dataclass(slots=True, kw_only=True)
class Account:
    """One request: how low it may be taken, what it may still lose, and the rung of each of its tokens.

    Attributes:
        floor: lowest rung that its effort allows.
        made: tokens made so far.
        runs: [rung, tokens] in the order of the tokens, neighbours of one rung merged.
    """

    floor: int
    bucket: Bucket
    made: int = 0
    runs: list[list[int]] = field(default_factory=list)

    def add(self, rung: int, price: int, tokens: int) -> bool:
        """Enters `tokens` tokens that were made at `rung`; whether that overdraws."""
        self.made += tokens
        if self.runs and self.runs[-1][0] == rung:
            self.runs[-1][1] += tokens
        else:
            self.runs.append([rung, tokens])
        return self.bucket.pay(price, tokens)

    def rungs(self) -> list[int]:
        """The rung of every token."""
        return [rung for rung, tokens in self.runs for _ in range(tokens)]


def is_number(value: object) -> bool:
    """Whether it is finite, and no truth value or text."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    largest: Any = sys.float_info.max
    return bool(abs(value) <= largest)
