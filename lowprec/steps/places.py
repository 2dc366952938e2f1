"""Finds where a block hands x from one module to others, so that both ends can be changed and the function stays.

No architecture is known by name. Whatever stands in a block before the layers that read one tensor is tried as their
source: a norm of as many channels, a linear layer of as many rows, of a part of them (a value of grouped-query
attention), or with more (q, k and v in one). A change is merged into a copy of the block, and what the block makes of a
few tokens tells whether it cancels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lowprec.steps.linear import input_width, output_width
from lowprec.steps.stream import Stream
from lowprec.transforms import Merge


class Places(ABC):
    """Those of one block, which is materialised.

    Args:
        run: what it makes of a few tokens.
    """

    def __init__(self, stream: Stream, index: int, run: Callable[[], Tensor]) -> None:
        self._stream, self._run = stream, run
        self._prefix = f"{stream.block_names[index]}."

    @abstractmethod
    def holds(self, place: Merge, expected: Tensor) -> bool:
        """Whether a change there leaves the block's output as `expected`; undoes it."""

    def narrowed(self, place: Merge) -> Iterator[Merge]:
        """The places to be tried where the shapes would allow `place`."""
        yield place

    def relative(self, place: Merge) -> Merge:
        """The same in a block without a name."""
        return _renamed(place, lambda name: name.removeprefix(self._prefix))

    def found(self, patterns: Sequence[Merge]) -> list[Merge]:
        """The places here; patterns of another block are tried first, and alone when all of them hold."""
        expected = self._run()
        known = [_renamed(place, lambda name: self._prefix + name) for place in patterns]
        if known and all(self._fits(place) and self.holds(place, expected) for place in known):
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
        for candidate in self._candidates(consumers):
            for place in self.narrowed(candidate):
                if self.holds(place, expected):
                    return place
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
                for head in heads_of(rows):
                    yield Merge(source=name, consumers=consumers, channels=rows, head=head, repeat=width // rows)

    def _modules(self) -> dict[str, nn.Module]:
        block = self._stream.module.get_submodule(self._prefix.removesuffix("."))
        return {self._prefix + name: module for name, module in block.named_modules() if name}

    def _fits(self, place: Merge) -> bool:
        known = self._modules()
        return {place.source, *place.consumers} <= known.keys()


def heads_of(channels: int) -> list[int]:
    """The widths that heads of so many channels may have, the largest first."""
    return [head for head in range(channels, 1, -1) if channels % head == 0]


def _renamed(place: Merge, name_of: Callable[[str], str]) -> Merge:
    return replace(place, source=name_of(place.source), consumers=tuple(name_of(name) for name in place.consumers))
