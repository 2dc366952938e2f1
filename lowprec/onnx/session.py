"""Runs an exported model in onnxruntime on the CPU, exactly: no activation is rounded that the graph does not round.

Left as it is, onnxruntime fuses DequantizeLinear and MatMul into a product that rounds its inputs to INT8 block by
block (accuracy level 4); level 1 computes in float32.

Source: onnxruntime.ai/docs, session.qdq_matmulnbits_accuracy_level.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from lowprec.errors import ArtifactError, ConfigError

ACCURACY, EXACT = "session.qdq_matmulnbits_accuracy_level", "1"
Cache = list[Tensor]


def open_session(path: Path, threads: int = 0) -> Any:
    """An onnxruntime session of the model at `path`; 0 threads: as many as there are cores.

    Raises:
        ArtifactError: onnxruntime does not load it.
    """
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(ACCURACY, EXACT)
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ArtifactError(path, f"does not load in onnxruntime {onnxruntime.__version__} ({reason})") from error


def run_session(session: Any, given: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs of a session for inputs by name, in the order of the graph."""
    return [torch.from_numpy(a) for a in session.run(None, {name: t.numpy() for name, t in given.items()})]


class OnnxDecoder:
    """A decoder's graph, called with token ids.

    Args:
        path: model.onnx.
        threads: 0 for as many as there are cores.

    Raises:
        ArtifactError: not loadable, or no decoder with a cache.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        self._session = open_session(path, threads)
        self._past = [i for i in self._session.get_inputs() if i.name.startswith("past_key_values.")]
        if not self._past:
            raise ArtifactError(path, "is no decoder: it takes no past_key_values")

    def empty(self, batch: int) -> Cache:
        """The cache before the first token."""
        return [torch.zeros(batch, i.shape[1], 0, i.shape[3]) for i in self._past]

    def step(self, ids: Tensor, mask: Tensor, past: Cache) -> tuple[Tensor, Cache]:
        """Goes on from a cache.

        Args:
            ids: [B, T] the next tokens.
            mask: [B, P + T] 1 for real tokens, 0 for padding, those in the cache first.
            past: of P tokens.

        Returns:
            Logits [B, T, V], and the cache of P + T tokens.
        """
        names = [i.name for i in self._past]
        given = {"input_ids": ids, "attention_mask": mask, **dict(zip(names, past, strict=True))}
        logits, *present = run_session(self._session, given)
        return logits, present

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T] token ids, padded on either side where the mask is 0 -> logits [B, T, V], of no use at padding."""
        mask = torch.ones_like(ids) if mask is None else mask
        return self.step(ids, mask, self.empty(len(ids)))[0]

    def generate(self, prompts: Sequence[Tensor], tokens: int, stop: int | None = None) -> list[Tensor]:
        """Continues prompts of any lengths greedily, as one batch.

        Args:
            prompts: [T_i] token ids each.
            tokens: how many are made at most.
            stop: the token that ends an answer, which then is its last.

        Returns:
            The new tokens of each prompt.

        Raises:
            ConfigError: no prompt, or an empty one.
        """
        ids, mask = left_padded(prompts)
        past = self.empty(len(ids))
        made: list[Tensor] = []
        ended = torch.zeros(len(ids), dtype=torch.bool)
        while len(made) < tokens and not bool(ended.all()):
            logits, past = self.step(ids, mask, past)
            ids = logits[:, -1:].argmax(-1)
            made.append(ids)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            ended |= ids[:, 0] == stop if stop is not None else ended
        rows = torch.cat(made, 1) if made else ids[:, :0]
        return [row if stop is None else _until(row, stop) for row in rows]


def left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[T_i] token ids each -> ids and mask [B, T], padding on the left; ConfigError when a row is empty."""
    if not rows or any(len(row) == 0 for row in rows):
        raise ConfigError("every prompt needs at least one token")
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


def _until(row: Tensor, stop: int) -> Tensor:
    places = (row == stop).nonzero()
    return row[: int(places[0]) + 1] if len(places) else row
