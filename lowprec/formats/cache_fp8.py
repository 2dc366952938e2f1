"""FP8 E4M3 keys and values with one calibrated scale for a layer's keys and one for its values.

    codes = e4m3(x / s),   s = HEADROOM max |x| / 448 over the calibration text

A byte a value: half of bfloat16's, for heads of any width. It is the one form that compressed-tensors' checkpoints can
say (`kv_cache_scheme`, static, per tensor) and that vLLM computes in without being told more. A float's relative step
is the same all over its range, so the headroom for larger values than calibration saw costs nothing but at the lower
end; beyond it values saturate, as the hardware's conversion does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.errors import ConfigError
from lowprec.formats.base import CACHE_FORMATS, SCALE_DTYPE, CacheScale
from lowprec.formats.fp8 import LARGEST, to_grid

HEADROOM = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Cache:
    """FP8 keys or values; see `lowprec.formats.base.CacheFormat`."""

    name: str = "kv8-fp8"
    bits: int = 8
    largest: float | None = LARGEST / HEADROOM
    by_channel: bool = False

    def encode(self, x: Tensor, scale: CacheScale | None = None) -> tuple[Tensor, None]:
        """x [..., T, D] -> float8_e4m3fn codes of its shape.

        Raises:
            ConfigError: no scale.
        """
        if not isinstance(scale, float):
            raise ConfigError(f"{self.name} needs a calibrated scale for each layer's keys and values")
        return to_grid(x.to(torch.float32) / scale).to(torch.float8_e4m3fn), None

    def decode(self, codes: Tensor, scales: Tensor | CacheScale | None, dtype: torch.dtype) -> Tensor:
        """Codes times the scale."""
        assert isinstance(scales, float)
        # A code has 4 bits and the scale 8, so that their product is exact in float32, which bfloat16 multiplies in.
        held = dtype if dtype == SCALE_DTYPE else torch.float32
        return (codes.to(held) * scales).to(dtype)

    def bytes_per_token(self, heads: int, width: int) -> float:
        """A byte a value."""
        return float(heads * width)


CACHE_FORMATS.register("kv8-fp8", Fp8Cache())
