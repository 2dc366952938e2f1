"""Devices that are not here, modelled by their roofline; every figure is marked `modelled`.

    t = max(bytes / bandwidth, 2 m n k / rate) + t_q
    bytes = stored weight + 2 m k (input, bf16) + 2 m n (output, bf16)      rate of the precision that computes
    t_q   = (2 m k + m k) / bandwidth     reading bf16 and writing 8-bit activations, where they are quantised
    a quantised input is then read back with 1 byte a value instead of 2
    cache: t = bytes of all stored tokens / bandwidth, in whatever format, as a kernel that reads codes would need

Source: Williams et al., "Roofline: an insightful visual performance model", CACM 52 (2009). Peaks are dense
(no structured sparsity) and are reached by no kernel, launch overhead and unpacking are left out: ratios between
schemes are upper bounds of what is to be gained. w8a16 and w4a16 compute in bf16; w4a8 at the 8-bit rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from lowprec.errors import ConfigError
from lowprec.formats import per_block, resolve
from lowprec.records import CachePlace, CostSample, Origin, Scheme
from lowprec.registry import closest
from lowprec.targets.base import BF16_BYTES, Progress, cache_sample, token_bytes, unfit, weight_bytes
from lowprec_kernels.timing import Timing

TERA = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Published peaks of a device.

    Attributes:
        bandwidth: bytes per second of its memory.
        rates: operations per second of a dense matmul by compute precision ("bf16", "int8", "fp8").
        missing: precision -> why the device cannot compute in it.
    """

    name: str
    bandwidth: float
    rates: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)


# NVIDIA's sheets print tensor figures with 2:4 sparsity for H100, H200 (and beside the dense ones for A100, L40S);
# the dense rates below are half of those.
_TABLE = (
    # H100 SXM5 80 GB: NVIDIA H100 datasheet (3.35 TB/s; 1,979 / 3,958 / 3,958 with sparsity).
    Device(
        name="h100",
        bandwidth=3.35 * TERA,
        rates={"bf16": 989.4 * TERA, "int8": 1978.9 * TERA, "fp8": 1978.9 * TERA},
    ),
    # H200 SXM 141 GB: NVIDIA H200 datasheet (4.8 TB/s; the compute of the H100).
    Device(
        name="h200",
        bandwidth=4.8 * TERA,
        rates={"bf16": 989.4 * TERA, "int8": 1978.9 * TERA, "fp8": 1978.9 * TERA},
    ),
    # A100 SXM4 80 GB: NVIDIA A100 datasheet (2,039 GB/s; 312 TFLOPS, 624 TOPS dense).
    Device(
        name="a100",
        bandwidth=2.039 * TERA,
        rates={"bf16": 312 * TERA, "int8": 624 * TERA},
        missing={"fp8": "a100 has no FP8 units (they came with Hopper and Ada)"},
    ),
    # L40S 48 GB: NVIDIA L40S datasheet (864 GB/s; 362.05, 733, 733 dense).
    Device(
        name="l40s",
        bandwidth=0.864 * TERA,
        rates={"bf16": 362.05 * TERA, "int8": 733 * TERA, "fp8": 733 * TERA},
    ),
    # MI300X 192 GB: AMD Instinct MI300X data sheet (5.3 TB/s; 1,307.4, 2,614.9, 2,614.9 dense).
    Device(
        name="mi300x",
        bandwidth=5.3 * TERA,
        rates={"bf16": 1307.4 * TERA, "int8": 2614.9 * TERA, "fp8": 2614.9 * TERA},
    ),
    # Ascend 910B: Huawei publishes no sheet for the single chip and second-hand figures differ by variant (256-376
    # TFLOPS, 0.4-1.6 TB/s). Taken: 320 TFLOPS FP16, 640 TOPS INT8 and 1.2 TB/s, which are quoted most.
    Device(
        name="ascend-910b",
        bandwidth=1.2 * TERA,
        rates={"bf16": 320 * TERA, "int8": 640 * TERA},
        missing={"fp8": "ascend-910b has no FP8 units; INT8 is its fast path"},
    ),
)

DEVICES: dict[str, Device] = {device.name: device for device in _TABLE}


def compute_precision(scheme: Scheme) -> str:
    """The precision of the matmul: that of the activations ("int8", "fp8"), bf16 where those stay unquantised."""
    return "bf16" if scheme.activation is None else scheme.activation.split("-")[0]


class RooflineTarget:
    """A device of the table; see the module's docstring for the model."""

    def __init__(self, device: Device) -> None:
        self._device = device

    @property
    def name(self) -> str:
        """The device's name."""
        return self._device.name

    @property
    def device(self) -> str:
        """The device's name, marked."""
        return f"{self._device.name} (modelled by its roofline)"

    @property
    def origin(self) -> Origin:
        """All times are modelled."""
        return "modelled"

    @property
    def baseline(self) -> str:
        """All layers as they are."""
        return "the same device, unquantised: every layer bfloat16"

    @property
    def schemes(self) -> tuple[str, ...]:
        """All families that need no zero points."""
        return ("fp8", "int8", "int4")

    def require(self) -> None:
        """A model needs nothing."""

    def products(self, scheme: Scheme, widths: tuple[int, ...]) -> tuple[int, ...]:
        """Each layer runs by itself."""
        return widths

    def supports(self, scheme: Scheme, n: int, k: int) -> str | None:
        """None if the device has units for the scheme's compute precision and K fits."""
        if per_block(scheme):
            return f"{scheme.name}: inputs are rounded block by block in onnxruntime on CPUs alone"
        precision = compute_precision(scheme)
        if precision not in self._device.rates:
            missing = self._device.missing.get(precision, f"{self._device.name} has no {precision} units")
            return f"{scheme.name}: {missing}"
        return unfit(scheme, k)

    def microseconds(self, scheme: Scheme, n: int, k: int, m: int) -> float:
        """Modelled time of x[m, k] @ w[n, k]^T in a supported `scheme`."""
        device, quantised = self._device, scheme.activation is not None
        input_bytes = m * k * (1 if quantised else BF16_BYTES)
        moved = weight_bytes(scheme, n, k) + input_bytes + BF16_BYTES * m * n
        compute = 2.0 * m * n * k / device.rates[compute_precision(scheme)]
        quantise = m * k * (BF16_BYTES + 1) / device.bandwidth if quantised else 0.0
        return (max(moved / device.bandwidth, compute) + quantise) * 1e6

    def dense_bytes(self, own: int) -> int:
        """What the model stores."""
        return own

    def time(
        self,
        shapes: Sequence[tuple[int, int]],
        schemes: Sequence[Scheme],
        ms: Sequence[int],
        progress: Progress | None = None,
    ) -> list[CostSample]:
        """See `lowprec.targets.base.Target.time`; the three percentiles are equal, a model has no spread."""
        samples: list[CostSample] = []
        total, done = len(shapes) * len(ms), 0
        for n, k in shapes:
            for m in ms:
                for scheme in schemes:
                    if self.supports(scheme, n, k) is not None:
                        continue
                    us = self.microseconds(resolve(scheme, k), n, k, m)
                    samples.append(
                        CostSample(
                            op="linear",
                            m=m,
                            n=n,
                            k=k,
                            scheme=scheme.name,
                            kernel="roofline",
                            p20_us=us,
                            p50_us=us,
                            p80_us=us,
                            bytes=weight_bytes(scheme, n, k),
                            origin="modelled",
                        )
                    )
                done += 1
                if progress is not None:
                    progress(done, total)
        return samples

    def keeps(self, fmt: str) -> str | None:
        """None if the device can convert what is kept."""
        precision = fmt.rpartition("-")[2]
        return None if precision in self._device.rates else self._device.missing[precision]

    @property
    def offered_cache(self) -> None:
        """It is asked for: see `lowprec.settings.Settings`."""
        return

    def fits(self, module: nn.Module, places: Sequence[CachePlace]) -> None:
        """Every cache that transformers makes of keys and values of all tokens."""
        return

    def time_cache(
        self, place: CachePlace, formats: Sequence[str | None], batch: int, added: int, held: int
    ) -> list[CostSample]:
        """See `lowprec.targets.base.CacheTarget.time_cache`."""
        samples = []
        for fmt in formats:
            size = batch * (held + added) * token_bytes(fmt, place.heads, place.width)
            us = size / self._device.bandwidth * 1e6
            timing = Timing(p20_us=us, p50_us=us, p80_us=us, runs=0)
            samples.append(cache_sample(fmt, place, batch, added, held, "roofline", timing, "modelled"))
        return samples


def device_target(name: str) -> RooflineTarget:
    """The model of the device called `name`; ConfigError with its neighbours when there is none."""
    if name not in DEVICES:
        raise ConfigError(f"unknown device {name!r}: {closest(name, list(DEVICES))}")
    return RooflineTarget(DEVICES[name])
