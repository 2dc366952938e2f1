"""FP8 E4M3 (OCP 8-bit floating point, revision 1.0: 4 exponent bits, 3 mantissa bits, largest value 448, no infinity).

    weights      codes = e4m3(w / s_n), s_n = max |w_n| / 448 (per channel)
    activations  codes = e4m3(x / s_t), s_t = max |x_t| / 448 (per token), or one calibrated scale (static)

Values beyond 448 saturate, as the hardware's conversion does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.errors import ConfigError
from lowprec.formats.base import ACTIVATION_FORMATS, WEIGHT_FORMATS, QuantizedWeight, as_bfloat16
from lowprec.formats.integer import TINY, token_scale

LARGEST = 448.0


def to_grid(x: Tensor) -> Tensor:
    """Nearest E4M3 value, as float32; saturates."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """Per-channel E4M3 weights; see `lowprec.formats.base.WeightFormat`."""

    name: str = "fp8"
    bits: int = 8
    group_size: int | None = None
    code_dtype: torch.dtype = torch.float8_e4m3fn
    tolerance: float = 1e-2
    symmetric: bool = True

    def fits(self, k: int) -> str | None:
        """Any K fits."""
        return None

    def fit_scale(self, slab: Tensor, importance: Tensor | None = None) -> Tensor:
        """[..., g] -> [..., 1]: a floating grid gains nothing from clipping, so `importance` is not used."""
        return as_bfloat16(slab.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(TINY)

    def store_scales(self, scale: Tensor) -> Tensor:
        """[N, groups] -> their bfloat16 values."""
        return as_bfloat16(scale)

    def fit_lowest(self, slab: Tensor, scale: Tensor, importance: Tensor | None = None) -> None:
        """The grid is symmetric."""
        return

    def round(self, w: Tensor, scale: Tensor, lowest: Tensor | None = None) -> Tensor:
        """Nearest E4M3 value, as float32."""
        return to_grid(w / scale)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """[N, K] codes and [N, 1] scales -> [N, K] float32."""
        return codes.to(torch.float32) * scale

    def bytes_per_row(self, k: int) -> float:
        """Codes plus one bfloat16 scale."""
        return k + 2.0

    def refuses(self, weight: QuantizedWeight) -> str | None:
        """Why codes and scales are none of this format, None if they are."""
        return "has codes that are NaN" if bool(torch.isnan(weight.codes.to(torch.float32)).any()) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Activation:
    """E4M3 activations; see `lowprec.formats.base.ActivationFormat`."""

    name: str
    dynamic: bool
    bits: int = 8

    def fake_quantize(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Rounds each token (dynamic) or the whole tensor by `scale` (static) to E4M3."""
        if self.dynamic:
            scale = token_scale(x, LARGEST)
        elif scale is None:
            raise ConfigError(f"{self.name} needs a calibrated scale; calibrate the layer first")
        scale = scale.clamp_min(TINY)
        # In float32 as the kernels: rounding to x's own dtype first would round twice.
        return (to_grid(x.to(torch.float32) / scale) * scale).to(x.dtype)


WEIGHT_FORMATS.register("fp8", Fp8Weight())
ACTIVATION_FORMATS.register("fp8-token", Fp8Activation(name="fp8-token", dynamic=True))
ACTIVATION_FORMATS.register("fp8-static", Fp8Activation(name="fp8-static", dynamic=False))
