"""The OpenVINO target: plans for, times, writes and runs models in OpenVINO on this CPU.

What each scheme is computed by is `lowprec.openvino.layers`. Packages of the extra `openvino` are imported when they
are needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowprec.errors import ConfigError
from lowprec.formats import QuantizedWeight, resolve
from lowprec.formats.schemes import BLOCK, FIXED_BLOCK
from lowprec.onnx import require_extra as require_onnx
from lowprec.openvino import require_extra
from lowprec.records import ArtefactForm, Deployed, Scheme
from lowprec.targets.base import TARGETS, unfit
from lowprec.targets.exporting import EXPORTERS, Exporter, Request
from lowprec.targets.measured import MeasuredTarget
from lowprec_kernels.timing import Timing

if TYPE_CHECKING:
    from lowprec.onnx.folder import OnnxArtefact

KERNEL = "FullyConnected"


class OpenVinoTarget(MeasuredTarget):
    """OpenVINO on this machine's CPU."""

    name = "openvino"

    @property
    def form(self) -> ArtefactForm:
        """What it loads."""
        return "openvino"

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

    def timings(
        self, n: int, k: int, schemes: Sequence[Scheme], ms: Sequence[int]
    ) -> Mapping[tuple[str, int], tuple[str, Timing]]:
        """See `MeasuredTarget.timings`."""
        from lowprec.onnx.layers import time_products
        from lowprec.openvino.layers import bound, open_layers, product

        weights = {scheme.name: resolve(scheme, k).weight for scheme in schemes}
        candidates = {name: None if weight is None else (product, weight) for name, weight in weights.items()}
        threads = torch.get_num_threads()
        found = time_products(candidates, n, k, ms, threads, self.seconds_per_sample, opened=open_layers, bound=bound)
        return {key: (KERNEL, timing) for key, timing in found.items()}

    def multiplied(self, scheme: Scheme, weight: QuantizedWeight, x: Tensor) -> Tensor:
        """See `MeasuredTarget.multiplied`."""
        from lowprec.openvino.layers import run_layer

        return run_layer(weight, x)

    def deploy(self, artefact: Path, out: Path) -> Deployed:
        """See `lowprec.targets.base.RuntimeTarget.deploy`."""
        from lowprec.openvino.deploy import deploy

        return deploy(artefact, out)

    def deploy_unquantised(self, module: nn.Module, out: Path) -> Deployed:
        """See `lowprec.targets.base.RuntimeTarget.deploy_unquantised`."""
        from lowprec.openvino.deploy import deploy_unquantised

        return deploy_unquantised(module, out)

    def load(self, path: Path, room: int) -> Any:
        """See `lowprec.targets.base.RuntimeTarget.load`."""
        from lowprec.openvino.module import OpenVinoModule

        return OpenVinoModule(path, threads=torch.get_num_threads())


def write(request: Request) -> "OnnxArtefact":
    """An artefact of a run for OpenVINO, checked by running it: see `lowprec.openvino.deploy`."""
    OpenVinoTarget().require()
    if request.module is not None or request.inputs is not None:
        raise ConfigError("the target openvino takes whole models of transformers: give neither a module nor inputs")
    from lowprec.openvino.deploy import export

    return export(request.source, request.out)


TARGETS.register("openvino", OpenVinoTarget())
EXPORTERS.register("openvino", Exporter(name="openvino", forms=("planned",), write=write))
