"""What methods are given and give back, whatever environment they run in: needs torch, transformers and safetensors.

A method reads a folder with the model (a decoder in bfloat16, an encoder in its own dtype) and one with the calibration
windows; it writes the weights that its rounded layers compute with, decoded, so that all are judged by one runtime, and
a record of its time and memory. Time is from the loaded model to the rounded one; importing, reading and writing are
left out. Memory is the process's peak until the model is rounded, libraries and the loaded model included.
"""

import json
import os
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
    """Seconds between entering and leaving, and those that processors worked meanwhile for this process.

    The latter are what other work on the machine hardly changes. They hold children that have ended. `loaded_bytes` are
    what the process held when it was entered, `peak_bytes` the most that it had held when it was left.
    """

    seconds = processor_seconds = 0.0
    loaded_bytes = peak_bytes = 0

    def __enter__(self) -> "Clock":
        self._start, self._worked = time.perf_counter(), _worked()
        self.loaded_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        return self

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.seconds, self.processor_seconds = time.perf_counter() - self._start, _worked() - self._worked
        self.peak_bytes = _peak()


def _peak() -> int:
    """Most bytes that this program has held. What getrusage says outlives exec: it may be those of who started it."""
    status = Path("/proc/self/status")
    # Some sandboxes have the file without this line.
    if status.exists() and (found := status.read_text().partition("VmHWM:")[2].split()):
        return int(found[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _worked() -> float:
    """Seconds of all threads and of children that have ended."""
    return sum(os.times()[:4])


def load_model(folder: str) -> tuple[Any, Any]:
    """The model in the dtype that it is stored in, and its tokenizer."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    auto = AutoModelForCausalLM if is_decoder(AutoConfig.from_pretrained(folder)) else AutoModel
    return auto.from_pretrained(folder, dtype="auto").eval(), AutoTokenizer.from_pretrained(folder)


def is_decoder(config: Any) -> bool:
    """Whether the model predicts tokens; else it gives embeddings."""
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures)


def rounded_layers(model: Any) -> dict[str, torch.nn.Linear]:
    """What everyone rounds, by name: the linear layers but for a decoder's head and an encoder's pooler."""
    return {name: m for name, m in _linear(model).items() if name not in left_alone(model)}


def left_alone(model: Any) -> list[str]:
    """The linear layers that nobody rounds. Sentence embeddings are means of hidden states, without the pooler."""
    head = model.get_output_embeddings()
    return [name for name, m in _linear(model).items() if m is head or name.startswith("pooler.")]


def _linear(model: Any) -> dict[str, torch.nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


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
    taken = {name: getattr(clock, name) for name in ("seconds", "processor_seconds", "loaded_bytes", "peak_bytes")}
    (folder / MEASURED).write_text(json.dumps({**taken, **also}))
