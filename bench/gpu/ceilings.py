"""What the device does at best, measured: the rates that times are held against.

copy     bytes read and written per second, device to device
read     bytes read per second, by a reduction
bf16     2 n^3 operations per second of a square matmul, random operands (zeros run faster)
fp8      the same, torch._scaled_mm with one scale per tensor and fast accumulation
int8     the same, torch._int_mm
"""

import torch

from bench.gpu import peers
from bench.gpu.clock import Clock, Launch
from bench.gpu.journal import Item, Row
from bench.gpu.setting import Setting
from lowprec_kernels.timing import Timing

TERA = 1e12
COPY_BYTES = 4 << 30


def _bytes(setting: Setting) -> int:
    return setting.rotate_bytes if setting.smoke else COPY_BYTES


def _copy(setting: Setting) -> tuple[Launch, float]:
    source = torch.randint(-128, 128, (_bytes(setting),), dtype=torch.int8, device=setting.device)
    target = torch.empty_like(source)
    return lambda copy: target.copy_(source), 2.0 * source.numel()


def _read(setting: Setting) -> tuple[Launch, float]:
    source = torch.randn(_bytes(setting) // 4, device=setting.device)
    return lambda copy: source.sum(), 4.0 * source.numel()


def _square(setting: Setting, peer: str) -> tuple[Launch, float]:
    side = setting.square
    build = next(p for p in peers.PEERS if p.name == peer).build
    x = torch.randn(side, side, device=setting.device, dtype=setting.dtype)
    return build(side, side, 1, setting)(x), 2.0 * side**3


WORK = {
    "copy": (_copy, "TB/s"),
    "read": (_read, "TB/s"),
    "bf16": (lambda setting: _square(setting, "torch bf16"), "TFLOP/s"),
    "fp8": (lambda setting: _square(setting, "torch scaled_mm tensor fast"), "TFLOP/s"),
    "int8": (lambda setting: _square(setting, "torch int_mm"), "TFLOP/s"),
}


def _timed(name: str, setting: Setting) -> tuple[float, Timing]:
    """How much is done per launch, and its time."""
    launch, amount = WORK[name][0](setting)
    return amount, Clock(setting).interleaved({name: (launch, 1)}, sample_ms=60.0)[name]


def measured(name: str, setting: Setting) -> float:
    """The median rate, in TB/s or TFLOP/s."""
    amount, timing = _timed(name, setting)
    return amount / timing.p50_us * 1e6 / TERA


def _rows(name: str, setting: Setting) -> list[Row]:
    amount, timing = _timed(name, setting)
    rates = {f"p{100 - p}": amount / us * 1e6 / TERA for p, us in ((20, timing.p20_us), (80, timing.p80_us))}
    value = amount / timing.p50_us * 1e6 / TERA
    return [{"name": name, "unit": WORK[name][1], "value": value, **rates, "runs": timing.runs}]


def items(setting: Setting) -> list[Item]:
    """One for each rate."""
    return [Item(key=name, run=lambda notes, name=name: _rows(name, setting)) for name in WORK]
