"""What a number format is: a grid, and the three functions that every solver and runtime needs of it.

A weight matrix w[N, K] is stored as codes and, for each row and each group of `group_size` columns, one scale:

    w ~ scale * codes

All functions broadcast over leading dimensions; a *slab* is [..., g] with the last dimension sharing one scale.
Scales are rounded to bfloat16 before codes are chosen, because that is what a checkpoint stores: what is scored is
what is loaded.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowprec.registry import Registry

SCALE_DTYPE = torch.bfloat16
CacheScale = float | tuple[float, ...]
"""A calibrated scale: one number, or one for each channel of each head, H x D of them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """One layer's quantised weight.

    Attributes:
        format: name of the weight format.
        codes: [N, K], int8 (integer formats; 4-bit codes lie in [-8, 7], with a zero point taken off in [-15, 15]) or
            float8_e4m3fn.
        scale: [N, K / group_size], float32 holding bfloat16 values.
        exponents: [K] int8, what the columns were multiplied with before they were rounded, as powers of two, until
            the layer before divides by it (`lowprec.transforms`); None for nothing.
    """

    format: str
    codes: Tensor
    scale: Tensor
    exponents: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, [N, K] float32."""
        return self.with_scale(self.scale)

    def with_scale(self, scale: Tensor) -> Tensor:
        """The weight that the codes with another scale [N, K / group_size] stand for, [N, K] float32."""
        found = WEIGHT_FORMATS[self.format].decode(self.codes, scale)
        return found if self.exponents is None else found * torch.exp2(-self.exponents.float())


@runtime_checkable
class WeightFormat(Protocol):
    """A weight format. `group_size` None means one scale for the whole row (per channel)."""

    @property
    def name(self) -> str:
        """Name that plans and files use."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None for the whole row."""

    @property
    def symmetric(self) -> bool:
        """False when each slab has a zero point, which is stored with its scale."""

    @property
    def code_dtype(self) -> torch.dtype:
        """What codes are held in, in memory."""

    @property
    def tolerance(self) -> float:
        """Largest relative error (Frobenius) that a layer computed in this format may show against float64 over the
        same codes, scales and inputs: the rounding of a bfloat16 computation, not of the format itself."""

    def fits(self, k: int) -> str | None:
        """None if rows of `k` weights can be stored, else the reason."""

    def fit_scale(self, slab: Tensor, importance: Tensor | None = None) -> Tensor:
        """Scale of each slab: [..., g] -> [..., 1], float32 holding bfloat16 values.

        Args:
            slab: [..., g] weights that share a scale.
            importance: [g] or [..., g] non-negative weights of the squared error, None for plain absolute maximum.
        """

    def store_scales(self, scale: Tensor) -> Tensor:
        """[N, groups] float32, all scales of whole rows -> the nearest that can be stored, float32 of bfloat16."""

    def fit_lowest(self, slab: Tensor, scale: Tensor, importance: Tensor | None = None) -> Tensor | None:
        """Smallest code that each slab may have, [..., g] and its scales [..., 1] -> [..., 1] float32; None where that
        is the same for all slabs (symmetric formats)."""

    def round(self, w: Tensor, scale: Tensor, lowest: Tensor | None = None) -> Tensor:
        """Nearest code of each weight, as float32 (the code's value), same shape as `w`; the others broadcast."""

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """[N, K] codes and [N, groups] scales -> [N, K] float32 weights."""

    def bytes_per_row(self, k: int) -> float:
        """Stored bytes of a row of `k` weights, scales included."""

    def refuses(self, weight: QuantizedWeight) -> str | None:
        """Why codes and scales, of the right dtypes and shapes, are none of this format; None if they are."""


def held_bits(fmt: WeightFormat) -> Literal[4, 8]:
    """Bits of a code where there are only 4 and 8, as in kernels and in ONNX: those of 3 and 6 are some of them."""
    return 4 if fmt.bits <= 4 else 8


@runtime_checkable
class ActivationFormat(Protocol):
    """An activation format: what the input of a linear layer is rounded to while the model runs."""

    @property
    def name(self) -> str:
        """Name that plans and files use."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def dynamic(self) -> bool:
        """True when the scale comes from the values at hand, False when calibration set it."""

    def fake_quantize(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """[..., K] -> same shape and dtype, rounded to the grid; `scale` (scalar) is needed by static formats."""


@runtime_checkable
class CacheFormat(Protocol):
    """What keys or values are stored in between the steps of a decoder. They come as [..., T, D]: T tokens of a head of
    width D. A token is rounded when it is stored, once, and by itself: what it is decoded to depends neither on the
    tokens beside it nor on when they came."""

    @property
    def name(self) -> str:
        """Name that plans and files use."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def largest(self) -> float | None:
        """What the largest value that calibration saw becomes in codes, where scales are calibrated; None where each
        token's head has a scale of its own."""

    @property
    def by_channel(self) -> bool:
        """Whether there is a calibrated scale for each channel of each head, instead of one for a layer's keys and one
        for its values."""

    def encode(self, x: Tensor, scale: CacheScale | None = None) -> tuple[Tensor, Tensor | None]:
        """x [..., H, T, D] -> codes of its shape and scales [..., H, T, 1], None where `scale`, the calibrated one, is
        it; formats without a scale for each channel take any x [..., T, D]."""

    def decode(self, codes: Tensor, scales: Tensor | CacheScale | None, dtype: torch.dtype) -> Tensor:
        """The inverse but for the rounding, in `dtype`: what float32 gives, rounded once."""

    def bytes_per_token(self, heads: int, width: int) -> float:
        """Stored bytes of the keys, or of the values, of one token in a layer of `heads` heads, scales included."""


WEIGHT_FORMATS: Registry[WeightFormat] = Registry("weight format", "lowprec.formats")
ACTIVATION_FORMATS: Registry[ActivationFormat] = Registry("activation format", "lowprec.formats")
CACHE_FORMATS: Registry[CacheFormat] = Registry("cache format", "lowprec.formats")


def as_bfloat16(x: Tensor) -> Tensor:
    """`x` rounded to bfloat16 values, kept in float32."""
    return x.to(SCALE_DTYPE).to(torch.float32)
