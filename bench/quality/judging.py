"""What decoders and encoders have in common where methods are judged: the reference, and a method's model beside it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from exchange import WEIGHTS
from safetensors.torch import load_file
from texts import TEXTS

from lowprec.records import from_json, to_json
from lowprec.steps.judge import Bounds, ratio_bounds
from lowprec.steps.load import Model, load
from lowprec.steps.measure import Compare, Run, compare, run_through
from lowprec.steps.stream import Overlay, Override, Stream
from lowprec.steps.tokens import TokenSet

BATCH_TOKENS = 2048
CONFIDENCE = 0.95
EVERYTHING = "all"

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the table: what is run, with which interpreter, on which arguments.

    `activation` is the format that the rounded layers' inputs are rounded to while it is judged; `grid` what its
    weights are rounded to, as far as others round to the like ("4 bits, groups of 64"), of a `peer` or ours.
    """

    name: str
    worker: str
    python: str
    arguments: tuple[str, ...]
    activation: str | None = None
    grid: str = ""
    peer: bool = False


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method took: `seconds` from the loaded to the rounded model, `peak_bytes` of its process.

    `processor_seconds` are those of all threads together, `loaded_bytes` what libraries and the loaded model take,
    `machine` and `commit` what it ran on and of; None of methods that ran before that was noted.
    """

    method: str
    seconds: float
    processor_seconds: float | None
    peak_bytes: int
    loaded_bytes: int | None
    machine: str | None
    commit: str | None


def cost_of(method: Method, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Cost`, of what the method's worker wrote down."""
    return {
        "method": method.name,
        "seconds": measured["seconds"],
        "processor_seconds": measured.get("processor_seconds"),
        "peak_bytes": measured["peak_bytes"],
        "loaded_bytes": measured.get("loaded_bytes"),
        "machine": measured.get("machine"),
        "commit": measured.get("commit"),
    }


class Bench:
    """The reference on the judged text, and what a method makes of it.

    Reference and candidates are computed in the same `dtype`.
    """

    def __init__(self, model: Model, judged: TokenSet) -> None:
        self.model, self.judged, self.batches = model, judged, judged.batches(BATCH_TOKENS)
        self.stream = Stream(model.module, model.forward, self.batches[0])
        self.dtype = self.dtype_of(self.stream)

    def dtype_of(self, stream: Stream) -> torch.dtype:
        """What all is computed in."""
        return stream.dtype

    @cached_property
    def reference(self) -> Run:
        """Of the judged text."""
        with self.stream.computing(self.dtype):
            return run_through(self.stream, self.batches)

    def candidate(self, folder: Path, activation: str | None) -> tuple[Stream, Overlay]:
        """A method's model, the reference's unless it saved one of its own, and its weights.

        `activation` is what the inputs of the blocks' layers are rounded to.
        """
        stream = self.stream
        if (own := folder / "model").exists():
            turned = load(own)
            stream = Stream(turned.module, turned.forward, self.batches[0])
        weights = load_file(folder / WEIGHTS)
        return stream, {
            layer: Override(
                weight=lambda w=weights[name]: w.float(),  # type: ignore[misc]
                activation=activation,
                activation_exponents=weights.get(f"{layer}.exponents"),
            )
            for layer in stream.layers
            if (name := f"{layer}.weight") in weights and stream.block_of(layer) is not None
        }

    def compared(self, folder: Path, activation: str | None, by: Compare) -> torch.Tensor:
        """[windows in the order of the batches, columns] of a method beside the reference."""
        stream, overlay = self.candidate(folder, activation)
        with self.stream.computing(self.dtype), stream.computing(self.dtype):
            candidate = run_through(stream, self.batches, overlay)
            return compare(self.reference, [candidate], self.batches, by)[0]


def remembered(kind: type[R], file: Path, find: Callable[[], R], holds: Callable[[R], bool] = lambda known: True) -> R:
    """The record in `file` where it holds, else what is found, which is then written there."""
    if file.exists() and holds(known := from_json(kind, file.read_text())):
        return known
    found = find()
    file.write_text(to_json(found))
    return found


def masks(source: Any) -> Iterator[tuple[str, Any]]:
    """(text, which windows are of it), then all of them."""
    yield from ((name, source == number) for number, name in enumerate(TEXTS))
    yield EVERYTHING, source >= 0


def bounds_over_units(values: Any, counts: Any, unit: Any) -> Bounds:
    """Sum of values / sum of counts, one of each a window, with its two-sided interval over units."""
    units = np.unique(unit, return_inverse=True)[1]
    tail = (1.0 - CONFIDENCE) / 2.0
    return ratio_bounds(np.bincount(units, values), np.bincount(units, counts), 1.0 - tail)


def pairs(methods: Iterable[Method]) -> Iterator[tuple[Method, Method]]:
    """(ours, peer) that round weights to the like."""
    listed = list(methods)
    for ours in (m for m in listed if m.grid and not m.peer and m.activation is None):
        yield from ((ours, peer) for peer in listed if peer.peer and peer.grid == ours.grid)
