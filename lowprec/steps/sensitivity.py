"""Sensitivity, backwards: what every (group, scheme) costs, in nats of KL, from one backward pass per sequence.

For a small change of a layer's output the Fisher information gives, per sequence,

    KL(p || p') = 1/2 E_y [ e(y)^2 ],    e(y) = <dW, grad_W log p(y)> + <dx, grad_x log p(y)>

with y sampled from the model (Amari, Natural gradient works efficiently in learning, 1998, eq. 2). The square is taken
of the whole sequence's sum: an error at one token reaches the tokens after it, and squaring per token underrates
attention's layers several times. dW is the error that the solver really left, dx the rounding error of the layer's
input, both summed over the layers of a group before they are squared; or dx is that of the keys, or of the values, that
a cache stores. All schemes share one backward pass: a layer's gradient G[N, K] is formed once per sequence and
multiplied with every scheme's error.

The pass goes through the blocks from the last to the first, recomputing each from the inputs that calibration kept, so
that only one block's errors and gradients are ever held. A killed pass resumes at the block that was cut.

Groups are squared apart, too. Adding their e before squaring would include the cross terms of a mix, but those come
out as noise: on SmolLM2-135M in uniform INT4 the sum of squares predicted 0.101 nats, the square of the sum 0.112, and
0.104 were measured.

Left out: squares per token, scaled to these ones per role or pooled over a group's formats and shrunk to the role's
mean. They have far less noise (131 sequences: 0.16 instead of 0.21 in the logarithm within w4a8-int8), but ranked 60
pairs no better overall (Spearman 0.989 against 0.977; within w4a16 0.98 either way), and cost a product per format.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowprec.errors import ArtifactError
from lowprec.records import CacheGroup, Group, Scheme, SensitivityRow
from lowprec.steps.caches import NO_CACHES, Caches
from lowprec.steps.calibrate import Calibration, Progress
from lowprec.steps.effects import Errors, Key, Probe, Row
from lowprec.steps.memory import trim
from lowprec.steps.outcome import Outcome
from lowprec.steps.scratch import Scratch
from lowprec.steps.stream import Call, Stream
from lowprec.steps.tokens import rows_of_batch
from lowprec.transforms import Smoothed, keys_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Effects:
    """First-order effects e of each rounding on the sampled log-likelihood, [sequences, columns].

    `columns` names what each column is: (group, "weight", "activation" or "table", format), a format that is smoothed
    being marked (`lowprec.transforms.keys_of`), or (place, "cache", format). `events` [sequences] is how many
    predictions each sequence makes.
    """

    columns: tuple[Key, ...]
    values: Tensor
    events: Tensor
    smoothed: tuple[Smoothed, ...] = ()

    def of(self, group: str, scheme: Scheme) -> Tensor:
        """[sequences] effect of `group` in `scheme`."""
        return torch.stack(self._parts(group, scheme)).sum(0)

    def _parts(self, group: str, scheme: Scheme) -> list[Tensor]:
        weight, activation = keys_of(self.smoothed, group, scheme)
        kinds = [("weight", weight), ("activation", activation), ("table", weight)]
        return self._values([(group, kind, fmt) for kind, fmt in kinds if fmt is not None])

    def _values(self, keys: Sequence[Key]) -> list[Tensor]:
        # A layer that the output does not depend on got no gradient: rounding it has no effect.
        return [
            self.values[:, self.columns.index(key)].double()
            if key in self.columns
            else torch.zeros(len(self.values), dtype=torch.float64)
            for key in keys
        ]

    def kl(self, group: str, scheme: Scheme) -> tuple[float, float]:
        """Predicted KL of `group` in `scheme` per event, in nats, and its standard error over sequences.

        Weight and activation errors are squared apart: their product averages to zero, and leaving it in would let
        noise rank a scheme with rounded activations before the same weights without. So is what an embedding reads of
        a shared table from what the head makes of it.
        """
        return self._kl(self._parts(group, scheme))

    def cache_kl(self, group: CacheGroup, fmt: str) -> tuple[float, float]:
        """The same of a group of the cache in the cache format `fmt`.

        Its places are squared apart, as groups are: one that spans the model would otherwise have nothing but cross
        terms of layers that have nothing to do with each other.
        """
        return self._kl(self._values([(place.name, "cache", fmt) for place in group.places]))

    def _kl(self, parts: Sequence[Tensor]) -> tuple[float, float]:
        squares = sum(effect.square() for effect in parts) * 0.5 / self.events.double().mean()
        return float(squares.mean()), float(squares.std(correction=0) / max(len(squares) - 1, 1) ** 0.5)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pass:
    """What the backward pass is made of."""

    stream: Stream
    batches: Sequence[Any]
    outcome: Outcome
    scratch: Scratch
    seed: int

    def sampled(self, output: Tensor, position: int) -> Tensor:
        """Log-likelihood of labels that depend on the seed and the batch alone, so that a resumed pass agrees."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position)
        return self.outcome.sampled_log_likelihood(output, self.batches[position], generator)

    def whole(self, probe: Probe) -> list[Row]:
        """A model without a cut: one pass through all of it."""
        rows = []
        with self.stream.block(0), probe.hooks():
            for position, batch in enumerate(self.batches):
                torch.autograd.backward(self.sampled(self.stream.run(0, batch, ((), {})), position))
                rows.append(probe.take())
        return rows

    def tail(self, probe: Probe) -> tuple[list[Row], list[Tensor]]:
        """Through what lies behind the blocks; also returns the gradient of each batch's last hidden state."""
        rows, gradients = [], []
        hidden = self._inputs(self.stream.depth)
        with self.stream.outer(), probe.hooks():
            for position, batch in enumerate(self.batches):
                given = hidden[position].to(self.stream.device).requires_grad_()
                likelihood = self.sampled(self.stream.leave(given, batch), position)
                gradients.append(torch.autograd.grad(likelihood, given)[0])
                rows.append(probe.take())
                trim()
        return rows, gradients

    def block(
        self, index: int, probe: Probe, gradients: list[Tensor], calls: Sequence[Sequence[Call]]
    ) -> tuple[list[Row], list[Tensor]]:
        """Through block `index`; `gradients` are those of its outputs, and those of its inputs come back."""
        rows, before = [], []
        hidden = self._inputs(index)
        with self.stream.block(index), probe.hooks():
            for given, gradient, call in zip(hidden, gradients, calls, strict=True):
                leaf = given.to(self.stream.device).requires_grad_()
                out = self.stream.run(index, leaf, call[index])
                before.append(torch.autograd.grad(out, leaf, gradient.to(self.stream.device))[0])
                rows.append(probe.take())
        return rows, before

    def entry(self, probe: Probe, gradients: Sequence[Tensor]) -> list[Row]:
        """Through what stands before the blocks; `gradients` are those of the first block's inputs."""
        rows = []
        with self.stream.outer(), probe.table_hooks():
            for batch, gradient in zip(self.batches, gradients, strict=True):
                torch.autograd.backward(self.stream.lookup(batch), gradient.to(self.stream.device))
                rows.append(probe.take())
        return rows

    def _inputs(self, index: int) -> list[Tensor]:
        hidden = self.scratch.load(f"input-{index}")
        if hidden is None:
            raise ArtifactError(self.scratch.path, f"input-{index} is missing; delete the folder and calibrate again")
        return hidden


def effects(
    stream: Stream,
    groups: Sequence[Group],
    schemes: Mapping[str, Sequence[Scheme]],
    batches: Sequence[Any],
    outcome: Outcome,
    errors: Errors,
    calibration: Calibration,
    scratch: Scratch,
    seed: int,
    progress: Progress = lambda done, total: None,
    caches: Caches = NO_CACHES,
) -> Effects:
    """Runs the pass over the batches whose block inputs calibration kept in `scratch`.

    Args:
        schemes: group -> the schemes to score.
        errors: the rounding error of each layer in each weight format.
        calibration: what static activation scales come from.
        seed: of the sampled labels.
        caches: the groups of the cache to score.
    """
    run = _Pass(stream=stream, batches=batches, outcome=outcome, scratch=scratch, seed=seed)

    def probe(chosen: Sequence[Group], cached: Caches = NO_CACHES) -> Probe:
        return Probe(stream, chosen, schemes, errors, calibration, cached)

    columns: list[Key] = []
    values: list[Tensor] = []

    def keep(rows: Sequence[Row]) -> None:
        for key in rows[0]:
            columns.append(key)
            values.append(torch.cat([row[key].cpu() for row in rows]))

    with stream.outer():
        entered = [stream.enter(batch) for batch in batches]
    events = torch.cat(
        [outcome.events(batch, rows_of_batch(h, batch)) for (h, _), batch in zip(entered, batches, strict=True)]
    )
    if stream.whole:
        keep(run.whole(probe(groups, caches)))
        return Effects(
            columns=tuple(columns), values=torch.stack(values, 1), events=events, smoothed=calibration.smoothed
        )
    calls = [call for _, call in entered]
    start = scratch.note("backward")
    if start is None:
        rows, gradients = run.tail(probe([g for g in groups if g.block is None and not g.is_embedding]))
        _checkpoint(scratch, stream.depth, rows, gradients)
        start = stream.depth
    else:
        gradients = scratch.load(f"gradient-{start}") or []
    for index in reversed(range(start)):
        cached = caches.inside(lambda module, index=index: stream.block_of(module) == index)  # type: ignore[misc]
        rows, gradients = run.block(index, probe([g for g in groups if g.block == index], cached), gradients, calls)
        _checkpoint(scratch, index, rows, gradients)
        trim()
        progress(stream.depth - index, stream.depth)
    for index in range(stream.depth + 1):
        keep(_stored_rows(scratch, index))
    if shared := [g for g in groups if g.tables]:
        keep(run.entry(probe(shared), gradients))
    return Effects(columns=tuple(columns), values=torch.stack(values, 1), events=events, smoothed=calibration.smoothed)


def _checkpoint(scratch: Scratch, index: int, rows: Sequence[Row], gradients: Sequence[Tensor]) -> None:
    """Files of their own per block, then the note that makes them count: a kill in between leaves the old state."""
    keys = list(rows[0])
    scratch.save(f"effects-{index}", [torch.cat([row[key] for row in rows]) for key in keys])
    scratch.set_note(f"effects-{index}", keys)
    scratch.save(f"gradient-{index}", gradients)
    scratch.set_note("backward", index)
    scratch.forget(f"gradient-{index + 1}")


def _stored_rows(scratch: Scratch, index: int) -> list[Row]:
    values, keys = scratch.load(f"effects-{index}"), scratch.note(f"effects-{index}")
    assert values is not None
    return [{tuple(key): value for key, value in zip(keys, values, strict=True)}]


def rows_of(
    found: Effects,
    groups: Sequence[Group],
    schemes: Mapping[str, Sequence[Scheme]],
    solver_of: Callable[[Group, str], str],
    caches: Caches = NO_CACHES,
) -> tuple[SensitivityRow, ...]:
    """The table of (group, scheme) that sensitivity.json holds."""
    table = []
    for group in groups:
        for scheme in schemes[group.name]:
            kl, stderr = found.kl(group.name, scheme)
            table.append(
                SensitivityRow(
                    group=group.name,
                    scheme=scheme.name,
                    solver=solver_of(group, scheme.weight) if scheme.weight else "none",
                    predicted_kl_nats=kl,
                    measured_kl_nats=None,
                    stderr=stderr,
                    tokens=int(found.events.sum()),
                )
            )
    for cached in caches.groups:
        kl, stderr = found.cache_kl(cached, caches.format)
        table.append(
            SensitivityRow(
                group=cached.name,
                scheme=caches.format,
                solver="none",
                predicted_kl_nats=kl,
                measured_kl_nats=None,
                stderr=stderr,
                tokens=int(found.events.sum()),
            )
        )
    return tuple(table)
