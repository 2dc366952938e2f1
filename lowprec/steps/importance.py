"""What gradients say about rounding a group: how much each token matters, and how its outputs hang together.

Tokens weigh by the squared gradient of a sampled label's log-likelihood:

    c[t] = sum over the group's layers of mean over outputs n of (d log p(y) / d y[t, n])^2,    y sampled from the model
    weight[t] = sqrt(clamp(c[t] / mean c, 1/20, 20)),    scaled to a mean of 1

With c for weights a Hessian X^T diag(c) X is the Fisher information of the group's weight when tokens and output
channels are taken apart (GuidedQuant, arXiv 2505.07004, equation 8, with one weight for all channels). The square root
is kept: it keeps half of the gain and more of the tokens.

The same pass gathers D^T D of each layer's output gradients D [tokens, N], over OUTPUT_TOKENS of them in batches that
are drawn: what `lowprec.solvers.two_sided` rounds with.

Tried in a prototype on SmolLM2-135M, uniform INT4 g64, 32 k tokens of technical text, compensated, damping 0.3; KL in
nats, and perplexity, on (technical, literature, code, exam questions): without weights 0.067 0.166 0.070 0.129, +8.0 %
over all; with them 0.061 0.165 0.066 0.123, +7.4 %. As built, damping 0.2, about 18 k tokens of each: 0.108 over all
without, 0.104 with, but a perplexity of +8.3 % without and +8.6 % with. A pass forwards and one backwards is what it
costs (63 s there, where compensating takes 100), so only `--effort best` pays it. Where rows make up for each other
weights win nothing more: INT3 g64, turned, KL 0.341 over all and perplexity +32.1 % with them, 0.341 and +32.6 %
without, in 338 processor seconds instead of 456.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.records import Group
from lowprec.steps.backward import backward
from lowprec.steps.memory import trim
from lowprec.steps.outcome import Outcome
from lowprec.steps.stream import NOTHING, Stream, fast_dtype, products_of
from lowprec.steps.tokens import windows_of

LARGEST = 20.0
BATCHES_AT_ONCE = 2
OUTPUT_TOKENS = 8192
# Rows that are known to each other: D^T D of wider layers is taken in parts, so that it grows with N and not with N^2.
OUTPUT_ROWS = 2048

Importance = Mapping[str, Sequence[Tensor]]
"""Group -> for each batch what its tokens weigh, [B, T] (or [B]); 0 where there is none."""

Keep = Callable[[Group, Sequence[Tensor]], object]
"""Is given each group with D^T D of its layers, in parts of OUTPUT_ROWS rows, [R, R] float32 each."""


def token_importance(
    stream: Stream,
    groups: Sequence[Group],
    batches: Sequence[Any],
    outcome: Outcome,
    seed: int = 0,
    keep: Keep | None = None,
) -> Importance:
    """The weights of all groups inside the blocks; those outside, and models without a cut, have none.

    Args:
        keep: takes what is known of the groups' outputs; None: that is not gathered.
    """
    if stream.whole:
        return {}
    found: dict[str, dict[int, Tensor]] = {group.name: {} for group in groups if group.block is not None}
    generator = torch.Generator().manual_seed(seed)
    left = _shuffled(batches, seed)
    with stream.computing(fast_dtype(stream)):
        at_once = BATCHES_AT_ONCE if keep is None else _holding([batches[p] for p in left], outcome, OUTPUT_TOKENS)
        while left:
            some, left = left[:at_once], left[at_once:]
            squares = _squares(stream, groups, [batches[p] for p in some], outcome, generator, keep)
            for name, parts in found.items():
                parts |= dict(zip(some, squares[name], strict=True))
            at_once, keep = BATCHES_AT_ONCE, None
            trim()
    positions = [outcome.positions(batch) for batch in batches]
    return {name: _scaled([parts[p] for p in range(len(batches))], positions) for name, parts in found.items()}


def output_gradients(
    stream: Stream, groups: Sequence[Group], batches: Sequence[Any], outcome: Outcome, keep: Keep, seed: int = 0
) -> None:
    """Gathers what is known of the groups' outputs, without what tokens weigh: OUTPUT_TOKENS of them are enough."""
    shuffled = [batches[p] for p in _shuffled(batches, seed)]
    token_importance(stream, groups, shuffled[: _holding(shuffled, outcome, OUTPUT_TOKENS)], outcome, seed, keep)


def _shuffled(batches: Sequence[Any], seed: int) -> list[int]:
    """Positions in a seeded order: batches come by length, and the first ones are the ends of documents."""
    return torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()


def _holding(batches: Sequence[Any], outcome: Outcome, tokens: int) -> int:
    """How many of the first batches hold so many real tokens; BATCHES_AT_ONCE where they are not made of tokens."""
    held = 0
    for number, batch in enumerate(batches, start=1):
        positions = outcome.positions(batch)
        if positions is None:
            return BATCHES_AT_ONCE
        held += int(positions.sum())
        if held >= tokens:
            return number
    return len(batches)


def _squares(
    stream: Stream,
    groups: Sequence[Group],
    batches: Sequence[Any],
    outcome: Outcome,
    generator: torch.Generator,
    keep: Keep | None,
) -> dict[str, list[Tensor]]:
    """c of some batches; hands on what is known of the outputs."""
    found: dict[str, list[Tensor]] = {group.name: [] for group in groups}

    def behind(hidden: Sequence[Any]) -> list[Tensor]:
        gradients = []
        with stream.outer():
            for given, batch in zip(hidden, batches, strict=True):
                leaf = given.to(stream.device).requires_grad_()
                for rows, window in windows_of(batch):
                    output = stream.leave(leaf[rows], window)
                    torch.autograd.backward(outcome.sampled_log_likelihood(output, window, generator))
                assert leaf.grad is not None
                gradients.append(leaf.grad)
        return gradients

    @contextlib.contextmanager
    def opened(index: int) -> Iterator[None]:
        handles = []
        inside = [g for g in groups if g.block == index]
        products: dict[str, list[Tensor]] = {}
        for group in inside:
            sums: list[Tensor] = []
            for layer in group.layers:
                module = stream.layers[layer]
                handles.append(module.register_full_backward_hook(_adds(sums)))
                if keep is not None:
                    handles.append(module.register_full_backward_hook(_multiplies(products, layer)))
            found[group.name] = sums
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for group in inside:
            if keep is not None and all(layer in products for layer in group.layers):
                keep(group, [part for layer in group.layers for part in products[layer]])

    backward(stream, batches, NOTHING, behind, opened)
    return found


def _adds(sums: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that adds the mean square of each token's output gradient, batch by batch."""
    done = 0

    def hook(_: nn.Module, __: Any, gradients: tuple[Tensor, ...]) -> None:
        nonlocal done
        square = gradients[0].float().square().mean(-1).cpu()
        if done == len(sums):
            sums.append(square)
        else:
            sums[done] += square
        done += 1

    return hook


def _multiplies(products: dict[str, list[Tensor]], layer: str) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that adds up D^T D of the layer's output gradients; those of padding are zero."""

    def hook(_: nn.Module, __: Any, gradients: tuple[Tensor, ...]) -> None:
        parts = torch.split(gradients[0].flatten(0, -2).float(), OUTPUT_ROWS, dim=1)
        with products_of(gradients[0].dtype):
            found = [part.T @ part for part in parts]
        products[layer] = [a + b for a, b in zip(products[layer], found, strict=True)] if layer in products else found

    return hook


def _scaled(parts: Sequence[Tensor], positions: Sequence[Tensor | None]) -> list[Tensor]:
    """c -> the weights."""
    real = [
        torch.ones_like(p) if w is None or w.shape != p.shape else w.float().cpu()
        for p, w in zip(parts, positions, strict=True)
    ]
    tokens = sum(float(r.sum()) for r in real)
    mean = sum(float((p * r).sum()) for p, r in zip(parts, real, strict=True)) / tokens
    if mean <= 0.0:
        return list(real)
    roots = [(p / mean).clamp(1.0 / LARGEST, LARGEST).sqrt() * r for p, r in zip(parts, real, strict=True)]
    mean = sum(float(r.sum()) for r in roots) / tokens
    return [root / mean for root in roots]
