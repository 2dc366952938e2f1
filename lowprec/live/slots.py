"""Keys and values of the sequences that are decoded together, each of a length of its own.

Sequences stand in the first rows of one tensor for each layer, and each begins at its column 0. A decoding pass writes
one column for each, behind its last; what lies behind shorter sequences is masked, and positions are given by hand.
When a sequence ends, the one in the last row takes its place. Rows are views: a pass copies nothing but what it adds.

This is as much of transformers' cache as a forward pass asks for. Left out: sliding windows shorter than what is held.
"""

from typing import Any

import torch
from torch import Tensor

COLUMNS = 256


class Slots:
    """Room for up to `slots` sequences.

    Args:
        slots: rows.
    """

    is_compileable = False

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.lengths: list[int] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._rows = self._columns = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, cache: Any, length: int) -> None:
        """Takes the `length` tokens in the cache of one sequence over, into the next free row."""
        if len(self) == self.slots:
            raise ValueError(f"all {self.slots} slots are taken")
        row = len(self)
        for index, layer in enumerate(cache.layers):
            for held, given in ((self.keys, layer.keys), (self.values, layer.values)):
                if index == len(held):
                    _, heads, _, width = given.shape
                    held.append(given.new_zeros(self.slots, heads, COLUMNS, width))
                held[index] = _wide(held[index], length)
                held[index][row, :, :length] = given[0, :, :length]
        self.lengths.append(length)

    def remove(self, row: int) -> None:
        """Frees a row; the last sequence moves there."""
        last = len(self) - 1
        if row != last:
            for held in (*self.keys, *self.values):
                held[row, :, : self.lengths[last]] = held[last, :, : self.lengths[last]]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def begin(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Makes room for one more token of each sequence -> position_ids [B, 1] and an additive attention_mask."""
        longest = max(self.lengths) + 1
        self.keys = [_wide(held, longest) for held in self.keys]
        self.values = [_wide(held, longest) for held in self.values]
        device = self.keys[0].device
        self._rows = torch.arange(len(self), device=device)
        self._columns = torch.tensor(self.lengths, device=device)
        hidden = torch.arange(longest, device=device) > self._columns[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
        return {"position_ids": self._columns[:, None], "attention_mask": mask[:, None, None]}

    def end(self) -> None:
        """Counts the token that a pass has added to each sequence."""
        self.lengths = [length + 1 for length in self.lengths]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """[B, heads, 1, width] of one token each -> all keys and values of the layer; called by the model."""
        longest = max(self.lengths) + 1
        for held, given in ((self.keys[layer], keys), (self.values[layer], values)):
            held[self._rows, :, self._columns] = given[:, :, 0].to(held.dtype)
        return self.keys[layer][: len(self), :, :longest], self.values[layer][: len(self), :, :longest]

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)


def _wide(held: Tensor, length: int) -> Tensor:
    """[S, H, C, D] with C at least `length`: the same, or copied into twice the columns."""
    columns = held.shape[2]
    if length <= columns:
        return held
    while columns < length:
        columns *= 2
    wider = held.new_zeros(*held.shape[:2], columns, held.shape[3])
    wider[:, :, : held.shape[2]] = held
    return wider
