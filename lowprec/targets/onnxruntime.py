"""The onnxruntime target: plans for, times, writes and runs models in onnxruntime on this CPU.

What each scheme is computed by is `lowprec.onnx.forms`; all are timed as they will run, inputs rounded inside, layers
that share an input and a scheme as one product, as they are written. The baseline is the same graph in float32. Threads
are as many as torch has. Packages of the extra `onnx` are imported when they are needed.
"""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowprec.formats import ACTIVATION_FORMATS, QuantizedWeight, resolve
from lowprec.onnx import RUNTIME_NEEDED, export_onnx, require_extra
from lowprec.records import ArtefactForm, CostSample, Deployed, Origin, Scheme
from lowprec.targets.base import TARGETS, Progress, installed, unfit, weight_bytes

if TYPE_CHECKING:
    from lowprec.onnx.folder import OnnxArtefact

FLOAT = "MatMul"


class OnnxRuntimeTarget:
    """onnxruntime on this machine's CPU.

    Args:
        seconds_per_sample: time spent on each candidate, on average.
    """

    def __init__(self, seconds_per_sample: float = 0.15) -> None:
        self.seconds_per_sample = seconds_per_sample

    @property
    def name(self) -> str:
        """Name that plans use."""
        return "onnxruntime"

    @property
    def form(self) -> ArtefactForm:
        """What it loads."""
        return "onnxruntime"

    @property
    def device(self) -> str:
        """Version, processor and threads."""
        version, threads = installed("onnxruntime"), torch.get_num_threads()
        capability = torch.backends.cpu.get_cpu_capability()
        return f"cpu (onnxruntime {version}, {platform.machine()}, {capability}, {threads} threads)"

    @property
    def origin(self) -> Origin:
        """All times are measured."""
        return "measured"

    @property
    def baseline(self) -> str:
        """The graph without codes."""
        return "the same runtime, unquantised: the same graph in float32"

    @property
    def schemes(self) -> tuple[str, ...]:
        """What it computes without zero points, and the finest blocks besides the longest that fit."""
        return ("int8", "int4", "w4a8-block-g32")

    def require(self) -> None:
        """Raises ConfigError, with the remedy, when packages of the extra `onnx` are missing or too old."""
        require_extra(RUNTIME_NEEDED)

    def supports(self, scheme: Scheme, n: int, k: int) -> str | None:
        """None if one of onnxruntime's operators computes it."""
        reason = unfit(scheme, k)
        if reason is not None:
            return reason
        from lowprec.onnx.forms import refuses

        return refuses(resolve(scheme, k))

    def products(self, scheme: Scheme, widths: tuple[int, ...]) -> tuple[int, ...]:
        """All rows of a quantised group are one product."""
        return widths if scheme.weight is None else (sum(widths),)

    def dense_bytes(self, own: int) -> int:
        """Float32 is what it computes in."""
        return 4

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
            samples += self._timed(n, k, [s for s in schemes if self.supports(s, n, k) is None], ms)
            for number in range(len(ms)):
                if progress is not None:
                    progress(done * len(ms) + number + 1, len(shapes) * len(ms))
        return samples

    def _timed(self, n: int, k: int, schemes: Sequence[Scheme], ms: Sequence[int]) -> list[CostSample]:
        from lowprec.onnx.forms import product_of
        from lowprec.onnx.layers import Product, time_products

        kernels: dict[str, str] = {}
        candidates: dict[str, tuple[Product, str] | None] = {}
        for scheme in schemes:
            settled = resolve(scheme, k)
            kernels[scheme.name], candidates[scheme.name] = FLOAT, None
            if settled.weight is not None:
                kernels[scheme.name], product = product_of(settled)
                candidates[scheme.name] = product, settled.weight
        found = time_products(candidates, n, k, ms, torch.get_num_threads(), self.seconds_per_sample)
        return [
            CostSample(
                op="linear",
                m=m,
                n=n,
                k=k,
                scheme=scheme.name,
                kernel=kernels[scheme.name],
                p20_us=found[scheme.name, m].p20_us,
                p50_us=found[scheme.name, m].p50_us,
                p80_us=found[scheme.name, m].p80_us,
                bytes=weight_bytes(scheme, n, k),
                origin="measured",
            )
            for m in ms
            for scheme in schemes
        ]

    def deploy(self, artefact: Path, out: Path) -> Deployed:
        """See `lowprec.targets.base.RuntimeTarget.deploy`."""
        return _deployed(export_onnx(artefact, out, target=self.name))

    def deploy_unquantised(self, module: nn.Module, out: Path) -> Deployed:
        """See `lowprec.targets.base.RuntimeTarget.deploy_unquantised`."""
        from lowprec.onnx.folder import write_unquantised

        return _deployed(write_unquantised(module, out))

    def layer_error(self, scheme: Scheme, weight: QuantizedWeight, x: Tensor) -> float:
        """See `lowprec.targets.base.RuntimeTarget.layer_error`."""
        from lowprec.onnx.forms import product_of
        from lowprec.onnx.layers import run_layer

        y = run_layer(product_of(scheme)[1], weight, x).double()
        rounded = x if scheme.activation is None else ACTIVATION_FORMATS[scheme.activation].fake_quantize(x)
        truth = rounded.double() @ weight.dequantize().double().T
        return float((y - truth).norm() / truth.norm().clamp_min(1e-30))

    def load(self, path: Path, room: int) -> Any:
        """See `lowprec.targets.base.RuntimeTarget.load`."""
        from lowprec.onnx.module import OnnxModule

        return OnnxModule(path, threads=torch.get_num_threads(), room=room)


def _deployed(written: "OnnxArtefact") -> Deployed:
    return Deployed(weight_bytes=written.bytes, notes=written.notes, digest=written.digest)


TARGETS.register("onnxruntime", OnnxRuntimeTarget())
