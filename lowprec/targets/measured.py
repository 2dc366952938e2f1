"""What targets have in common whose runtime is on this machine's CPU and loads files of its own.

Each times single layers in sessions of that runtime, as they will run, inputs rounded inside; threads are as many as
torch has. The baseline is the same graph in float32, which is what the runtime makes of weights without codes.
"""

import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowprec.formats import ACTIVATION_FORMATS, QuantizedWeight
from lowprec.records import CostSample, Origin, Scheme
from lowprec.targets.base import Progress, installed, weight_bytes
from lowprec_kernels.timing import Timing


class MeasuredTarget(ABC):
    """Base of such targets; see `lowprec.targets.base.RuntimeTarget`.

    Args:
        seconds_per_sample: time spent on each candidate, on average.
    """

    name: str
    """Name that plans use; also that of the package."""

    def __init__(self, seconds_per_sample: float = 0.15) -> None:
        self.seconds_per_sample = seconds_per_sample

    @property
    def device(self) -> str:
        """Version, processor and threads."""
        capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        return f"cpu ({self.name} {installed(self.name)}, {platform.machine()}, {capability}, {threads} threads)"

    @property
    def origin(self) -> Origin:
        """All times are measured."""
        return "measured"

    @property
    def baseline(self) -> str:
        """The graph without codes."""
        return "the same runtime, unquantised: the same graph in float32"

    def dense_bytes(self, own: int) -> int:
        """Float32 is what it computes in."""
        return 4

    @abstractmethod
    def supports(self, scheme: Scheme, n: int, k: int) -> str | None:
        """See `lowprec.targets.base.Target.supports`."""

    def loaded_bytes(self, scheme: Scheme, n: int, k: int) -> int:
        """Of a weight [n, k] with its scales, as the runtime holds it."""
        return weight_bytes(scheme, n, k)

    @abstractmethod
    def timings(
        self, n: int, k: int, schemes: Sequence[Scheme], ms: Sequence[int]
    ) -> Mapping[tuple[str, int], tuple[str, Timing]]:
        """(scheme, M) -> what computes it there, and how long that takes for a weight [n, k]; all are supported."""

    @abstractmethod
    def multiplied(self, scheme: Scheme, weight: QuantizedWeight, x: Tensor) -> Tensor:
        """What the runtime makes of x [M, K] and the weight [N, K] in a resolved scheme, inputs rounded inside."""

    def time(
        self,
        shapes: Sequence[tuple[int, int]],
        schemes: Sequence[Scheme],
        ms: Sequence[int],
        progress: Progress | None = None,
    ) -> list[CostSample]:
        """See `lowprec.targets.base.Target.time`."""
        samples: list[CostSample] = []
        for done, (n, k) in enumerate(shapes):
            samples += self._samples(n, k, [s for s in schemes if self.supports(s, n, k) is None], ms)
            for number in range(len(ms)):
                if progress is not None:
                    progress(done * len(ms) + number + 1, len(shapes) * len(ms))
        return samples

    def _samples(self, n: int, k: int, schemes: Sequence[Scheme], ms: Sequence[int]) -> list[CostSample]:
        found = self.timings(n, k, schemes, ms)
        timed = [(m, scheme, *found[scheme.name, m]) for m in ms for scheme in schemes]
        return [
            CostSample(
                op="linear",
                m=m,
                n=n,
                k=k,
                scheme=scheme.name,
                kernel=kernel,
                p20_us=timing.p20_us,
                p50_us=timing.p50_us,
                p80_us=timing.p80_us,
                bytes=self.loaded_bytes(scheme, n, k),
                origin="measured",
            )
            for m, scheme, kernel, timing in timed
        ]

    def layer_error(self, scheme: Scheme, weight: QuantizedWeight, x: Tensor) -> float:
        """See `lowprec.targets.base.RuntimeTarget.layer_error`."""
        y = self.multiplied(scheme, weight, x).double()
        rounded = x if scheme.activation is None else ACTIVATION_FORMATS[scheme.activation].fake_quantize(x)
        truth = rounded.double() @ weight.dequantize().double().T
        return float((y - truth).norm() / truth.norm().clamp_min(1e-30))
