"""Steps of a decoder in onnxruntime, its cache bound as input and output: no key or value passes through Python.

Fused attention writes into the cache where it stands; the form for many rows over a cache in codes copies it
(`lowprec.onnx.coded_cache`).
"""

from typing import Any

import numpy as np
import onnxruntime

from lowprec.onnx import KEEP
from lowprec.onnx.sampling import Array

CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def empty_cache(given: Any, batch: int, tokens: int) -> Array:
    """Zeros for an input of a session that takes keys or values, [B, heads, tokens, width]."""
    return np.zeros((batch, given.shape[1], tokens, given.shape[3]), dtype=CACHE_TYPES[given.type])


def holds_codes(session: Any) -> bool:
    """Whether a decoder keeps its cache in codes."""
    return any(i.name.startswith("past_key_values.") and i.type == "tensor(int8)" for i in session.get_inputs())


def score_in_steps(session: Any, ids: Array, mask: Array, step: int) -> Array:
    """What a decoder makes of texts [B, T] when `step` tokens of one text are read at a time: logits [B, T, V]."""
    rows = []
    for row, real in zip(ids, mask, strict=True):
        run, width = Run(session, 1, len(row)), len(row)
        starts = range(0, width, step)
        rows.append([run.step(row[None, i : i + step], real[None, : i + step]) for i in starts])
    return np.concatenate([np.concatenate(parts, axis=1) for parts in rows])


class Run:
    """A batch that a decoder goes on with; its cache is handed from step to step without a copy.

    Args:
        session: of a decoder.
        batch: how many rows.
        capacity: tokens that the cache has room for. Attention that is told how long each row is keeps it in one
            place then; where the graph joins old and new (or at 0) it grows.
    """

    def __init__(self, session: Any, batch: int, capacity: int = 0) -> None:
        self._session, self._binding = session, session.io_binding()
        self._keeps = any(i.name == KEEP for i in session.get_overridable_initializers())
        self._past = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
        self._outputs = [o.name for o in session.get_outputs()]
        room = capacity if self._keeps else 0
        self._cache = [onnxruntime.OrtValue.ortvalue_from_numpy(empty_cache(i, batch, room)) for i in self._past]
        self._grows = room == 0
        if not self._grows:
            for given, made, value in zip(self._past, self._outputs[1:], self._cache, strict=True):
                self._binding.bind_ortvalue_input(given.name, value)
                self._binding.bind_ortvalue_output(made, value)

    def step(self, ids: Array, mask: Array, keep: int = 0) -> Array:
        """Goes on.

        Args:
            ids: [B, T] int64, the next tokens.
            mask: [B, P + T] int64, 1 for real tokens, 0 for padding, those in the cache first.
            keep: of how many last columns logits are wanted, where the graph can leave out others; 0 for all.

        Returns:
            Logits [B, T or keep, V].
        """
        self._binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        self._binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask))
        if self._keeps:
            # As a value of onnxruntime's: arrays are bound to required inputs only.
            wanted = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([keep], dtype=np.int64))
            self._binding.bind_ortvalue_input(KEEP, wanted)
        self._binding.bind_output(self._outputs[0])
        if self._grows:
            for given, made, value in zip(self._past, self._outputs[1:], self._cache, strict=True):
                self._binding.bind_ortvalue_input(given.name, value)
                self._binding.bind_output(made)
        self._session.run_with_iobinding(self._binding)
        found = dict(zip(self._binding_names(), self._binding.get_outputs(), strict=True))
        if self._grows:
            self._cache = [found[name] for name in self._outputs[1:]]
        logits: Array = found[self._outputs[0]].numpy()
        return logits

    def _binding_names(self) -> list[str]:
        """Outputs in the order in which they were bound for the first time."""
        return self._outputs if self._grows else [*self._outputs[1:], self._outputs[0]]
