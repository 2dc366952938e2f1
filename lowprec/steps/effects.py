"""What each rounding of some groups does to the sampled log-likelihood, to first order: hooks around a backward pass.

    weight      <dW, g^T x>              dW the error that the solver has left, g the gradient of the layer's output
    activation  <dx, gradient of x>      dx the rounding error of the layer's input
    table       sum over t of <dW[id_t], gradient of what was read at t>
    cache       <dk, gradient of k>      dk the rounding error of the keys, after rotary embedding, or of the values

each per sequence of a batch, summed over the layers of a group; `lowprec.steps.sensitivity` squares them.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.formats import ACTIVATION_FORMATS
from lowprec.records import CachePart, Group, Scheme
from lowprec.runtime.kvcache import PARTS, fake_quantize
from lowprec.runtime.serving_cache import tap_cache
from lowprec.runtime.table import read_as
from lowprec.steps.caches import Caches
from lowprec.steps.calibrate import Calibration
from lowprec.steps.stream import Stream, rounded_input
from lowprec.transforms import keys_of

Key = tuple[str, str, str]
"""(group, "weight", "activation" or "table", format), or (place, "cache", format)."""
Row = dict[Key, Tensor]
"""The effects of one batch, [B] each."""
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerErrors:
    """The solved minus the original weight of one layer, in F formats.

    Formats that take each row from one of others (`lowprec.formats.rows`) have no errors of their own: a table of a
    vocabulary is large, and offered with many shares of fine rows.

    Attributes:
        parts: [P, N, K] bfloat16, in formats of their own.
        choice: [F, N] int64, which part each row of each format is from; None: the formats are the parts.
    """

    parts: Tensor
    choice: Tensor | None = None

    def to(self, device: torch.device) -> "LayerErrors":
        """On that device."""
        choice = None if self.choice is None else self.choice.to(device)
        return LayerErrors(parts=self.parts.to(device), choice=choice)

    def summed(self, effects: Tensor, rows: slice | Tensor) -> Tensor:
        """Effects [R, P, B] of the parts' rows with these numbers -> [F, B], those of the formats, summed over rows."""
        if self.choice is None:
            return effects.sum(0)
        choice = self.choice[:, rows]
        return effects[torch.arange(len(effects), device=choice.device), choice].sum(1)


Errors = Callable[[str, Sequence[str]], LayerErrors]
"""(layer, weight formats) -> what rounding changes of it."""


class Probe:
    """Hooks on the layers of some groups, and on the attention of some caches, that turn (input, output gradient) into
    effects.
    """

    def __init__(
        self, stream: Stream, groups: Sequence[Group], schemes: Mapping[str, Sequence[Scheme]], errors: Errors,
        calibration: Calibration, caches: Caches,
    ) -> None:  # fmt: skip
        self._stream, self._groups, self._caches = stream, groups, caches
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
        for module in self._caches.modules:
            attention = self._stream.module.get_submodule(module)
            handles.append(tap_cache(attention, self._taps(module)))
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
            self._add(group.name, "weight", self._weights[group.name], _weight_effects(x, g, self._errors[name]))
            if (rounded := self._activations[group.name]) and grad_input[0] is not None:
                self._add(group.name, "activation", list(rounded), self._input_effects(group, x, grad_input[0]))

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

    def _taps(self, module: str) -> Callable[[Any], "_Tapped"]:
        return lambda _: _Tapped(self, module)

    def tapped(self, module: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] on their way to attention, whose gradients will become effects."""
        found = {part: self._tapped(module, part, x) for part, x in zip(PARTS, (keys, values), strict=True)}
        return found["keys"], found["values"]

    def _tapped(self, module: str, part: CachePart, x: Tensor) -> Tensor:
        if (cached := self._caches.at(module, part)) is None:
            return x
        # Weights need no gradient here, so the graph starts at what was computed from them alone.
        x = x if x.requires_grad else x.detach().requires_grad_()
        place, rounded = cached
        change = fake_quantize(x.detach(), rounded) - x.detach()

        def note(gradient: Tensor) -> None:
            self._add(place.name, "cache", [rounded.format], (gradient * change).flatten(1).sum(1, keepdim=True))

        x.register_hook(note)  # type: ignore[no-untyped-call]
        return x

    def _add(self, name: str, kind: str, formats: Sequence[str], effects: Tensor) -> None:
        for i, fmt in enumerate(formats):
            key = (name, kind, fmt)
            self.row[key] = self.row[key] + effects[:, i] if key in self.row else effects[:, i]

    def take(self) -> Row:
        """The batch's effects, each [B]; starts anew."""
        for group, table, ids, leaf in self._read:
            # Where no scheme that is offered is one for tables, there is nothing to score.
            if leaf.grad is not None and self._weights[group.name]:
                errors = self._errors[group.layers[0]]
                found = _table_effects(table, ids, leaf.grad, errors)
                self._add(group.name, "table", self._weights[group.name], found)
        self._read.clear()
        row, self.row = self.row, {}
        self._rounding.clear()
        self._input.clear()
        return row


class _Tapped:
    """Stands in for the cache of the attention layer `module`."""

    def __init__(self, probe: Probe, module: str) -> None:
        self._probe, self._module = probe, module

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As they are."""
        return self._probe.tapped(self._module, key_states, value_states)


def _starts_gradient(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Weights need no gradient here, so the first layer's input has to be where the graph starts."""
    x: Tensor = args[0]
    return (x if x.requires_grad else x.detach().requires_grad_(), *args[1:])


def _weight_effects(x: Tensor, g: Tensor, errors: LayerErrors) -> Tensor:
    """x [B, T, K], output gradients g [B, T, N] -> [B, F]: <dW_f, g_b^T x_b>, in slices of N."""
    if x.ndim == 2:
        x, g = x[:, None], g[:, None]
    x, g = x.reshape(x.shape[0], -1, x.shape[-1]), g.reshape(g.shape[0], -1, g.shape[-1])
    parts, n, k = errors.parts.shape
    step = max(1, CHUNK_ELEMENTS // (k * (x.shape[0] + parts)))
    slices = [slice(start, start + step) for start in range(0, n, step)]

    def of(rows: slice) -> Tensor:
        gradient = torch.bmm(g[:, :, rows].transpose(1, 2), x)
        # Row by row, then summed: one product over all N K is four times as slow, its inner dimension being so long.
        by_row = torch.bmm(errors.parts[:, rows].float().transpose(0, 1), gradient.permute(1, 2, 0))
        return errors.summed(by_row, rows)

    return torch.stack([of(rows) for rows in slices]).sum(0).T


def _table_effects(table: nn.Embedding, ids: Tensor, gradient: Tensor, errors: LayerErrors) -> Tensor:
    """ids [B, T], gradients of what was read [B, T, K] -> [B, F]: sum over t of <dW_f[id_t], g_t>."""
    read = (read_as(table, part[ids.flatten()].float(), ids.shape) for part in errors.parts)
    # [B, T, P]: each sequence reads rows of its own.
    by_token = torch.stack([(change * gradient).sum(-1) for change in read], -1)
    return torch.stack([errors.summed(e[..., None], i) for e, i in zip(by_token, ids, strict=True)])[..., 0]
