"""Finds where scales can be merged between layers (`lowprec.steps.places`), and fits them.

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
from lowprec.steps.linear import weight_of
from lowprec.steps.places import Places
from lowprec.steps.stream import Call, Stream, fast_dtype
from lowprec.steps.tokens import Batch
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
            sampling = _Sampling(stream)
            with stream.block(index):
                block = _Scaled(stream, index, functools.partial(stream.run, index, hidden[0], calls[0][index]))
                everywhere = block.found(patterns)
                patterns = [block.relative(merge) for merge in everywhere]
                # Where layers of several groups read one tensor, no group can have it scaled alone.
                merges = [merge for merge in everywhere if frozenset(merge.consumers) in reading]
                with sampling.of([merge.consumers[0] for merge in merges]):
                    hidden = [
                        sampling.run(batch, index, h, call[index])
                        for batch, h, call in zip((example, *batches), hidden, calls, strict=True)
                    ]
            for merge in merges:
                group = reading[frozenset(merge.consumers)]
                found += _fitted(stream, group, merge, sampling.found[merge.consumers[0]], formats[group])
            progress(index + 1, stream.depth)
    return tuple(found)


class _Sampling:
    """Keeps the inputs of some layers of a block, [tokens, K] float32 in parts, of real tokens alone."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._real: Tensor | None = None
        self.found: dict[str, list[Tensor]] = {}

    @contextlib.contextmanager
    def of(self, names: Sequence[str]) -> Iterator[None]:
        """Samples these layers while open."""
        handles = [self._stream.layers[name].register_forward_pre_hook(self._keep(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, batch: Any, index: int, hidden: Any, call: Call) -> Any:
        """What block `index` makes of a batch."""
        self._real = batch.mask() if isinstance(batch, Batch) else None
        return self._stream.run(index, hidden, call)

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x, real = args[0], self._real
            rows = x.flatten(0, -2) if real is None or real.shape != x.shape[:-1] else x[real.to(x.device)]
            self.found.setdefault(name, []).append(rows.float())

        return hook


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


class _Scaled(Places):
    """Where scales can be merged into a block: as powers of two they leave every bit of its output as it was."""

    def __init__(self, stream: Stream, index: int, run: Callable[[], Tensor]) -> None:
        super().__init__(stream, index, run)
        self._generator = torch.Generator().manual_seed(index)

    def holds(self, place: Merge, expected: Tensor) -> bool:
        """Whether random scales cancel."""
        exponents = torch.randint(-1, 3, (place.channels,), generator=self._generator)
        place.apply(self._stream.module, exponents)
        try:
            found = self._run()
        finally:
            place.apply(self._stream.module, -exponents)
        return torch.equal(found, expected)
