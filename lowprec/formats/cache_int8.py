"""INT8 keys and values: a scale for each head of each token, in bfloat16.

    codes = clamp(round(x / s_th), -127, 127),   s_th = max |x_th| / 127 as bfloat16     (t a token, th its head)

Of a head of D values 8 + 16 / D bits a value are stored: D + 2 bytes instead of 2 D, 0.516 of bfloat16's at D = 64 and
0.508 at D = 128. The scale is rounded before codes are chosen, so half a bfloat16 step at most is clipped. Keys are
rounded as they are stored, after rotary embedding.

LLM.int8 (arXiv 2208.07339, eq. 3) calls this vector-wise; vLLM has the same grid, with scales in float32, as its cache
type "int8_per_token_head". A channel of keys that is always large (KIVI, arXiv 2402.02750, section 3) takes steps away
from the others of its token: the loss is measured, layer by layer, keys apart from values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.formats.base import CACHE_FORMATS, SCALE_DTYPE, CacheScale
from lowprec.formats.int8 import QMAX
from lowprec.formats.integer import token_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Cache:
    """INT8 keys or values; see `lowprec.formats.base.CacheFormat`."""

    name: str = "kv8-int8"
    bits: int = 8
    largest: float | None = None
    by_channel: bool = False

    def encode(self, x: Tensor, scale: CacheScale | None = None) -> tuple[Tensor, Tensor]:
        """x [..., T, D] -> int8 codes of its shape, bfloat16 scales [..., T, 1]."""
        scales = token_scale(x, QMAX).to(SCALE_DTYPE)
        # In float32: bfloat16 has too few digits to tell the codes above 64 apart before rounding.
        codes = (x.to(torch.float32) / scales.to(torch.float32)).round_().clamp_(-QMAX, QMAX)
        return codes.to(torch.int8), scales

    def decode(self, codes: Tensor, scales: Tensor | CacheScale | None, dtype: torch.dtype) -> Tensor:
        """Codes times scales."""
        assert isinstance(scales, Tensor)
        # Both are bfloat16 values, whose product has 16 bits at most: it is rounded once, here or there, and half the
        # memory passes where it is multiplied in bfloat16.
        held = dtype if dtype == SCALE_DTYPE else torch.float32
        return (codes.to(held) * scales.to(held)).to(dtype)

    def bytes_per_token(self, heads: int, width: int) -> float:
        """A byte a value, a bfloat16 scale a head."""
        return heads * (width + SCALE_DTYPE.itemsize)


CACHE_FORMATS.register("kv8-int8", Int8Cache())
