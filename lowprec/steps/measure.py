"""Measures what a change of the model costs: runs reference and candidates on the same batches and compares outputs.

Everything streams: a candidate is a stream, an overlay, and the hidden states behind its last block. What differs
only from some block on starts from the reference's hidden states there (`measure_pairs`).
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowprec.steps.calibrate import Progress
from lowprec.steps.memory import trim
from lowprec.steps.scores import PairedScores, token_scores
from lowprec.steps.stream import NOTHING, Call, Overlay, Stream, Swap
from lowprec.steps.tokens import TokenSet, portions_of

Compare = Callable[[Tensor, Tensor, Any], Tensor]
"""(reference output, output, batch) -> [B, columns]; the last column is KL in nats, or what stands for it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """A model's way through some batches: hidden states behind the last block, one per batch."""

    stream: Stream
    hidden: Sequence[Any]
    overlay: Overlay


@torch.no_grad()
def run_through(
    stream: Stream, batches: Sequence[Any], overlay: Overlay = NOTHING, progress: Progress = lambda done, total: None
) -> Run:
    """Streams all batches through all blocks."""
    hidden, calls = _entered(stream, batches, overlay)
    for index in range(stream.depth):
        with stream.block(index, overlay):
            # In place: two lists of all hidden states would be a good part of a run's memory.
            for position, call in enumerate(calls):
                hidden[position] = stream.run(index, hidden[position], call[index])
        trim()
        progress(index + 1, stream.depth)
    return Run(stream=stream, hidden=hidden, overlay=overlay)


def _entered(stream: Stream, batches: Sequence[Any], overlay: Overlay = NOTHING) -> tuple[list[Any], list[list[Call]]]:
    """What block 0 receives for each batch, and how the blocks are called."""
    hidden: list[Any] = []
    calls: list[list[Call]] = []
    with stream.outer(overlay):
        for batch in batches:
            given, call = stream.enter(batch)
            hidden.append(given)
            calls.append(call)
    return hidden, calls


@torch.no_grad()
def compare(reference: Run, candidates: Sequence[Run], batches: Sequence[Any], by: Compare) -> list[Tensor]:
    """[rows of all batches, columns] for each candidate."""
    rows: list[list[Tensor]] = [[] for _ in candidates]
    # Weights of the reference are made once, not once a batch; of candidates as well, unless there are many to hold.
    mine = reference.stream.outer()
    alone = _outside(candidates[0]) if len(candidates) == 1 else None
    for position, batch in enumerate(batches):
        with mine:
            expected = reference.stream.leave(reference.hidden[position], batch)
        for index, candidate in enumerate(candidates):
            # Opened within the reference's, weights that both have are not made again.
            with contextlib.nullcontext() if alone else mine, alone or _outside(candidate):
                output = candidate.stream.leave(candidate.hidden[position], batch)
            rows[index].append(by(expected, output, batch).cpu())
        trim()
    return [torch.cat(found) for found in rows]


def _outside(run: Run) -> Swap:
    """The run's model outside its blocks."""
    stream = run.stream
    return stream.outer({name: o for name, o in run.overlay.items() if stream.block_of(name) is None})


def compare_tokens(reference: Tensor, output: Tensor, batch: Any) -> Tensor:
    """Logits [B, T, V] of next tokens -> [B, 5]: tokens, loss before, loss after, top-1 agreements, KL, summed."""
    rows = []
    for row, length in enumerate(batch.lengths.tolist()):
        labels = batch.ids[row, 1:length].to(output.device)
        before, after, kl, same = token_scores(reference[row, : length - 1], output[row, : length - 1], labels)
        sums = [before.sum(), after.sum(), same.sum(), kl.sum()]
        rows.append(torch.stack([torch.tensor(float(length - 1)), *[s.double().cpu() for s in sums]]))
    return torch.stack(rows)


def compare_vectors(metric: Callable[[Tensor, Tensor], Tensor] | None) -> Compare:
    """For outputs [B, ...] without probabilities -> [B, 3]: one, the metric's value, half the squared error.

    Args:
        metric: (reference, output) -> [B] loss, zero when nothing changed; None takes half the squared error.
    """

    def by(reference: Tensor, output: Tensor, _: Any) -> Tensor:
        half_square = 0.5 * (output - reference).flatten(1).double().square().sum(1)
        value = half_square if metric is None else metric(reference, output).double()
        return torch.stack([torch.ones_like(half_square), value, half_square], 1)

    return by


def mean_kl(table: Tensor) -> float:
    """KL per event of a comparison's table: its first column counts, its last one sums."""
    return float(table[:, -1].sum() / table[:, 0].sum())


def paired(table: Tensor, data: TokenSet, batches: Sequence[Any]) -> PairedScores:
    """The table of `compare_tokens` with each window's unit and source."""
    order = [window for batch in batches for window in batch.index]
    columns = table.double().numpy()
    return PairedScores(
        unit=np.array([data.units[i] for i in order]),
        source=np.array([data.sources[i] for i in order]),
        tokens=columns[:, 0].astype(np.int64),
        loss_reference=columns[:, 1],
        loss=columns[:, 2],
        top1=columns[:, 3],
        kl=columns[:, 4],
    )


@torch.no_grad()
def measure_pairs(
    stream: Stream,
    batches: Sequence[Any],
    overlays: Mapping[tuple[str, str], Overlay],
    by: Compare,
    progress: Progress = lambda done, total: None,
) -> dict[tuple[str, str], float]:
    """Measured KL of each (group, scheme) alone, nats per event.

    Each pair starts at its first block from the reference's hidden states, so the blocks before it cost nothing; one
    that changes what stands before the blocks goes through all of them.
    """
    portions, done = portions_of(batches, len(overlays)), itertools.count(1)
    tables = [
        _compared_pairs(stream, some, overlays, by, lambda: progress(next(done), stream.depth * len(portions)))
        for some in portions
    ]
    return {pair: mean_kl(torch.cat([table[pair] for table in tables])) for pair in overlays}


def _compared_pairs(
    stream: Stream,
    batches: Sequence[Any],
    overlays: Mapping[tuple[str, str], Overlay],
    by: Compare,
    passed: Callable[[], None],
) -> dict[tuple[str, str], Tensor]:
    """The comparison's table of each pair; `passed` is told of each block."""
    hidden, calls = _entered(stream, batches)
    own = {pair: {_block(stream, name) for name in overlay} for pair, overlay in overlays.items()}
    first = {pair: min(blocks) for pair, blocks in own.items()}
    changed: dict[tuple[str, str], Run] = {}
    for pair in (p for p, block in first.items() if block < 0):
        changed[pair] = Run(stream=stream, hidden=_entered(stream, batches, overlays[pair])[0], overlay=overlays[pair])
    for index in range(stream.depth):
        # Those that change this block run it as they have it; the others, and the reference, as it is.
        for pair in (p for p, blocks in own.items() if index in blocks):
            before = changed[pair].hidden if pair in changed else hidden
            with stream.block(index, overlays[pair]):
                after = [stream.run(index, h, call[index]) for h, call in zip(before, calls, strict=True)]
            changed[pair] = Run(stream=stream, hidden=after, overlay=overlays[pair])
        with stream.block(index):
            for pair in (p for p, block in first.items() if block < index and index not in own[p]):
                run = changed[pair]
                after = [stream.run(index, h, call[index]) for h, call in zip(run.hidden, calls, strict=True)]
                changed[pair] = dataclasses.replace(run, hidden=after)
            hidden = [stream.run(index, h, call[index]) for h, call in zip(hidden, calls, strict=True)]
        trim()
        passed()
    for pair in (p for p, block in first.items() if block >= stream.depth):
        changed[pair] = Run(stream=stream, hidden=hidden, overlay=overlays[pair])
    reference = Run(stream=stream, hidden=hidden, overlay=NOTHING)
    return dict(zip(changed, compare(reference, list(changed.values()), batches, by), strict=True))


def _block(stream: Stream, layer: str) -> int:
    """The block that differs with the layer: -1 before the first, `depth` behind the last."""
    if layer in stream.tables and not stream.whole:
        return -1
    block = stream.block_of(layer)
    return stream.depth if block is None else block
