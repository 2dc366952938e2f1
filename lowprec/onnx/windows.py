"""Text through a form: what ranges are measured on, and how far its outputs are from the artefact's in torch.

The text is that of the artefact's probe set, windows of tokens that are not held out; modules that are no transformers
model bring example inputs. A runner turns a window into calls: whole, or in chunks of a graph of fixed sizes, whose
cache slides.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from lowprec.artifacts import probe
from lowprec.errors import ArtifactError, ConfigError
from lowprec.onnx.binding import empty_cache
from lowprec.onnx.fixed import Sizes
from lowprec.onnx.graph import Kind
from lowprec.onnx.matching import Array

Feed = dict[str, Array]


class Session(Protocol):
    """What is needed of an onnxruntime session."""

    def run(self, names: Sequence[str] | None, feed: Feed) -> list[Array]:
        """Outputs by position."""

    def get_inputs(self) -> Sequence[Any]:
        """Names and shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """How far a form's outputs are from the artefact's.

    Attributes:
        largest: largest difference, as a share of the largest output.
        kl_nats: mean KL(artefact || form) of a token, of models with logits.
        same_first: share of tokens with the same most likely next token, of models with logits.
    """

    largest: float
    kl_nats: float | None = None
    same_first: float | None = None

    def __str__(self) -> str:
        if self.kl_nats is None or self.same_first is None:
            return f"outputs within {self.largest:.1e} of the largest"
        return f"KL {self.kl_nats:.2g} nats, the same first token at {self.same_first:.1%}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """What goes through a form.

    Attributes:
        windows: [W, T] token ids, of transformers models.
        inputs: name -> [B, ...], of other modules.
        sizes: of a graph of fixed sizes, None where they are free.
    """

    kind: Kind
    windows: Tensor | None
    inputs: Mapping[str, Tensor] | None
    sizes: Sizes | None = None


def windows_of(path: Path, sizes: Sizes | None) -> Tensor:
    """[W, T] token ids of the probe set of the artefact at `path`.

    Raises:
        ArtifactError: it has no probe set.
        ConfigError: windows that are shorter than a call of fixed size.
    """
    if not (path / probe.FILE_NAME).exists():
        raise ArtifactError(
            path, f"has no {probe.FILE_NAME}, on whose text ranges are measured; run lowprec calibrate again"
        )
    windows = probe.load_probe(path).tokens.long()
    if sizes is not None and sizes.sequence > windows.shape[1]:
        raise ConfigError(
            f"sequence {sizes.sequence} is longer than the windows that ranges are measured on: give at most "
            f"{windows.shape[1]}"
        )
    return windows


def plain_session(path: Path, more_outputs: Iterable[str] = ()) -> Session:
    """A session that computes the graph node by node, as it stands: nothing is fused, so nothing else is rounded.

    Args:
        more_outputs: names of values inside of the graph that `run` is to give after its outputs.
    """
    import onnx

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    names = list(more_outputs)
    if not names:
        found: Session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return found
    model = onnx.load(path, load_external_data=False)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    opened = path.with_name("opened.onnx")
    onnx.save(model, opened)
    try:
        found = onnxruntime.InferenceSession(str(opened), options, providers=["CPUExecutionProvider"])
    finally:
        opened.unlink()
    return found


def calls(session: Session, text: Text) -> Iterator[tuple[Feed, list[Array]]]:
    """Every call that the text makes of a session, with all its outputs; a decoder's cache goes from call to call."""
    if text.inputs is not None:
        yield from _module_calls(session, text)
    elif text.windows is not None:
        for window in text.windows.numpy():
            yield from (
                _decoder_calls(session, window, text.sizes)
                if text.kind == "decoder"
                else _encoder_calls(session, window, text.sizes)
            )


def _module_calls(session: Session, text: Text) -> Iterator[tuple[Feed, list[Array]]]:
    assert text.inputs is not None
    given = {name: tensor.numpy() for name, tensor in text.inputs.items()}
    rows = len(next(iter(given.values())))
    for feed in [given] if text.sizes is None else [{n: a[i : i + 1] for n, a in given.items()} for i in range(rows)]:
        yield feed, session.run(None, feed)


def _encoder_calls(session: Session, window: Array, sizes: Sizes | None) -> Iterator[tuple[Feed, list[Array]]]:
    """A call of each of `lengths_seen`; what is left of a fixed size is padding."""
    ids = window[None, : sizes.sequence if sizes else None]
    for length in lengths_seen(len(window), sizes):
        feed = {"input_ids": ids, "attention_mask": (np.arange(ids.shape[1]) < length).astype(np.int64)[None]}
        yield feed, session.run(None, feed)


def lengths_seen(length: int, sizes: Sizes | None) -> tuple[int, ...]:
    """How many tokens of a window each call to an encoder has: all of them, and half, as a fixed size is seldom met."""
    if sizes is None:
        return (length,)
    return (sizes.sequence, sizes.sequence // 2) if sizes.sequence > 1 else (1,)


def _decoder_calls(session: Session, window: Array, sizes: Sizes | None) -> Iterator[tuple[Feed, list[Array]]]:
    caches = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    past = sizes.past if sizes else 0
    step = sizes.sequence if sizes else len(window)
    cache = [empty_cache(i, 1, past) for i in caches]
    for start in range(0, tokens_seen(len(window), sizes), step):
        mask = np.zeros((1, past + step), np.int64)
        mask[0, past - min(start, past) :] = 1
        feed = {"input_ids": window[None, start : start + step], "attention_mask": mask}
        feed |= {i.name: array for i, array in zip(caches, cache, strict=True)}
        outputs = session.run(None, feed)
        yield feed, outputs
        cache = [array[:, :, array.shape[2] - past :] for array in outputs[1 : 1 + len(caches)]]


def tokens_seen(length: int, sizes: Sizes | None) -> int:
    """How many tokens of a window go through a decoder: whole calls, and no more than its cache can see at once."""
    if sizes is None:
        return length
    return min(length, sizes.past + sizes.sequence) // sizes.sequence * sizes.sequence


def ranges(path: Path, names: Sequence[str], text: Text) -> dict[str, tuple[float, float]]:
    """Least and largest value of the values called `names` inside of the graph at `path`, over the text."""
    session = plain_session(path, names)
    found = dict.fromkeys(names, (np.inf, -np.inf))
    for _, outputs in calls(session, text):
        for name, array in zip(names, outputs[len(outputs) - len(names) :], strict=True):
            low, high = found[name]
            found[name] = (min(low, float(array.min())), max(high, float(array.max())))
    return found


def deviation(
    path: Path, module: nn.Module, text: Text, opened: Callable[[Path], Session] = plain_session
) -> Deviation:
    """The first output of the graph at `path` against the module's in torch, over the text."""
    session = opened(path)
    found = [_answer(feed, torch.from_numpy(outputs[0]).float(), text) for feed, outputs in calls(session, text)]
    with torch.no_grad():
        expected = _expected(module, text)
    got = torch.cat(found, 1).reshape(expected.shape) if text.kind == "decoder" else torch.cat(found)
    largest = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if text.kind != "decoder":
        return Deviation(largest=largest)
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    same = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    return Deviation(largest=largest, kl_nats=max(kl, 0.0), same_first=same)


def _answer(feed: Feed, output: Tensor, text: Text) -> Tensor:
    """What counts of an output: of an encoder [T, D], the real tokens of its one row."""
    return output[0, torch.from_numpy(feed["attention_mask"][0]) > 0] if text.kind == "encoder" else output


def _expected(module: Any, text: Text) -> Tensor:
    """[B, ...] outputs of torch; of a decoder [1, W T, V], window after window; of an encoder [T, D]."""
    if text.inputs is not None:
        out = module(**text.inputs)
        first: Tensor = out if isinstance(out, Tensor) else out[0]
        return first
    assert text.windows is not None
    length = text.windows.shape[1]
    if text.kind == "decoder":
        seen = tokens_seen(length, text.sizes)
        return torch.cat([module(input_ids=w[None, :seen], use_cache=False).logits for w in text.windows], 1)
    lengths = lengths_seen(length, text.sizes)
    return torch.cat([module(input_ids=w[None, :n]).last_hidden_state[0] for w in text.windows for n in lengths])
