"""What is asked of a server: a request on its way, and those that are decoded together."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from lowprec.live.slots import Slots
from lowprec.runtime.request_cache import RequestCache
from lowprec.runtime.spending import Account

Pick = Callable[[Tensor], int]
"""[V] logits of one sequence -> its next token."""


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A request on its way; `tokens` grows until `done`. Times are the server's clock's.

    Attributes:
        cache: its own, of the kind that it was admitted with, until it is decoded with others; None from then on.
        read: tokens of its prompt that are in the cache.
        error: what ended it before it had all its tokens.
    """

    prompt: tuple[int, ...]
    limit: int
    stops: frozenset[int]
    pick: Pick
    account: Account
    cache: RequestCache | None
    arrival_s: float
    start_s: float = 0.0
    first_s: float = 0.0
    finish_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    error: Exception | None = None
    read: int = 0

    def choose(self, logits: Tensor, now_s: float) -> None:
        """Picks its next token out of [V] logits.

        Raises:
            ValueError: what was picked is no token, which would fail the next pass of all.
        """
        token = operator.index(self.pick(logits))
        if not 0 <= token < len(logits):
            raise ValueError(f"pick gave {token}, which is no token of a vocabulary of {len(logits)}")
        self.first_s = self.first_s if self.tokens else now_s
        self.tokens.append(token)
        if len(self.tokens) == self.limit or token in self.stops:
            self.finish_s = now_s
            self.done = True

    def fail(self, error: BaseException, now_s: float) -> None:
        """Ends it by an error; one that was done stays so."""
        if self.done:
            return
        if not isinstance(error, Exception):
            # Ctrl-C is for the thread that it hit, not for the owners of what was computed there.
            cause, error = error, RuntimeError(f"the pass of this request was ended by {type(error).__name__}")
            error.__cause__ = cause
        self.error, self.finish_s = error, now_s
        self.done = True


class Batch:
    """Requests that are decoded together, those of one kind of cache: request i is the sequence in row i."""

    def __init__(self, slots: Slots) -> None:
        self.slots, self.requests = slots, list[Request]()

    def add(self, request: Request) -> None:
        """Takes a request whose prompt is read."""
        self.slots.add(request.cache, request.read)
        self.requests.append(request)
        request.cache = None

    def drop_done(self) -> None:
        """Frees the rows of those that are done."""
        for row in reversed(range(len(self.requests))):
            if self.requests[row].done:
                self.slots.remove(row)
                # As the rows do: the last one takes the place.
                self.requests[row] = self.requests[-1]
                self.requests.pop()
