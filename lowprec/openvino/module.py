"""A model in OpenVINO behind the calling convention of transformers, so that what runs and times those runs this.

module(input_ids=[B, T])                                          -> logits [B, T, V] (decoders)
module(input_ids, use_cache=True, past_key_values=None, ...)      -> logits, past_key_values to go on from
module(input_ids, attention_mask)                                 -> last_hidden_state [B, T, D] (encoders)

The cache is state of the model: there is one at a time, and what is returned as past_key_values stands for it.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino
import torch
import transformers
from torch import Tensor, nn

from lowprec.errors import ArtifactError, ModelError
from lowprec.openvino.form import BEAM, BLOCK_OPTION, CACHE_OPTION, block_of

MODEL, DATA = "openvino_model.xml", "openvino_model.bin"
NO_BLOCK = "0"


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """The cache after a call, of so many tokens."""

    tokens: int


def compiled(model: Any, threads: int, block: str) -> Any:
    """A model compiled for this CPU: in float32, inputs of codes rounded in blocks of `block`, "0" for not at all.

    Args:
        threads: 0 for as many as there are cores.
    """
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        BLOCK_OPTION: block,
        CACHE_OPTION: "f32",
    }
    if threads:
        options["INFERENCE_NUM_THREADS"] = str(threads)
    return openvino.Core().compile_model(model, "CPU", options)


class OpenVinoModule(nn.Module):
    """The model of a folder.

    Args:
        path: the folder.
        threads: 0 for as many as there are cores.
        exact: whether no input is rounded, whatever the file says.

    Raises:
        ArtifactError: OpenVINO does not load it.
    """

    def __init__(self, path: Path, threads: int = 0, exact: bool = False) -> None:
        super().__init__()
        self.config = transformers.AutoConfig.from_pretrained(path)
        try:
            model = openvino.Core().read_model(str(path / MODEL))
            self._request: Any = compiled(model, threads, NO_BLOCK if exact else block_of(model)).create_infer_request()
        except Exception as error:
            reason = str(error).strip().splitlines()[-1]
            raise ArtifactError(
                path / MODEL, f"does not load in OpenVINO {openvino.__version__} ({reason}); write it again"
            ) from error
        self._inputs = {value.get_any_name() for value in model.inputs}
        self._outputs = [value.get_any_name() for value in model.outputs]
        self._state: State | None = None

    @property
    def decodes(self) -> bool:
        """Whether it has a cache."""
        return BEAM in self._inputs

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: State | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        """Runs the model.

        Args:
            input_ids: [B, T].
            attention_mask: [B, P + T], 0 for padding; None: there is none.
            past_key_values: what the last call returned, of P tokens; None at the start of a text.
            use_cache: whether there will be a later call.
            logits_to_keep: of how many last positions logits are wanted, 0 for all.

        Raises:
            ModelError: `past_key_values` are not those of the last call.
        """
        if past_key_values is not None and past_key_values is not self._state:
            raise ModelError("past_key_values are not the last call's: OpenVINO holds the cache of one text at a time")
        rows, tokens = input_ids.shape
        total = tokens + (0 if past_key_values is None else past_key_values.tokens)
        mask = torch.ones(rows, total, dtype=torch.long) if attention_mask is None else attention_mask
        given = {
            "input_ids": input_ids.long().contiguous().numpy(),
            "attention_mask": mask.long().contiguous().numpy(),
            BEAM: np.arange(rows, dtype=np.int32),
        }
        if self.decodes and past_key_values is None:
            self._request.reset_state()
        self._state = None
        found = self._request.infer({name: array for name, array in given.items() if name in self._inputs})
        outputs = {name: torch.from_numpy(found[name].copy()) for name in self._outputs}
        if logits_to_keep:
            outputs = {name: value[:, -logits_to_keep:] for name, value in outputs.items()}
        if use_cache:
            self._state = State(total)
        return SimpleNamespace(**outputs, past_key_values=self._state)
