"""The onnxruntime target: plans for, times, writes and runs models in onnxruntime on this CPU.

What each scheme is computed by is `lowprec.onnx.forms`. Layers that share an input and a scheme are timed as one
product, as they are written. Packages of the extra `onnx` are imported when they are needed.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowprec.formats import QuantizedWeight, resolve
from lowprec.onnx import RUNTIME_NEEDED, export_onnx, require_extra
from lowprec.records import ArtefactForm, CachePlace, CostSample, Deployed, Scheme
from lowprec.targets.base import BF16_BYTES, TARGETS, cache_sample, unfit, weight_bytes
from lowprec.targets.measured import MeasuredTarget
from lowprec_kernels.timing import Timing

if TYPE_CHECKING:
    from lowprec.onnx.folder import OnnxArtefact

FLOAT = "MatMul"
ATTENTION = "GroupQueryAttention"


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
        return ("int8", "int4", "int4-two-level", "w4a8-block-g32")

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

    def loaded_bytes(self, scheme: Scheme, n: int, k: int) -> int:
        """See `MeasuredTarget.loaded_bytes`; what has a form for few rows and one for many is there twice."""
        from lowprec.onnx.forms import forms_of

        return sum(weight_bytes(form, n, k) for form in forms_of(resolve(scheme, k)))

    def timings(
        self, n: int, k: int, schemes: Sequence[Scheme], ms: Sequence[int]
    ) -> Mapping[tuple[str, int], tuple[str, Timing]]:
        """See `MeasuredTarget.timings`."""
        from lowprec.onnx.forms import product_for
        from lowprec.onnx.layers import Product, time_products

        candidates: dict[str, tuple[Product, str] | None] = {}
        kernels: dict[tuple[str, int], str] = {}
        for scheme, m in itertools.product(schemes, ms):
            settled = resolve(scheme, k)
            kernel, made = (FLOAT, None) if settled.weight is None else product_for(settled, m)
            kernels[scheme.name, m], candidates[f"{scheme.name} {kernel}"] = kernel, made
        timed = time_products(candidates, n, k, ms, torch.get_num_threads(), self.seconds_per_sample)
        return {(name, m): (kernel, timed[f"{name} {kernel}", m]) for (name, m), kernel in kernels.items()}

    @property
    def offered_cache(self) -> str:
        """INT8 by channel, which its attention computes with."""
        from lowprec.onnx.coded_cache import FORMAT

        return FORMAT

    def fits(self, module: nn.Module, places: Sequence[CachePlace]) -> str | None:
        """None where its attention takes heads like these, and the place of the model's own."""
        from lowprec.onnx.coded_cache import refuses_heads
        from lowprec.onnx.twin import plain_attention

        return refuses_heads(places) or plain_attention(module)

    def keeps(self, fmt: str) -> str | None:
        """None for that format."""
        return (
            None
            if fmt == self.offered_cache
            else f"its attention computes with {self.offered_cache}, which --kv-cache int8-channel asks for"
        )

    def time_cache(
        self, place: CachePlace, formats: Sequence[str | None], batch: int, added: int, held: int
    ) -> list[CostSample]:
        """See `lowprec.targets.base.CacheTarget.time_cache`; half of what attention takes is that of keys or values."""
        from lowprec.onnx.cache_times import time_attention

        coded, own = [fmt is not None for fmt in formats], self.dense_bytes(BF16_BYTES)
        found = time_attention(place, coded, batch, added, held, torch.get_num_threads(), self.seconds_per_sample)
        return [
            cache_sample(fmt, place, batch, added, held, ATTENTION, found[fmt is not None].per(2), "measured", own)
            for fmt in formats
        ]

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
