"""Keys and values of the sequences that are decoded together, each of a length of its own.

Sequences stand in the first rows of one tensor for each layer, and each begins at its column 0. A decoding pass writes
one column for each, behind its last; what lies behind shorter sequences is masked, and positions are given by hand.
When a sequence ends, the one in the last row takes its place. Rows are views: a pass copies nothing but what it adds.
Rounded parts are rows of codes and of scales, the very ones of the request's own cache; they are decoded for attention
as they are there.

This is as much of transformers' cache as a forward pass asks for. Left out: sliding windows shorter than what is held,
states of layers without keys and values.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from lowprec.errors import UnsupportedError
from lowprec.records import CachePart, RoundedPart
from lowprec.runtime.kvcache import PARTS, RoundedLayer, by_layer
from lowprec.runtime.request_cache import RequestCache

COLUMNS = 256


class _Places:
    """Where sequences stand, for all layers alike: the first `len(lengths)` of `slots` rows.

    Attributes:
        shown: columns that attention sees: those of the longest sequence, in a pass with the token that it adds.
        rows, columns: [B] where the next token of each sequence goes.
    """

    def __init__(self, slots: int) -> None:
        self.slots, self.lengths, self.shown = slots, list[int](), 0
        self.rows = self.columns = torch.empty(0, dtype=torch.int64)


class _Rows:
    """Tensors [S, H, C, ...], codes and scales or what is not rounded, with room for more columns than are held."""

    def __init__(self, places: _Places) -> None:
        self._places = places
        self._held: list[Tensor] = []

    def put(self, row: int, given: Sequence[Tensor], length: int) -> None:
        """Makes a row the first `length` tokens of [1, H, T, ...] of each tensor."""
        if not self._held:
            self._held = [x.new_zeros(self._places.slots, x.shape[1], COLUMNS, *x.shape[3:]) for x in given]
        self.widen(length)
        for held, x in zip(self._held, given, strict=True):
            held[row, :, :length] = x[0, :, :length]
            # What is masked counts for nothing, but for NaN: those of a sequence that stood here would reach this one.
            held[row, :, length:] = 0

    def move(self, source: int, target: int, length: int) -> None:
        """Makes row `target` the `length` tokens of row `source`."""
        self.put(target, [held[source : source + 1] for held in self._held], length)

    def widen(self, length: int) -> None:
        """Makes room for `length` columns."""
        self._held = [_wide(held, length) for held in self._held]

    def append(self, added: Sequence[Tensor]) -> None:
        """Adds one token to each sequence: [B, H, 1, ...] of each tensor."""
        for held, x in zip(self._held, added, strict=True):
            held[self._places.rows, :, self._places.columns] = x[:, :, 0].to(held.dtype)

    def read(self) -> list[Tensor]:
        """[B, H, T, ...] of each tensor, T that of the longest sequence: views."""
        return [held[: len(self._places.lengths), :, : self._places.shown] for held in self._held]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._places.lengths, default=0)

    @property
    def bytes(self) -> int:
        """Of all rows, room included."""
        return sum(held.nbytes for held in self._held)


class _Layer(RoundedLayer):
    """One layer of `Slots`: a `RoundedLayer`, of which nothing may be rounded, that keeps its tokens in rows."""

    _tokens: Any

    def __init__(self, rounded: Mapping[CachePart, RoundedPart], places: _Places) -> None:
        super().__init__(rounded)
        self._tokens = {part: _Rows(places) for part in PARTS}

    def put(self, row: int, layer: Any, length: int) -> None:
        """Makes a row the sequence in a layer of the cache of one request, which rounds the same parts."""
        self.lazy_initialization(layer.keys, layer.values)
        for part in PARTS:
            held = layer._tokens[part].read() if isinstance(layer, RoundedLayer) else [getattr(layer, part)]
            self._tokens[part].put(row, held, length)

    def move(self, source: int, target: int, length: int) -> None:
        """Makes row `target` the `length` tokens of row `source`."""
        for part in PARTS:
            self._tokens[part].move(source, target, length)

    def widen(self, length: int) -> None:
        """Makes room for `length` columns."""
        for part in PARTS:
            self._tokens[part].widen(length)


class Slots(RequestCache):
    """Room for up to `slots` sequences, whose caches all keep the same parts rounded.

    Args:
        config: the model's.
        parts: what is rounded, as the `RequestCache` of each sequence has it.
        slots: rows.

    Raises:
        UnsupportedError: a layer whose cache is none of keys and values.
    """

    def __init__(self, config: Any, parts: Iterable[RoundedPart], slots: int) -> None:
        super().__init__(config, parts)
        self.slots, self._places = slots, _Places(slots)
        fit = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer, RoundedLayer)
        if unfit := sorted({type(layer).__name__ for layer in self.layers if type(layer) not in fit}):
            raise UnsupportedError(
                "sequences of this model cannot be decoded together", tuple(f"a layer keeps a {n}" for n in unfit)
            )
        rounded = by_layer(self.parts)
        self.layers: list[_Layer] = [_Layer(rounded.get(index, {}), self._places) for index in range(len(self.layers))]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return self._places.lengths

    def add(self, cache: Any, length: int) -> None:
        """Takes the `length` tokens in the cache of one sequence over, into the next free row."""
        row = len(self.lengths)
        if row == self.slots:
            raise ValueError(f"all {self.slots} slots are taken")
        for mine, layer in zip(self.layers, cache.layers, strict=True):
            mine.put(row, layer, length)
        self.lengths.append(length)

    def remove(self, row: int) -> None:
        """Frees a row; the last sequence moves there."""
        last = len(self.lengths) - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row, self.lengths[last])
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def begin(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Makes room for one more token of each sequence -> position_ids [B, 1] and an additive attention_mask."""
        places, longest = self._places, max(self.lengths) + 1
        for layer in self.layers:
            layer.widen(longest)
        device = self.layers[0].device
        places.shown = longest
        places.rows = torch.arange(len(self.lengths), device=device)
        places.columns = torch.tensor(self.lengths, device=device)
        hidden = torch.arange(longest, device=device) > places.columns[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
        return {"position_ids": places.columns[:, None], "attention_mask": mask[:, None, None]}

    def end(self) -> None:
        """Counts the token that a pass has added to each sequence."""
        self._places.lengths = [length + 1 for length in self.lengths]


def _wide(held: Tensor, length: int) -> Tensor:
    """[S, H, C, ...] with C at least `length`: the same, or copied into twice the columns."""
    columns = held.shape[2]
    if length <= columns:
        return held
    while columns < length:
        columns *= 2
    wider = held.new_zeros(*held.shape[:2], columns, *held.shape[3:])
    wider[:, :, : held.shape[2]] = held
    return wider
