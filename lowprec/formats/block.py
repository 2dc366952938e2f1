"""INT8 activations in blocks: each row of the input is cut into blocks of 128, 64 or 32 values with a scale each.

    codes = round(x * (127 / max |x_b|)),   x_b ~ codes * max |x_b| / 127        ties to even, no clipping needed

onnxruntime's MatMulNBits does this at accuracy level 4, with the block of its weights: a block whose largest value is
an outlier spoils its own values alone, where one scale for a token would spoil all. The factor is 127 / max, not the
reciprocal of the scale, as in MLAS: the two round differently in float32, and codes at a tie would differ. Where the
block does not divide K the last one is shorter.

Source: github.com/microsoft/onnxruntime, onnxruntime/core/mlas/lib/sqnbitgemm_kernel_avx512.cpp,
QuantizeARow_CompInt8_avx512 (the kernels for AVX2 and NEON have the same rule).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowprec.formats.base import ACTIVATION_FORMATS
from lowprec.formats.schemes import BLOCK, GROUP_SIZES

QMAX = 127.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockActivation:
    """INT8 activations by blocks; see `lowprec.formats.base.ActivationFormat`."""

    name: str
    block: int
    bits: int = 8
    dynamic: bool = True

    def fake_quantize(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Rounds each block of each row to 255 levels."""
        k = x.shape[-1]
        padded = pad(x.to(torch.float32), (0, -k % self.block))
        blocks = padded.view(*padded.shape[:-1], -1, self.block)
        largest = blocks.abs().amax(-1, keepdim=True)
        # A block of zeros has no scale; one that is not finite stays so, and shows.
        factor = torch.where(largest == 0, 0.0, QMAX / largest)
        rounded = (blocks * factor).round() * (largest / QMAX)
        return rounded.flatten(-2)[..., :k].to(x.dtype)


for _size in GROUP_SIZES:
    ACTIVATION_FORMATS.register(f"int8{BLOCK}{_size}", BlockActivation(name=f"int8{BLOCK}{_size}", block=_size))
