"""The layers of a KV cache in 8 bits: they keep codes and scales, and hand out what those stand for.

Each token is rounded once, when it is stored (`lowprec.formats.base.CacheFormat`), and everyone sees what was stored,
the very pass that stored it too: prefill at once, prefill in parts, and decoding token by token see the same numbers.
A part that is not rounded is kept as it is. Codes grow by `STEP` tokens at a time, so that most steps copy nothing of
what is stored; they are decoded whole for attention, in its dtype, so the bytes that are saved are those that are kept
between steps, of all layers, while those decoded are of one.

`lowprec.runtime.request_cache` makes a whole cache of them; `lowprec.runtime.serving_cache` gives it to a model.

Left out: attention that reads codes (a fused kernel), static caches, offloading.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils

from lowprec.formats import CACHE_FORMATS
from lowprec.records import CachePart, RoundedPart

STEP = 64
PARTS: tuple[CachePart, CachePart] = ("keys", "values")
Layers = dict[int, dict[CachePart, RoundedPart]]


def cache_argument(model: nn.Module) -> str:
    """What the forward of a causal model, or of an attention layer in it, calls the KV cache that it takes."""
    # transformers 5.24 renamed it.
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def by_layer(parts: Iterable[RoundedPart]) -> Layers:
    """Layer of the cache -> its rounded parts."""
    found: Layers = {}
    for part in parts:
        found.setdefault(part.layer, {})[part.part] = part
    return found


def fake_quantize(x: Tensor, part: RoundedPart) -> Tensor:
    """x [B, H, T, D] -> what a cache would hand out of it, same shape and dtype."""
    fmt = CACHE_FORMATS[part.format]
    codes, scales = fmt.encode(x, part.calibrated)
    return fmt.decode(codes, part.calibrated if scales is None else scales, x.dtype)


class _Tokens:
    """Tensors [B, H, T, ...] that grow along T, with room for up to `STEP` - 1 tokens more than they hold."""

    def __init__(self) -> None:
        self.length = 0
        self._held: list[Tensor] = []

    def append(self, added: Sequence[Tensor]) -> None:
        """Adds [B, H, t, ...] of each tensor."""
        start, self.length = self.length, self.length + added[0].shape[2]
        if not self._held or self.length > self._held[0].shape[2]:
            room = -(-self.length // STEP) * STEP
            grown = [x.new_empty(*x.shape[:2], room, *x.shape[3:]) for x in added]
            for new, old in zip(grown, self._held, strict=False):
                new[:, :, :start] = old[:, :, :start]
            self._held = grown
        for held, x in zip(self._held, added, strict=True):
            held[:, :, start : self.length] = x

    def read(self) -> list[Tensor]:
        """What is held of each tensor, [B, H, T, ...], a view."""
        return [held[:, :, : self.length] for held in self._held]

    def over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces each tensor by what `change` makes of it along the batch."""
        self._held = [change(held) for held in self._held]

    @property
    def bytes(self) -> int:
        """Of all that is held, room included."""
        return sum(held.nbytes for held in self._held)


class RoundedLayer(cache_utils.DynamicLayer):  # type: ignore[misc]
    """One layer of a cache, of which keys, values or both are kept in codes.

    Args:
        rounded: its parts that are rounded, in their formats.

    `keys` and `values`, where transformers keeps its own, stay empty tensors of the right dtype.
    """

    def __init__(self, rounded: Mapping[CachePart, RoundedPart]) -> None:
        super().__init__()
        self.rounded = dict(rounded)
        self._tokens = {part: _Tokens() for part in PARTS}
        self._dtypes: dict[CachePart, torch.dtype] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Notes device and dtypes."""
        super().lazy_initialization(key_states, value_states)
        self._dtypes = {"keys": key_states.dtype, "values": value_states.dtype}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores keys and values [B, H, t, D] of t tokens and hands out those of all tokens, [B, H, T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for part, x in zip(PARTS, (key_states, value_states), strict=True):
            self._tokens[part].append(self._encoded(part, x))
        return self._decoded("keys"), self._decoded("values")

    def _encoded(self, part: CachePart, x: Tensor) -> list[Tensor]:
        if (found := self.rounded.get(part)) is None:
            return [x]
        codes, scales = CACHE_FORMATS[found.format].encode(x, found.calibrated)
        return [codes] if scales is None else [codes, scales]

    def _decoded(self, part: CachePart) -> Tensor:
        held = self._tokens[part].read()
        if (found := self.rounded.get(part)) is None:
            return held[0]
        scales = held[1] if len(held) > 1 else found.calibrated
        return CACHE_FORMATS[found.format].decode(held[0], scales, self._dtypes[part])

    @property
    def bytes(self) -> int:
        """Of codes and scales, and of what is not rounded; room for tokens to come included."""
        return sum(tokens.bytes for tokens in self._tokens.values())

    @property
    def batch_size(self) -> int:
        """Sequences that are held; transformers asks for it."""
        held = self._tokens["keys"].read()
        return held[0].shape[0] if held else -1

    def get_seq_length(self) -> int:
        """Tokens that are held."""
        return self._tokens["keys"].length

    def reset(self) -> None:
        """Forgets all tokens."""
        self._tokens = {part: _Tokens() for part in PARTS}
        self.is_initialized = False
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -n tokens; transformers before 5.24 asks to keep the first n instead."""
        length = self.get_seq_length()
        kept = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
        for tokens in self._tokens.values():
            tokens.length = min(max(kept, 0), length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was."""
        self._over_batch(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence."""
        self._over_batch(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences that `indices` name."""
        self._over_batch(lambda held: held[indices])

    def _over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for tokens in self._tokens.values():
            tokens.over_batch(change)


def layer_bytes(layer: Any) -> int:
    """Bytes that a layer of a cache keeps, of ours or of transformers."""
    if isinstance(layer, RoundedLayer):
        return layer.bytes
    held = (getattr(layer, part, None) for part in PARTS)
    return sum(x.nbytes for x in held if isinstance(x, Tensor))
