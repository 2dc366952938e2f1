"""What a target is: a runtime, or a device to plan for, that can say what it runs and how long that takes."""

from collections.abc import Callable, Sequence
from typing import Protocol

from lowprec.errors import UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, resolve
from lowprec.records import CostSample, Origin, Scheme
from lowprec.registry import Registry

BF16_BYTES = 2
Progress = Callable[[int, int], None]


class Target(Protocol):
    """A runtime or device that a plan is made for."""

    @property
    def name(self) -> str:
        """Name that plans and the command line use."""

    @property
    def device(self) -> str:
        """What the times belong to, for the report."""

    @property
    def origin(self) -> Origin:
        """Whether `time` measures or models."""

    def supports(self, scheme: Scheme, n: int, k: int) -> str | None:
        """None if a weight [n, k] can run in `scheme`, else the reason."""

    def time(
        self,
        shapes: Sequence[tuple[int, int]],
        schemes: Sequence[Scheme],
        ms: Sequence[int],
        progress: Progress | None = None,
    ) -> list[CostSample]:
        """One sample for each (shape, scheme, M) that is supported: the best kernel's time, activations quantised.

        Args:
            shapes: (N, K) of the weights.
            schemes: as the caller names them; the samples carry these names (a group size is settled per shape).
            ms: rows of the activations.
            progress: called with (done, total) after each (shape, M).
        """


TARGETS: Registry[Target] = Registry("target", "lowprec.targets")


def weight_bytes(scheme: Scheme, n: int, k: int) -> int:
    """Stored bytes of a weight [n, k] with its scales, as a checkpoint holds it (bf16: 2 n k).

    Raises:
        UnsupportedError: the scheme does not fit K.
    """
    scheme = resolve(scheme, k)
    if scheme.weight is None:
        return BF16_BYTES * n * k
    return round(n * WEIGHT_FORMATS[scheme.weight].bytes_per_row(k))


def unfit(scheme: Scheme, k: int) -> str | None:
    """Why `scheme` cannot hold rows of `k` weights, None if it can."""
    try:
        resolve(scheme, k)
    except UnsupportedError as error:
        return "; ".join(error.reasons) or str(error)
    return None
