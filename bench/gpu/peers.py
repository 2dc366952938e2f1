"""What the kernels are compared with: PyTorch's own matmuls, and other packages where they can be imported.

A peer builds its operands on the device (random, in its own layout) and gives a launch for each of several copies.
Activations are quantised beforehand, as they are for ours; `int_mm` is PyTorch's bare product, `int_mm+scales` the same
with the scales put on by PyTorch, one operation after the other.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.candidates import Case
from bench.gpu.clock import Launch, copies_for
from bench.gpu.setting import Setting

GROUP = 128
NF4_BLOCK = 64
INNER_TILES = 8
Built = tuple[int, Callable[[Tensor], Launch]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A matmul of others.

    Attributes:
        name: in the results.
        bytes_per_weight: stored, with scales.
        rate: the precision that its matrix units compute in.
        build: (n, k, copies, setting) -> x [M, K] -> launch.
        refuses: (case) -> why it cannot run there, or None.
        package: that must be importable.
        apart: measured in a comparison of its own, since its first call may take long.
    """

    name: str
    bytes_per_weight: float
    rate: str
    build: Callable[[int, int, int, Setting], Callable[[Tensor], Launch]]
    refuses: Callable[[Case], str | None] = lambda case: None
    package: str = ""
    apart: bool = False

    def missing(self) -> str | None:
        """Why it is not measured here at all."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return "not measured: not installed"
        return None

    def copies(self, case: Case, setting: Setting) -> int:
        """Copies of its weights that make them cold."""
        return copies_for(self.bytes_per_weight * case.n * case.k, setting.rotate_bytes)


def _randn(setting: Setting, *shape: int) -> Tensor:
    return torch.randn(*shape, device=setting.device, dtype=setting.dtype)


def _bf16(n: int, k: int, copies: int, setting: Setting) -> Callable[[Tensor], Launch]:
    weights = [_randn(setting, n, k) for _ in range(copies)]
    return lambda x: lambda copy: F.linear(x, weights[copy])


def _fp8(x: Tensor) -> Tensor:
    return (x * 64).clamp(-448, 448).to(torch.float8_e4m3fn)


def _scaled_mm(rowwise: bool, fast: bool) -> Callable[[int, int, int, Setting], Callable[[Tensor], Launch]]:
    def build(n: int, k: int, copies: int, setting: Setting) -> Callable[[Tensor], Launch]:
        weights = [_fp8(_randn(setting, n, k)) for _ in range(copies)]
        w_scale = torch.full((1, n) if rowwise else (), 0.01, device=setting.device)

        def bound(x: Tensor) -> Launch:
            codes = _fp8(x)
            x_scale = torch.full((len(x), 1) if rowwise else (), 0.01, device=setting.device)
            return lambda copy: torch._scaled_mm(
                codes, weights[copy].t(), x_scale, w_scale, out_dtype=setting.dtype, use_fast_accum=fast
            )

        return bound

    return build


def _scaled_mm_refuses(case: Case) -> str | None:
    return None if case.n % 16 == 0 and case.k % 16 == 0 else "N and K must be multiples of 16"


def _int_mm(scales: bool) -> Callable[[int, int, int, Setting], Callable[[Tensor], Launch]]:
    def build(n: int, k: int, copies: int, setting: Setting) -> Callable[[Tensor], Launch]:
        weights = [torch.randint(-127, 128, (n, k), device=setting.device, dtype=torch.int8) for _ in range(copies)]
        w_scale = torch.rand(1, n, device=setting.device)

        def bound(x: Tensor) -> Launch:
            codes, x_scale = torch.clamp(x * 40, -127, 127).to(torch.int8), torch.rand(len(x), 1, device=x.device)

            def bare(copy: int) -> Tensor:
                return torch._int_mm(codes, weights[copy].t())

            return (lambda copy: (bare(copy) * x_scale * w_scale).to(setting.dtype)) if scales else bare

        return bound

    return build


def _int_mm_refuses(case: Case) -> str | None:
    return None if case.m > 16 and case.n % 8 == 0 and case.k % 8 == 0 else "needs M above 16"


def _tinygemm(n: int, k: int, copies: int, setting: Setting) -> Callable[[Tensor], Launch]:
    weights = []
    for _ in range(copies):
        codes = torch.randint(0, 256, (n, k // 2), device=setting.device, dtype=torch.uint8)
        weights.append(torch.ops.aten._convert_weight_to_int4pack(codes, INNER_TILES))
    scales = _randn(setting, k // GROUP, n, 2).to(torch.bfloat16)
    return lambda x: lambda copy: torch.ops.aten._weight_int4pack_mm(x.to(torch.bfloat16), weights[copy], GROUP, scales)


def _gemlite(n: int, k: int, copies: int, setting: Setting) -> Callable[[Tensor], Launch]:
    from gemlite.helper import A16W4_HQQ_INT

    # The configurations that it ships for this device are for float16.
    half = torch.float16
    maker = A16W4_HQQ_INT(device=setting.device, dtype=half)
    layers = []
    for _ in range(copies):
        codes = torch.randint(0, 16, (n, k), device=setting.device, dtype=torch.uint8)
        scale = torch.rand(n * k // GROUP, 1, device=setting.device, dtype=half) / 64
        layers.append(maker.from_weights(codes, scale, torch.full_like(scale, 8)))

    def bound(x: Tensor) -> Launch:
        narrow = x.to(half)
        return lambda copy: layers[copy](narrow)

    return bound


def _bitsandbytes(n: int, k: int, copies: int, setting: Setting) -> Callable[[Tensor], Launch]:
    import bitsandbytes as bnb

    weights = [
        bnb.functional.quantize_4bit(_randn(setting, n, k), blocksize=NF4_BLOCK, quant_type="nf4")
        for _ in range(copies)
    ]
    return lambda x: lambda copy: bnb.matmul_4bit(x, weights[copy][0].t(), weights[copy][1])


PEERS = (
    Peer(name="torch bf16", bytes_per_weight=2, rate="bf16", build=_bf16),
    *(
        Peer(
            name=f"torch scaled_mm {'row' if rowwise else 'tensor'}{' fast' if fast else ''}",
            bytes_per_weight=1,
            rate="fp8",
            build=_scaled_mm(rowwise, fast),
            refuses=_scaled_mm_refuses,
        )
        for rowwise in (True, False)
        for fast in (False, True)
    ),
    Peer(name="torch int_mm", bytes_per_weight=1, rate="int8", build=_int_mm(False), refuses=_int_mm_refuses),
    Peer(name="torch int_mm+scales", bytes_per_weight=1, rate="int8", build=_int_mm(True), refuses=_int_mm_refuses),
    Peer(
        name="torch tinygemm w4a16-g128",
        bytes_per_weight=0.5 + 4 / GROUP,
        rate="bf16",
        build=_tinygemm,
        refuses=lambda case: None if case.m <= 512 else "takes far longer than a plain matmul with many rows",
    ),
    Peer(
        name="gemlite w4a16-g128",
        bytes_per_weight=0.5 + 4 / GROUP,
        rate="bf16",
        build=_gemlite,
        package="gemlite",
        apart=True,
    ),
    Peer(
        name="bitsandbytes nf4-g64",
        bytes_per_weight=0.5 + 4 / NF4_BLOCK,
        rate="bf16",
        build=_bitsandbytes,
        package="bitsandbytes",
        apart=True,
    ),
)
BASELINE = PEERS[0]
