"""INT8: weights per channel, activations per token (dynamic) or per tensor (static).

    weights      codes = clamp(round(w / s_n), -127, 127), s_n = max |w_n| / 127
    activations  codes = clamp(round(x / s_t), -127, 127), s_t = max |x_t| / 127

LLM.int8 (arXiv 2208.07339, eq. 3) calls this vector-wise quantisation. -128 stays unused, so both signs clip alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.errors import ConfigError
from lowprec.formats.base import ACTIVATION_FORMATS, WEIGHT_FORMATS
from lowprec.formats.integer import TINY, SymmetricInteger, token_scale

QMAX = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Activation:
    """INT8 activations; see `lowprec.formats.base.ActivationFormat`."""

    name: str
    dynamic: bool
    bits: int = 8

    def fake_quantize(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Rounds each token (dynamic) or the whole tensor by `scale` (static) to 255 levels."""
        if self.dynamic:
            scale = token_scale(x, QMAX)
        elif scale is None:
            raise ConfigError(f"{self.name} needs a calibrated scale; calibrate the layer first")
        scale = scale.clamp_min(TINY)
        # In float32 as the kernels: bfloat16 has too few digits to tell the codes above 64 apart before rounding.
        return (torch.clamp((x.to(torch.float32) / scale).round(), -QMAX, QMAX) * scale).to(x.dtype)


WEIGHT_FORMATS.register("int8", SymmetricInteger(name="int8", bits=8, group_size=None))
ACTIVATION_FORMATS.register("int8-token", Int8Activation(name="int8-token", dynamic=True))
ACTIVATION_FORMATS.register("int8-static", Int8Activation(name="int8-static", dynamic=False))
