"""The onnxruntime target: plans for, times, writes and runs models in onnxruntime on this CPU.

What each scheme is computed by is `lowprec.onnx.forms`. Layers that share an input and a scheme are timed as one
product, as they are written. Packages of the extra `onnx` are imported when they are needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowprec.formats import QuantizedWeight, resolve
from lowprec.onnx import RUNTIME_NEEDED, export_onnx, require_extra
from lowprec.records import ArtefactForm, Deployed, Scheme
from lowprec.targets.base import TARGETS, unfit
from lowprec.targets.measured import MeasuredTarget
from lowprec_kernels.timing import Timing

if TYPE_CHECKING:
    from lowprec.onnx.folder import OnnxArtefact

FLOAT = "MatMul"


class OnnxRuntimeTarget(MeasuredTarget):
    """onnxruntime on this machine's CPU."""

    name = "onnxruntime"

    @property
    def form(self) -> ArtefactForm:
        """What it loads."""
        return "onnxruntime"

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

    def timings(
        self, n: int, k: int, schemes: Sequence[Scheme], ms: Sequence[int]
    ) -> tuple[Mapping[str, str], Mapping[tuple[str, int], Timing]]:
        """See `MeasuredTarget.timings`."""
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
        return kernels, time_products(candidates, n, k, ms, torch.get_num_threads(), self.seconds_per_sample)

    def multiplied(self, scheme: Scheme, weight: QuantizedWeight, x: Tensor) -> Tensor:
        """See `MeasuredTarget.multiplied`."""
        from lowprec.onnx.forms import product_of
        from lowprec.onnx.layers import run_layer

        return run_layer(product_of(scheme)[1], weight, x)

    def deploy(self, artefact: Path, out: Path) -> Deployed:
        """See `lowprec.targets.base.RuntimeTarget.deploy`."""
        return _deployed(export_onnx(artefact, out, target=self.name))

    def deploy_unquantised(self, module: nn.Module, out: Path) -> Deployed:
        """See `lowprec.targets.base.RuntimeTarget.deploy_unquantised`."""
        from lowprec.onnx.folder import write_unquantised

        return _deployed(write_unquantised(module, out))

    def load(self, path: Path, room: int) -> Any:
        """See `lowprec.targets.base.RuntimeTarget.load`."""
        from lowprec.onnx.module import OnnxModule

        return OnnxModule(path, threads=torch.get_num_threads(), room=room)


def _deployed(written: "OnnxArtefact") -> Deployed:
    return Deployed(weight_bytes=written.bytes, notes=written.notes, digest=written.digest)


TARGETS.register("onnxruntime", OnnxRuntimeTarget())
