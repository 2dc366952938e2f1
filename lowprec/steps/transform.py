"""Finds where scales can be merged between layers, and fits them: `lowprec.transforms` applied to a whole model.

No architecture is known by name. Whatever stands in a block before the layers that read one tensor is tried as their
source: a norm of as many channels, a linear layer of as many rows, of a part of them (a value of grouped-query
attention), or with more (q, k and v in one). Scales are merged into a copy of the block, and what the block makes of a
few tokens tells whether they cancel: as powers of two they leave every bit as it was, or the source is none.

One pass over a sample of the calibration text, block by block. Left out: what lies outside the blocks, norms that add 1
to their weight (its scaled value would have to be rounded), layers of models without a cut.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.formats import WEIGHT_FORMATS
from lowprec.records import Group, Scheme
from lowprec.steps.calibrate import Progress
from lowprec.steps.linear import input_width, output_width, weight_of
from lowprec.steps.stream import Stream, fast_dtype
from lowprec.transforms import Merge, Smoothed, fit_exponents
from lowprec.transforms.merge import SMOOTHED_ACTIVATION

SAMPLE_TOKENS, SAMPLE_ROWS = 256, 256


@torch.no_grad()
def smooth(
    stream: Stream,
    groups: Sequence[Group],
    schemes: Mapping[str, Sequence[Scheme]],
    batches: Sequence[Any],
    example: Any,
    progress: Progress = lambda done, total: None,
) -> tuple[Smoothed, ...]:
    """Scales for every group and weight format whose inputs may be rounded to INT8; changes nothing.

    Args:
        schemes: group -> the schemes that it may be given.
        batches: what they are fitted to.
        example: a small batch, to try places with.
    """
    formats = {g.name: sorted({str(s.weight) for s in schemes[g.name] if _wanted(s)}) for g in groups}
    reading = {frozenset(g.layers): g.name for g in groups if formats[g.name]}
    found: list[Smoothed] = []
    patterns: list[Merge] = []
    with stream.computing(fast_dtype(stream)):
        with stream.outer():
            entered = [stream.enter(batch) for batch in (example, *batches)]
        hidden, calls = [h for h, _ in entered], [c for _, c in entered]
        for index in range(0 if stream.whole else stream.depth):
            samples: dict[str, list[Tensor]] = {}
            with stream.block(index):
                block = _Block(stream, index, functools.partial(stream.run, index, hidden[0], calls[0][index]))
                everywhere = block.merges(patterns)
                patterns = [block.relative(merge) for merge in everywhere]
                # Where layers of several groups read one tensor, no group can have it scaled alone.
                merges = [merge for merge in everywhere if frozenset(merge.consumers) in reading]
                with _sampling(stream, merges, samples):
                    hidden = [stream.run(index, h, call[index]) for h, call in zip(hidden, calls, strict=True)]
            for merge in merges:
                group = reading[frozenset(merge.consumers)]
                found += _fitted(stream, group, merge, samples[merge.consumers[0]], formats[group])
            progress(index + 1, stream.depth)
    return tuple(found)


@contextlib.contextmanager
def _sampling(stream: Stream, merges: Sequence[Merge], samples: dict[str, list[Tensor]]) -> Iterator[None]:
    """Keeps every merge's x while open, [tokens, K] float32 in parts."""

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            samples.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).float())

        return hook

    names = [merge.consumers[0] for merge in merges]
    handles = [stream.layers[name].register_forward_pre_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wanted(scheme: Scheme) -> bool:
    return scheme.weight is not None and scheme.activation == SMOOTHED_ACTIVATION


def _fitted(
    stream: Stream, group: str, merge: Merge, parts: Sequence[Tensor], formats: Sequence[str]
) -> Iterator[Smoothed]:
    x = torch.cat(list(parts))
    x = x[:: max(1, len(x) // SAMPLE_TOKENS)]
    w = torch.cat([weight_of(stream.layers[name]) for name in merge.consumers])
    w = w[:: math.ceil(len(w) / SAMPLE_ROWS)].float().to(x.device)
    for name in formats:
        with torch.enable_grad():
            exponents = fit_exponents(x, w, WEIGHT_FORMATS[name], merge.channels, merge.spread)
        if exponents.any():
            text = ",".join(str(int(e)) for e in exponents)
            yield Smoothed(group=group, weight=name, merge=merge, exponents=text)


class _Block:
    """One block, materialised, and whether scales merged into it cancel.

    Args:
        run: what it makes of a few tokens.
    """

    def __init__(self, stream: Stream, index: int, run: Callable[[], Tensor]) -> None:
        self._stream, self._run = stream, run
        self._prefix = f"{stream.block_names[index]}."
        self._generator = torch.Generator().manual_seed(index)

    def relative(self, merge: Merge) -> Merge:
        """The same in a block without a name."""
        return _renamed(merge, lambda name: name.removeprefix(self._prefix))

    def merges(self, patterns: Sequence[Merge]) -> list[Merge]:
        """What can be merged here; patterns of another block are tried first, and alone when all of them hold."""
        expected = self._run()
        known = [_renamed(merge, lambda name: self._prefix + name) for merge in patterns]
        if known and all(self._fits(merge) and self._holds(merge, expected) for merge in known):
            return known
        return [m for consumers in self._readers() if (m := self._source_of(consumers, expected)) is not None]

    def _readers(self) -> list[tuple[str, ...]]:
        """Sets of layers of this block that read one tensor."""
        reading: dict[int, list[str]] = {}
        for name in self._stream.layers:
            calls = self._stream.calls[name]
            if name.startswith(self._prefix) and len(calls) == 1:
                reading.setdefault(calls[0], []).append(name)
        return [tuple(names) for names in reading.values()]

    def _source_of(self, consumers: tuple[str, ...], expected: Tensor) -> Merge | None:
        for merge in self._candidates(consumers):
            if self._holds(merge, expected):
                return merge
        return None

    def _candidates(self, consumers: tuple[str, ...]) -> Iterator[Merge]:
        width = input_width(self._stream.layers[consumers[0]])
        for name, module in self._modules().items():
            weight = getattr(module, "weight", None)
            if name in consumers or not isinstance(weight, Tensor):
                continue
            if weight.ndim == 1 and len(weight) == width:
                yield Merge(source=name, consumers=consumers, channels=width)
            if name not in self._stream.layers:
                continue
            rows = output_width(module)
            if rows >= width:
                yield Merge(source=name, consumers=consumers, channels=width, offset=rows - width)
            elif width % rows == 0:
                for head in (h for h in range(rows, 0, -1) if rows % h == 0 and h > 1):
                    yield Merge(source=name, consumers=consumers, channels=rows, head=head, repeat=width // rows)

    def _modules(self) -> dict[str, nn.Module]:
        block = self._stream.module.get_submodule(self._prefix.removesuffix("."))
        return {self._prefix + name: module for name, module in block.named_modules() if name}

    def _fits(self, merge: Merge) -> bool:
        known = self._modules()
        return {merge.source, *merge.consumers} <= known.keys()

    def _holds(self, merge: Merge, expected: Tensor) -> bool:
        exponents = torch.randint(-1, 3, (merge.channels,), generator=self._generator)
        merge.apply(self._stream.module, exponents)
        try:
            found = self._run()
        finally:
            merge.apply(self._stream.module, -exponents)
        return torch.equal(found, expected)


def _renamed(merge: Merge, name_of: Callable[[str], str]) -> Merge:
    return Merge(
        source=name_of(merge.source),
        consumers=tuple(name_of(name) for name in merge.consumers),
        channels=merge.channels,
        offset=merge.offset,
        head=merge.head,
        repeat=merge.repeat,
    )
