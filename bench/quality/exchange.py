"""What methods are given and give back, whatever environment they run in: needs torch, transformers and safetensors.

A method reads a folder with the bfloat16 model and one with the calibration windows; it writes the weights that its
rounded layers compute with, decoded, so that all are judged by one runtime, and a record of its time and memory. Time
is from the loaded model to the rounded one; importing, reading and writing are left out. Memory is the process's peak.
"""

import json
import resource
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MEASURED = "method.json"
WEIGHTS = "weights.safetensors"


class Clock:
    """Seconds between entering and leaving."""

    seconds = 0.0

    def __enter__(self) -> "Clock":
        self._start = time.perf_counter()
        return self

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.seconds = time.perf_counter() - self._start


def load_model(folder: str) -> tuple[Any, Any]:
    """The model in bfloat16, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def calibration_rows(file: str) -> torch.Tensor:
    """[windows, tokens] int64."""
    return load_file(file)["ids"]


def save_dense(model: Any, out: str, clock: Clock, **also: object) -> None:
    """The parameters of a model whose rounded layers hold decoded weights."""
    save_weights({name: p.detach() for name, p in model.state_dict().items()}, out, clock, **also)


def save_weights(weights: dict[str, torch.Tensor], out: str, clock: Clock, **also: object) -> None:
    """Decoded weights by the names of the model's state."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: w.clone().contiguous() for name, w in weights.items()}, folder / WEIGHTS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / MEASURED).write_text(json.dumps({"seconds": clock.seconds, "peak_bytes": peak, **also}))
