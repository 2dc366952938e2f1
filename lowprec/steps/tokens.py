"""Text as windows of tokens, and the batches that it runs through a model in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowprec.records import digest

BATCH_TOKENS = 512
PORTION_TOKENS = 32_768
"""Whose hidden states are held at a time, over all models that are compared; each portion of text makes the weights of
all blocks once more.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Right-padded windows: `ids` [B, T] int64, `lengths` [B] int64, `index` of each row's window in its TokenSet.

    Under a causal mask the padding reaches no real token; padded positions must be left out of every sum.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    index: tuple[int, ...]

    def mask(self) -> torch.Tensor:
        """[B, T] bool, True at real tokens: the attention mask of models that look to the right."""
        return torch.arange(self.ids.shape[1], device=self.lengths.device) < self.lengths[:, None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSet:
    """The windows of one split; entry i of each tuple belongs to window i.

    Args:
        ids: int64 token ids [T_i] per window, special tokens included.
        units: number of the unit, unique over all splits.
        sources: index into `source_names`.
        documents: source and name of the document, for messages.
        prefix, suffix: the special tokens that stand around every window.
    """

    ids: tuple[torch.Tensor, ...]
    units: tuple[int, ...]
    sources: tuple[int, ...]
    documents: tuple[str, ...]
    source_names: tuple[str, ...]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens of all windows, special ones included."""
        return sum(map(len, self.ids))

    @property
    def digest(self) -> str:
        """Over the ids, units and sources, in order."""
        parts = [digest(ids.numpy().tobytes()) for ids in self.ids]
        return digest(",".join(parts), repr(self.units), repr(self.sources), repr(self.source_names))

    def subset(self, tokens: int) -> "TokenSet":
        """The first windows that hold `tokens` tokens together (all, if the set is smaller)."""
        held = count = 0
        while held < tokens and count < len(self):
            held += len(self.ids[count])
            count += 1
        return self._of([(i, self.ids[i]) for i in range(count)])

    def after(self, windows: int) -> "TokenSet":
        """All but the first `windows` windows."""
        return self._of([(i, self.ids[i]) for i in range(windows, len(self))])

    def cut(self, length: int) -> "TokenSet":
        """Every window in windows of `length` tokens; what is left over is dropped, unless a window is shorter."""
        pieces = []
        for i, ids in enumerate(self.ids):
            body = ids[len(self.prefix) : len(ids) - len(self.suffix)]
            size = min(length, len(ids)) - len(self.prefix) - len(self.suffix)
            pieces += [(i, self._wrapped(part)) for part in torch.split(body, size) if len(part) == size]
        return self._of(pieces)

    def _wrapped(self, body: torch.Tensor) -> torch.Tensor:
        """Models that need their first token need it before every piece."""
        return torch.cat(
            [torch.tensor(self.prefix, dtype=body.dtype), body, torch.tensor(self.suffix, dtype=body.dtype)]
        )

    def _of(self, pieces: Sequence[tuple[int, torch.Tensor]]) -> "TokenSet":
        """A set of (window that it comes from, ids)."""
        return TokenSet(
            ids=tuple(ids for _, ids in pieces),
            units=tuple(self.units[i] for i, _ in pieces),
            sources=tuple(self.sources[i] for i, _ in pieces),
            documents=tuple(self.documents[i] for i, _ in pieces),
            source_names=self.source_names,
            prefix=self.prefix,
            suffix=self.suffix,
        )

    def batches(self, tokens_per_batch: int = BATCH_TOKENS, pad: int = 0) -> list[Batch]:
        """Every window once, by length, in batches of at most `tokens_per_batch` padded tokens (or of one window)."""
        rows: list[list[int]] = []
        for i in sorted(range(len(self)), key=lambda i: len(self.ids[i])):
            if not rows or (len(rows[-1]) + 1) * len(self.ids[i]) > tokens_per_batch:
                rows.append([])
            rows[-1].append(i)
        return [
            Batch(
                ids=torch.nn.utils.rnn.pad_sequence([self.ids[i] for i in row], batch_first=True, padding_value=pad),
                lengths=torch.tensor([len(self.ids[i]) for i in row]),
                index=tuple(row),
            )
            for row in rows
        ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batched:
    """Windows, and the batches of all of them, made once."""

    data: TokenSet
    batches: tuple[Batch, ...]


def batched(data: TokenSet) -> Batched:
    """`data` in its batches."""
    return Batched(data=data, batches=tuple(data.batches()))


def windows_of(batch: Any) -> list[tuple[slice, Any]]:
    """A batch window by window, each with its rows: what hangs on the logits of one window is held at a time.

    A batch of the user's own kind is left whole.
    """
    if not isinstance(batch, Batch):
        return [(slice(None), batch)]
    rows = [slice(i, i + 1) for i in range(len(batch.ids))]
    return [(r, Batch(ids=batch.ids[r], lengths=batch.lengths[r], index=batch.index[r])) for r in rows]


def portions_of(batches: Sequence[Any], models: int = 1) -> list[list[Any]]:
    """The batches in parts, for passes that hold what so many models make of all of their text.

    Batches of the user's own kind are one portion.
    """
    portions: list[list[Any]] = [[]]
    for batch in batches:
        held = sum(int(b.ids.numel()) for b in portions[-1] if isinstance(b, Batch))
        if held * models >= PORTION_TOKENS:
            portions.append([])
        portions[-1].append(batch)
    return portions


def rows_of_batch(hidden: Any, batch: Any) -> torch.Tensor:
    """What has a row for each sequence: hidden states, or, of a model without a cut, the batch's own tensor."""
    if isinstance(hidden, torch.Tensor):
        return hidden
    return batch.ids if isinstance(batch, Batch) else torch.as_tensor(next(iter(batch.values())))
