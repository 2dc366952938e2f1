"""A model in onnxruntime behind the calling convention of transformers, so that what runs and times those runs this.

module(input_ids=[B, T])                                          -> logits [B, T, V] (decoders)
    with a KV cache in codes, as decoding would give them: see `OnnxModule.forward`
module(input_ids, use_cache=True, past_key_values=None, ...)      -> logits, past_key_values to go on from
module(input_ids, attention_mask)                                 -> last_hidden_state [B, T, D] (encoders)
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from lowprec.errors import ConfigError
from lowprec.onnx.binding import Run, holds_codes, score_in_steps
from lowprec.onnx.phases import MANY
from lowprec.onnx.session import MODEL, open_session, run_session

ROOM = 256


class Cache:
    """A text so far: `run` goes on with it, and has room for `room` tokens, of which `tokens` are taken."""

    def __init__(self, run: Run, room: int) -> None:
        self.run, self.room, self.tokens = run, room, 0


class OnnxModule(nn.Module):
    """The model of a folder.

    Args:
        path: the folder.
        threads: 0 for as many as there are cores.
        room: tokens that a decoder may go on with after the first call of a text.

    Raises:
        ArtifactError: onnxruntime does not load it.
    """

    def __init__(self, path: Path, threads: int = 0, room: int = ROOM) -> None:
        super().__init__()
        self.config = transformers.AutoConfig.from_pretrained(path)
        self.room = room
        # Not a submodule, and not to be copied with one.
        self.__dict__["_session"] = open_session(path / MODEL, threads)
        told = self.__dict__["_session"].get_modelmeta().custom_metadata_map.get("lowprec.positions")
        self.positions = None if told is None else int(told)
        names = [i.name for i in self.__dict__["_session"].get_inputs()]
        self._decodes = any(name.startswith("past_key_values.") for name in names)
        self._codes = holds_codes(self.__dict__["_session"])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        """Runs the model.

        A text that is read at once sees its own keys and values as they are, also where the cache keeps them in codes.
        So a call that is not to be gone on with, which asks what the model makes of a text, goes through it in steps
        that few rows make, and every token sees what generation would see.

        Args:
            input_ids: [B, T].
            attention_mask: [B, P + T], 0 for padding; None: there is none.
            past_key_values: what an earlier call returned, of P tokens; None at the start of a text. It is changed.
            use_cache: whether there will be a later call.
            logits_to_keep: of how many last positions logits are wanted, 0 for all.

        Raises:
            ConfigError: more tokens than the cache has room for, or the model positions.
        """
        batch, width = input_ids.shape
        if self._codes and not use_cache and past_key_values is None:
            self._check(width)
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            found = score_in_steps(self.__dict__["_session"], _int64(input_ids), _int64(mask), MANY - 1)
            return SimpleNamespace(logits=torch.from_numpy(found)[:, -logits_to_keep:], past_key_values=None)
        cache = past_key_values
        if cache is None:
            room = width + (self.room if use_cache else 0)
            session = self.__dict__["_session"]
            cache = Cache(Run(session, batch, room if use_cache else 0), room) if self._decodes else None
        total = width + (cache.tokens if cache else 0)
        self._check(total)
        mask = torch.ones(batch, total, dtype=torch.long) if attention_mask is None else attention_mask.long()
        if cache is None:
            return self._encoded(input_ids, mask)
        if total > cache.room:
            raise ConfigError(f"{total} tokens, the cache has room for {cache.room}: load the model with more room")
        logits = torch.from_numpy(cache.run.step(_int64(input_ids), _int64(mask), keep=logits_to_keep))
        cache.tokens = total
        return SimpleNamespace(logits=logits[:, -logits_to_keep:], past_key_values=cache if use_cache else None)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Texts are read at once while open, as prompts are."""
        codes, self._codes = self._codes, False
        try:
            yield
        finally:
            self._codes = codes

    def _check(self, tokens: int) -> None:
        if self.positions is not None and tokens > self.positions:
            raise ConfigError(f"{tokens} tokens, the model has positions for {self.positions}: give fewer")

    def _encoded(self, ids: Tensor, mask: Tensor) -> SimpleNamespace:
        session = self.__dict__["_session"]
        found = run_session(session, {"input_ids": ids, "attention_mask": mask})
        return SimpleNamespace(**dict(zip((o.name for o in session.get_outputs()), found, strict=True)))


def _int64(tensor: Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    numbers: np.ndarray[tuple[int, ...], np.dtype[np.int64]] = tensor.to(torch.int64).contiguous().numpy()
    return numbers
