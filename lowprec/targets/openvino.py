"""The OpenVINO target: plans for, times, writes and runs models in OpenVINO on this CPU.

What each scheme is computed by is `lowprec.openvino.layers`; all are timed as they will run, inputs rounded inside. The
baseline is the same graph in float32. Threads are as many as torch has. Packages of the extra `openvino` are imported
when they are needed.
"""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowprec.formats import ACTIVATION_FORMATS, QuantizedWeight, resolve
from lowprec.formats.schemes import BLOCK, FIXED_BLOCK
from lowprec.onnx import require_extra as require_onnx
from lowprec.openvino import require_extra
from lowprec.records import ArtefactForm, CostSample, Deployed, Origin, Scheme
from lowprec.targets.base import TARGETS, Progress, installed, unfit, weight_bytes
from lowprec.targets.exporting import EXPORTERS, Exporter, Request

if TYPE_CHECKING:
    from lowprec.onnx.folder import OnnxArtefact

KERNEL = "FullyConnected"


class OpenVinoTarget:
    """OpenVINO on this machine's CPU.

    Args:
        seconds_per_sample: time spent on each candidate, on average.
    """

    def __init__(self, seconds_per_sample: float = 0.15) -> None:
        self.seconds_per_sample = seconds_per_sample

    @property
    def name(self) -> str:
        """Name that plans use."""
        return "openvino"

    @property
    def form(self) -> ArtefactForm:
        """What it loads."""
        return "openvino"

    @property
    def device(self) -> str:
        """Version, processor and threads."""
        version, threads = installed("openvino"), torch.get_num_threads()
        capability = torch.backends.cpu.get_cpu_capability()
        return f"cpu (openvino {version}, {platform.machine()}, {capability}, {threads} threads)"

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
        """What it computes."""
        return (f"w8a8{BLOCK}{FIXED_BLOCK}", f"w4a8{BLOCK}{FIXED_BLOCK}")

    def require(self) -> None:
        """Raises ConfigError, with the remedy, when packages of the extra `openvino` are missing or too old."""
        require_extra()
        require_onnx()

    def supports(self, scheme: Scheme, n: int, k: int) -> str | None:
        """None if OpenVINO computes it as it is scored."""
        if (reason := unfit(scheme, k)) is not None:
            return reason
        if scheme.weight is not None and k % FIXED_BLOCK:
            return f"OpenVINO rounds inputs in blocks of {FIXED_BLOCK}, which do not divide {k}"
        from lowprec.openvino.layers import refuses

        return refuses(resolve(scheme, k))

    def products(self, scheme: Scheme, widths: tuple[int, ...]) -> tuple[int, ...]:
        """Each layer is a product of its own."""
        return widths

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
        from lowprec.onnx.layers import time_products
        from lowprec.openvino.layers import bound, open_layers, product

        weights = {scheme.name: resolve(scheme, k).weight for scheme in schemes}
        candidates = {name: None if weight is None else (product, weight) for name, weight in weights.items()}
        found = time_products(
            candidates, n, k, ms, torch.get_num_threads(), self.seconds_per_sample, opened=open_layers, bound=bound
        )
        return [
            CostSample(
                op="linear",
                m=m,
                n=n,
                k=k,
                scheme=scheme.name,
                kernel=KERNEL,
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
        from lowprec.openvino.deploy import deploy

        return deploy(artefact, out)

    def deploy_unquantised(self, module: nn.Module, out: Path) -> Deployed:
        """See `lowprec.targets.base.RuntimeTarget.deploy_unquantised`."""
        from lowprec.openvino.deploy import deploy_unquantised

        return deploy_unquantised(module, out)

    def layer_error(self, scheme: Scheme, weight: QuantizedWeight, x: Tensor) -> float:
        """See `lowprec.targets.base.RuntimeTarget.layer_error`."""
        from lowprec.openvino.layers import run_layer

        y = run_layer(weight, x).double()
        rounded = x if scheme.activation is None else ACTIVATION_FORMATS[scheme.activation].fake_quantize(x)
        truth = rounded.double() @ weight.dequantize().double().T
        return float((y - truth).norm() / truth.norm().clamp_min(1e-30))

    def load(self, path: Path, room: int) -> Any:
        """See `lowprec.targets.base.RuntimeTarget.load`."""
        from lowprec.openvino.module import OpenVinoModule

        return OpenVinoModule(path, threads=torch.get_num_threads())


def write(request: Request) -> "OnnxArtefact":
    """An artefact of a run for OpenVINO, checked by running it: see `lowprec.openvino.deploy`."""
    OpenVinoTarget().require()
    from lowprec.openvino.deploy import export

    return export(request.source, request.out)


TARGETS.register("openvino", OpenVinoTarget())
EXPORTERS.register("openvino", Exporter(name="openvino", forms=("planned",), write=write))
