"""Sensitivity, backwards: what every (group, scheme) costs, in nats of KL, from one backward pass per sequence.

For a small change of a layer's output the Fisher information gives, per sequence,

    KL(p || p') = 1/2 E_y [ e(y)^2 ],    e(y) = <dW, grad_W log p(y)> + <dx, grad_x log p(y)>

with y sampled from the model (Amari, Natural gradient works efficiently in learning, 1998, eq. 2). The square is taken
of the whole sequence's sum: an error at one token reaches the tokens after it, and squaring per token underrates
attention's layers several times. dW is the error that the solver really left, dx the rounding error of the layer's
input, both summed over the layers of a group before they are squared. All schemes share one backward pass: a layer's
gradient G[N, K] is formed once per sequence and multiplied with every scheme's error.

The pass goes through the blocks from the last to the first, recomputing each from the inputs that calibration kept, so
that only one block's errors and gradients are ever held. A killed pass resumes at the block that was cut.

Groups are squared apart, too. Adding their e before squaring would include the cross terms of a mix, but those come
out as noise: on SmolLM2-135M in uniform INT4 the sum of squares predicted 0.101 nats, the square of the sum 0.112, and
0.104 were measured.

Left out: squares per token, scaled to these ones per role or pooled over a group's formats and shrunk to the role's
mean. They have far less noise (131 sequences: 0.16 instead of 0.21 in the logarithm within w4a8-int8), but ranked 60
pairs no better overall (Spearman 0.989 against 0.977; within w4a16 0.98 either way), and cost a product per format.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.errors import ArtifactError
from lowprec.formats import ACTIVATION_FORMATS
from lowprec.records import Group, Scheme, SensitivityRow
from lowprec.runtime.table import read_as
from lowprec.steps.calibrate import Calibration, Progress
from lowprec.steps.outcome import Outcome
from lowprec.steps.scratch import Scratch
from lowprec.steps.stream import Call, Stream, rounded_input
from lowprec.steps.tokens import rows_of_batch
from lowprec.transforms import Smoothed, keys_of

Key = tuple[str, str, str]
Row = dict[Key, Tensor]
Errors = Callable[[str, Sequence[str]], Tensor]
"""(layer, weight formats) -> [formats, N, K] bfloat16, the solved minus the original weight."""

CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Effects:
    """First-order effects e of each rounding on the sampled log-likelihood, [sequences, columns].

    `columns` names what each column is: (group, "weight", "activation" or "table", format), a format that is smoothed
    being marked (`lowprec.transforms.keys_of`). `events` [sequences] is how many predictions each sequence makes.
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
        keys = [(group, kind, fmt) for kind, fmt in kinds if fmt is not None]
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
        squares = sum(effect.square() for effect in self._parts(group, scheme)) * 0.5 / self.events.double().mean()
        return float(squares.mean()), float(squares.std() / max(len(squares) - 1, 1) ** 0.5)


class _Probe:
    """Hooks on the layers of some groups that turn (input, output gradient) into effects."""

    def __init__(
        self, stream: Stream, groups: Sequence[Group], schemes: Mapping[str, Sequence[Scheme]], errors: Errors,
        calibration: Calibration,
    ) -> None:  # fmt: skip
        self._stream, self._groups = stream, groups
        self._calibration = calibration
        weights: dict[str, list[str]] = {}
        self._activations: dict[str, dict[str, Scheme]] = {}
        for group in groups:
            keys = {keys_of(calibration.smoothed, group.name, scheme): scheme for scheme in schemes[group.name]}
            weights[group.name] = sorted({weight for weight, _ in keys if weight})
            self._activations[group.name] = {key: scheme for (_, key), scheme in keys.items() if key}
        self._errors = {
            layer: errors(layer, weights[group.name]).to(stream.device) for group in groups for layer in group.layers
        }
        self._weights = weights
        self._input: dict[str, Tensor] = {}
        self._rounding: dict[tuple[int, str], Tensor] = {}
        self._read: list[tuple[Group, nn.Embedding, Tensor, Tensor]] = []
        self.row: Row = {}

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Probes while open."""
        handles = []
        for group in (g for g in self._groups if not g.is_embedding):
            for name in group.layers:
                layer = self._stream.layers[name]
                if self._stream.whole:
                    handles.append(layer.register_forward_pre_hook(_starts_gradient))
                handles.append(layer.register_forward_hook(self._forward(name)))
                handles.append(layer.register_full_backward_hook(self._backward(group, name)))
        if self._stream.whole:
            handles += self._table_handles()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def table_hooks(self) -> Iterator[None]:
        """Probes what is read from tables while open."""
        handles = self._table_handles()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _table_handles(self) -> list[Any]:
        tables = self._stream.tables
        return [tables[name].register_forward_hook(self._reads(g)) for g in self._groups for name in g.tables]

    def _reads(self, group: Group) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(table: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Weights need no gradient here, so the graph starts at what was read.
            leaf = output.detach().requires_grad_()
            self._read.append((group, table, args[0], leaf))
            return leaf

        return hook

    def _forward(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
            self._input[name] = args[0].detach()

        return hook

    def _backward(self, group: Group, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, grad_input: tuple[Tensor | None, ...], grad_output: tuple[Tensor, ...]) -> None:
            x, g = self._input.pop(name), grad_output[0]
            self._add(group, "weight", self._weights[group.name], _weight_effects(x, g, self._errors[name]))
            if (rounded := self._activations[group.name]) and grad_input[0] is not None:
                self._add(group, "activation", list(rounded), self._input_effects(group, x, grad_input[0]))

        return hook

    def _input_effects(self, group: Group, x: Tensor, gradient: Tensor) -> Tensor:
        columns = []
        for name, scheme in self._activations[group.name].items():
            # q, k and v read one tensor: round it once.
            key = (x.data_ptr(), name)
            if key not in self._rounding:
                scale = self._calibration.scale_of(group.name, scheme.activation)
                exponents = self._calibration.exponents_of(group.name, scheme)
                fmt = ACTIVATION_FORMATS[str(scheme.activation)]
                self._rounding[key] = rounded_input(x, fmt, scale, exponents) - x
            columns.append((gradient * self._rounding[key]).flatten(1).sum(1))
        return torch.stack(columns, 1)

    def _add(self, group: Group, kind: str, formats: Sequence[str], effects: Tensor) -> None:
        for i, fmt in enumerate(formats):
            key = (group.name, kind, fmt)
            self.row[key] = self.row[key] + effects[:, i] if key in self.row else effects[:, i]

    def take(self) -> Row:
        """The batch's effects, each [B]; starts anew."""
        for group, table, ids, leaf in self._read:
            if leaf.grad is not None:
                errors = self._errors[group.layers[0]]
                found = _table_effects(table, ids, leaf.grad, errors)
                self._add(group, "table", self._weights[group.name], found)
        self._read.clear()
        row, self.row = self.row, {}
        self._rounding.clear()
        self._input.clear()
        return row


def _starts_gradient(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Weights need no gradient here, so the first layer's input has to be where the graph starts."""
    x: Tensor = args[0]
    return (x if x.requires_grad else x.detach().requires_grad_(), *args[1:])


def _weight_effects(x: Tensor, g: Tensor, errors: Tensor) -> Tensor:
    """x [B, T, K], output gradients g [B, T, N], errors [F, N, K] -> [B, F]: <dW_f, g_b^T x_b>, in slices of N."""
    if x.ndim == 2:
        x, g = x[:, None], g[:, None]
    x, g = x.reshape(x.shape[0], -1, x.shape[-1]), g.reshape(g.shape[0], -1, g.shape[-1])
    formats, n, k = errors.shape
    total = torch.zeros(x.shape[0], formats, device=x.device)
    step = max(1, CHUNK_ELEMENTS // (k * (x.shape[0] + formats)))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        gradient = torch.bmm(g[:, :, rows].transpose(1, 2), x)
        # Row by row, then summed: one product over all N K is four times as slow, its inner dimension being so long.
        by_row = torch.bmm(errors[:, rows].float().transpose(0, 1), gradient.permute(1, 2, 0))
        total += by_row.sum(0).T
    return total


def _table_effects(table: nn.Embedding, ids: Tensor, gradient: Tensor, errors: Tensor) -> Tensor:
    """ids [B, T], gradients of what was read [B, T, K], errors [F, N, K] -> [B, F]: sum over t of <dW_f[id_t], g_t>."""
    read = (read_as(table, error[ids.flatten()].float(), ids.shape) for error in errors)
    columns = [(change * gradient).flatten(1).sum(1) for change in read]
    return torch.stack(columns, 1)


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

    def whole(self, probe: _Probe) -> list[Row]:
        """A model without a cut: one pass through all of it."""
        rows = []
        with self.stream.block(0), probe.hooks():
            for position, batch in enumerate(self.batches):
                torch.autograd.backward(self.sampled(self.stream.run(0, batch, ((), {})), position))
                rows.append(probe.take())
        return rows

    def tail(self, probe: _Probe) -> tuple[list[Row], list[Tensor]]:
        """Through what lies behind the blocks; also returns the gradient of each batch's last hidden state."""
        rows, gradients = [], []
        hidden = self._inputs(self.stream.depth)
        with self.stream.outer(), probe.hooks():
            for position, batch in enumerate(self.batches):
                given = hidden[position].to(self.stream.device).requires_grad_()
                likelihood = self.sampled(self.stream.leave(given, batch), position)
                gradients.append(torch.autograd.grad(likelihood, given)[0])
                rows.append(probe.take())
        return rows, gradients

    def block(
        self, index: int, probe: _Probe, gradients: list[Tensor], calls: Sequence[Sequence[Call]]
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

    def entry(self, probe: _Probe, gradients: Sequence[Tensor]) -> list[Row]:
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
) -> Effects:
    """Runs the pass over the batches whose block inputs calibration kept in `scratch`.

    Args:
        schemes: group -> the schemes to score.
        errors: the rounding error of each layer in each weight format.
        calibration: what static activation scales come from.
        seed: of the sampled labels.
    """
    run = _Pass(stream=stream, batches=batches, outcome=outcome, scratch=scratch, seed=seed)

    def probe(chosen: Sequence[Group]) -> _Probe:
        return _Probe(stream, chosen, schemes, errors, calibration)

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
        keep(run.whole(probe(groups)))
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
        rows, gradients = run.block(index, probe([g for g in groups if g.block == index]), gradients, calls)
        _checkpoint(scratch, index, rows, gradients)
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
    return tuple(table)
