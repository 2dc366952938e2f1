"""Continuous batching of a nested model in this process, every pass at the rung that a controller picks.

A step reads up to `chunk` tokens of waiting prompts, each prompt's piece in a pass of its own, and then makes one token
for every sequence that has had its prompt read before, in one pass together: what `lowprec simulate` replays. Before a
step the controller is told what is scheduled and who waits; each pass is pinned to its rung, paid for, and timed.

    server = lowprec.serve("run", ttft_s=2.0, tpot_s=0.1, nats_per_token=0.1, slots=8)
    answer = server.generate("Once upon a time", tokens=64, effort="medium")  # .text, .tokens, .rungs, .loss_nats

`generate` may be called from several threads, which then share passes: whoever has the turn takes a step for all.
`submit` and `step` are the same without waiting, for a loop of one's own; `submit` waits for nobody's step. Decoding is
greedy unless `pick` says otherwise.

What a request's KV cache is kept in is settled when it is submitted and stays so. Caches of one kind are decoded
together; where requests of two kinds run, a step has a decoding pass for each, within the same number of slots.

A request fails alone: by its own `pick`, or with all others of a pass that fails; `answer` and `generate` raise what it
failed by, and its slot is free again.

Left out: preemption, prefix caching, streaming over a network.
"""

import contextlib
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lowprec.artifacts.loading import cache_argument
from lowprec.errors import ConfigError
from lowprec.ladder import Phase
from lowprec.live.requests import Batch, Pick, Request
from lowprec.live.slots import Slots
from lowprec.records import RoundedPart
from lowprec.runtime.demand import Reading
from lowprec.runtime.request_cache import request_cache
from lowprec.runtime.spending import NANONATS, Account
from lowprec.runtime.switch import Switch

LOOK_S = 0.01
"""Who waits for the turn looks this often whether its request was done meanwhile."""


class Policy(Protocol):
    """What picks the rungs; a `Controller` is one."""

    rung: int
    prices: tuple[int, ...]

    def decide(self, reading: Reading) -> int:
        """The wanted rung."""

    def open(self, effort: str) -> Account:
        """The account of a new request."""

    def pass_rung(self, phase: Phase, accounts: Collection[Account]) -> int:
        """The rung of a pass."""

    def settle(self, phase: Phase, rung: int, accounts: Collection[Account], tokens: int, seconds: float) -> None:
        """Enters a finished pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a request got.

    Attributes:
        text: of the tokens; None without a tokenizer.
        rungs: the rung of the pass that made each token, an index into the ladder.
        loss_nats: expected, per token, by the upper bounds of those rungs.
        waited_s, first_s, seconds: from its arrival until its prompt was begun, its first token, its last.
    """

    tokens: tuple[int, ...]
    text: str | None
    rungs: tuple[int, ...]
    loss_nats: float
    waited_s: float
    first_s: float
    seconds: float


def most_likely(logits: Tensor) -> int:
    """The token of the largest of [V] logits."""
    return int(logits.argmax())


class LiveServer:
    """See the module.

    Args:
        model: a causal model of transformers that `switch` belongs to, as `load_nested` gives them.
        tokenizer: for prompts that are text; may be None.
        policy: a `Controller` for the same rungs.
        slots: sequences that are decoded together at most, as the policy was told.
        chunk: tokens of prompts that a step reads at most.
        clock: seconds that do not go back.

    Raises:
        ConfigError: a switch of other rungs than the policy's.
        UnsupportedError: a model whose cache is not of keys and values.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        switch: Switch,
        policy: Policy,
        *,
        slots: int,
        chunk: int = 512,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if len(switch.rungs) != len(policy.prices):
            raise ConfigError(
                f"the model has {len(switch.rungs)} rungs and the policy {len(policy.prices)}: load it with the ladder "
                "that the policy is for"
            )
        self.model, self.tokenizer, self.switch, self.policy = model, tokenizer, switch, policy
        self.chunk, self.clock = chunk, clock
        self.slots = slots
        # By what their caches round; the first is of what the model was judged with.
        self._batches: dict[tuple[RoundedPart, ...], Batch] = {}
        self._batch_of(request_cache(model).parts)
        # Anyone appends, who has the turn takes out: no lock.
        self._waiting: deque[Request] = deque()
        self._reading: list[Request] = []
        self._cache_name, self._turn = cache_argument(model), threading.Lock()
        config = model.config
        windows = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
        self.longest = min((w for w in windows if w), default=1 << 30)

    def submit(
        self,
        prompt: str | Sequence[int],
        tokens: int = 128,
        effort: str = "medium",
        *,
        stop: Collection[int] | None = None,
        pick: Pick = most_likely,
        arrival_s: float | None = None,
        cache_bits: int | None = None,
    ) -> Request:
        """Enters a request; steps serve it. It waits for no step that runs.

        Args:
            prompt: text, or token ids.
            tokens: of the answer, at most.
            effort: "high" keeps every token at the top rung, "medium" in the upper half, "low" anywhere.
            stop: tokens that end the answer; None for those that the model's configuration names.
            arrival_s: when it came, by the server's clock; None for now.
            cache_bits: of its KV cache, from now to its end: None for what the model was judged with, 16, or 8 (see
                `lowprec.runtime.request_cache.request_cache`).

        Raises:
            ConfigError: a prompt that is empty, too long with its answer, or of unknown tokens; an unknown effort; text
                without a tokenizer; other bits.
            UnsupportedError: a cache of 8 bits that no layer can have.
        """
        ids = self._ids(prompt)
        tokens = _whole(tokens, "tokens of an answer")
        if tokens < 1 or not ids:
            raise ConfigError(f"a prompt of {len(ids)} tokens and an answer of {tokens}: give 1 or more of each")
        if not all(0 <= token < self.model.config.vocab_size for token in ids):
            raise ConfigError(f"the prompt has tokens outside the vocabulary of {self.model.config.vocab_size}")
        if len(ids) + tokens > self.longest:
            raise ConfigError(
                f"a prompt of {len(ids)} tokens and an answer of {tokens} are more than the {self.longest} that this "
                "model attends to"
            )
        request = Request(
            prompt=ids,
            limit=tokens,
            stops=frozenset(self._ends() if stop is None else stop),
            pick=pick,
            account=self.policy.open(effort),
            cache=request_cache(self.model, cache_bits),
            arrival_s=self.clock() if arrival_s is None else arrival_s,
        )
        self._waiting.append(request)
        return request

    def generate(self, prompt: str | Sequence[int], tokens: int = 128, effort: str = "medium", **given: Any) -> Answer:
        """Submits a request and takes steps until it is done; arguments as for `submit`.

        Raises:
            Exception: see `submit`; and what the request failed by.
        """
        request = self.submit(prompt, tokens, effort, **given)
        # Nobody would take up what is left behind here: it ends with the wait for it.
        with self._failing([request]):
            while not request.done:
                if self._turn.acquire(timeout=LOOK_S):
                    try:
                        if not request.done and not self._step():
                            raise RuntimeError("the server has nothing to do, and this request is not done")
                    finally:
                        self._turn.release()
        return self.answer(request)

    def answer(self, request: Request) -> Answer:
        """What a request has got; it is `done` when that is all.

        Raises:
            Exception: what the request failed by.
        """
        if request.error is not None:
            raise request.error
        rungs = tuple(request.account.rungs())
        spent = sum(self.policy.prices[rung] for rung in rungs) / NANONATS
        return Answer(
            tokens=tuple(request.tokens),
            text=None if self.tokenizer is None else self.tokenizer.decode(request.tokens),
            rungs=rungs,
            loss_nats=spent / max(len(rungs), 1),
            waited_s=request.start_s - request.arrival_s,
            first_s=request.first_s - request.arrival_s,
            seconds=request.finish_s - request.arrival_s,
        )

    def step(self) -> bool:
        """Takes one step for all requests; False where there is none. What fails a request is not raised here."""
        with self._turn:
            return self._step()

    @property
    def waiting(self) -> int:
        """Requests that wait and were not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that were begun and are not done."""
        return self._decoding + len(self._reading)

    @property
    def _decoding(self) -> int:
        return sum(len(batch.requests) for batch in self._batches.values())

    def _ids(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(_whole(token, "the number of a token") for token in prompt)
        if self.tokenizer is None:
            raise ConfigError("this model came without a tokenizer: give the prompt as token ids")
        return tuple(self.tokenizer(prompt)["input_ids"])

    def _ends(self) -> Collection[int]:
        generation = getattr(self.model, "generation_config", None)
        ends = getattr(generation, "eos_token_id", None)
        return () if ends is None else ends if isinstance(ends, list) else (ends,)

    def _batch_of(self, parts: tuple[RoundedPart, ...]) -> Batch:
        if parts not in self._batches:
            self._batches[parts] = Batch(Slots(self.model.config, parts, self.slots))
        return self._batches[parts]

    @contextlib.contextmanager
    def _failing(self, requests: Collection[Request]) -> Iterator[None]:
        """What goes wrong while open ends these requests and nothing else; Ctrl-C goes on to the thread it hit."""
        try:
            yield
        except BaseException as error:
            for request in requests:
                request.fail(error, self.clock())
            if not isinstance(error, Exception):
                raise

    def _step(self) -> bool:
        self._forget_ended()
        if not (self._waiting or self.running):
            return False
        now = self.clock()
        pieces, admitted = self._schedule(now)
        batches = [batch for batch in self._batches.values() if batch.requests]
        oldest = max(0.0, now - self._waiting[0].arrival_s) if self._waiting else 0.0
        prefill = sum(tokens for _, tokens in pieces)
        try:
            self.policy.decide(Reading(now, prefill, self._decoding, len(self._waiting), oldest, admitted))
            for request, tokens in pieces:
                self._read(request, tokens)
            for batch in batches:
                self._decode(batch)
        finally:
            # Whatever has ended the step, each request is in one place, and the next step goes on with it.
            self._sort()
        return True

    def _forget_ended(self) -> None:
        """Those that were given up since the last step, by Ctrl-C: no pass is for them, and nobody waits."""
        self._sort()
        if any(request.done for request in self._waiting.copy()):
            kept = [self._waiting.popleft() for _ in range(len(self._waiting))]
            # Who is entered meanwhile comes behind them.
            self._waiting.extendleft(request for request in reversed(kept) if not request.done)

    def _schedule(self, now: float) -> tuple[list[tuple[Request, int]], int]:
        """(request, tokens of its prompt) of this step, in order of arrival, and how many were admitted."""
        room, pieces, admitted = self.chunk, list[tuple[Request, int]](), 0
        while room:
            if len(pieces) == len(self._reading):
                if not self._waiting or self.running >= self.slots:
                    break
                request = self._waiting.popleft()
                request.start_s = now
                self._reading.append(request)
                admitted += 1
            request = self._reading[len(pieces)]
            tokens = min(room, len(request.prompt) - request.read)
            room -= tokens
            pieces.append((request, tokens))
        return pieces, admitted

    def _sort(self) -> None:
        """Frees the slots of what is done; has what was read decoded from the next step on."""
        for batch in self._batches.values():
            batch.drop_done()
        for request in self._reading:
            if request.done:
                request.cache = None
            elif request.tokens and request.cache is not None:
                with self._failing([request]):
                    self._batch_of(request.cache.parts).add(request)
        self._reading = [request for request in self._reading if not (request.tokens or request.done)]

    def _read(self, request: Request, tokens: int) -> None:
        """Reads a piece of a prompt; the pass over the last one makes the first token."""
        last = request.read + tokens == len(request.prompt)
        accounts = [request.account] if last else []
        with self._failing([request]):
            piece = request.prompt[request.read : request.read + tokens]
            rung = self.policy.pass_rung("prefill", accounts)
            logits, rung, seconds = self._pass(rung, torch.tensor([piece]), request.cache)
            request.read += tokens
            self.policy.settle("prefill", rung, accounts, tokens, seconds)
            if last:
                request.choose(logits[0], self.clock())

    def _decode(self, batch: Batch) -> None:
        """One token for each."""
        accounts = [request.account for request in batch.requests]
        with self._failing(batch.requests):
            rung = self.policy.pass_rung("decode", accounts)
            ids = torch.tensor([[request.tokens[-1]] for request in batch.requests])
            logits, rung, seconds = self._pass(rung, ids, batch.slots, **batch.slots.begin(self.model.dtype))
            batch.slots.end()
            self.policy.settle("decode", rung, accounts, len(accounts), seconds)
            now = self.clock()
            for request, row in zip(batch.requests, logits, strict=True):
                with self._failing([request]):
                    request.choose(row, now)

    def _pass(self, rung: int, ids: Tensor, cache: Any, **given: Tensor) -> tuple[Tensor, int, float]:
        """One forward pass at `rung` -> logits of the last position [B, V], the rung that it ran at, its seconds."""
        start = self.clock()
        with torch.inference_mode(), self.switch.pinned(rung):
            output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{self._cache_name: cache}, **given)
        ran = self.switch.last_rung
        assert ran is not None
        return output.logits[:, -1].float(), ran, self.clock() - start


def _whole(value: Any, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{value!r} is no whole number: give one for {what}") from None
