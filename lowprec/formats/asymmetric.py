"""INT4 weights with a zero point: each row and group of columns has sixteen levels of its own choice, zero among them.

    codes = clamp(round(w / s), lowest, lowest + 15),  -15 <= lowest <= 0        w ~ s * codes

The zero point is already taken off the codes, so they are what they are in the symmetric formats, multiples of the
scale, and no zero point is kept in memory: any window that holds all codes of a group decodes them alike. What is
stored is the one that begins at the smallest code (`offset_codes`).

The scale is searched as the symmetric formats do (`lowprec.formats.integer`), both ends of the slab shrunk alike; then
the window is the one of least importance-weighted squared error among all sixteen. Four bits more for a group; in
return no level is wasted on the side on which the slab is shorter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.formats.base import WEIGHT_FORMATS, QuantizedWeight, as_bfloat16
from lowprec.formats.integer import SEARCH_SHRINK, TINY, decode_groups
from lowprec.formats.schemes import ASYMMETRIC, GROUP_SIZES


@dataclass(frozen=True, slots=True, kw_only=True)
class AsymmetricInteger:
    """An integer weight format with zero points; see `lowprec.formats.base.WeightFormat`."""

    name: str
    bits: int
    group_size: int
    code_dtype: torch.dtype = torch.int8
    tolerance: float = 1e-2
    symmetric: bool = False

    @property
    def span(self) -> int:
        """Largest code less smallest code of a group."""
        return (1 << self.bits) - 1

    def fits(self, k: int) -> str | None:
        """None if rows of `k` weights can be stored, else the reason."""
        return f"{self.name} needs K to be a multiple of {self.group_size}, it is {k}" if k % self.group_size else None

    def fit_scale(self, slab: Tensor, importance: Tensor | None = None) -> Tensor:
        """[..., g] -> [..., 1]: the shrunken range of least weighted squared error."""
        low = slab.amin(-1, keepdim=True).clamp_max(0.0)
        high = slab.amax(-1, keepdim=True).clamp_min(0.0)
        best_scale = torch.full_like(low, TINY)
        best_error = torch.full_like(low, torch.inf)
        for shrink in SEARCH_SHRINK:
            scale = as_bfloat16((high - low) * shrink / self.span).clamp_min(TINY)
            lowest = (low * shrink / scale).round().clamp(-self.span, 0)
            error = self._error(slab, scale, lowest, importance)
            # A slab that is not finite has no least error: its scale is not finite either, and solvers refuse it.
            better = (error < best_error) | ~scale.isfinite()
            best_scale = torch.where(better, scale, best_scale)
            best_error = torch.where(better, error, best_error)
        return best_scale

    def store_scales(self, scale: Tensor) -> Tensor:
        """[N, groups] -> their bfloat16 values."""
        return as_bfloat16(scale)

    def fit_lowest(self, slab: Tensor, scale: Tensor, importance: Tensor | None = None) -> Tensor:
        """[..., g], [..., 1] -> [..., 1]: where the window of least weighted squared error begins."""
        best = torch.zeros_like(scale)
        best_error = torch.full_like(scale, torch.inf)
        for lowest in range(-self.span, 1):
            start = torch.full_like(scale, float(lowest))
            error = self._error(slab, scale, start, importance)
            better = error < best_error
            best = torch.where(better, start, best)
            best_error = torch.where(better, error, best_error)
        return best

    def _error(self, slab: Tensor, scale: Tensor, lowest: Tensor, importance: Tensor | None) -> Tensor:
        squared = (self.round(slab, scale, lowest) * scale - slab).square()
        return (squared if importance is None else squared * importance).sum(-1, keepdim=True)

    def round(self, w: Tensor, scale: Tensor, lowest: Tensor | None = None) -> Tensor:
        """Nearest code of the window, as float32."""
        if lowest is None:
            raise ValueError(f"{self.name} rounds into windows: say where they begin")
        return torch.minimum(torch.maximum((w / scale).round(), lowest), lowest + self.span)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """[N, K] codes and [N, groups] scales -> [N, K] float32."""
        return decode_groups(codes, scale)

    def bytes_per_row(self, k: int) -> float:
        """Codes, bfloat16 scales, and a zero point as wide as a code for each group."""
        return k * self.bits / 8 + (k // self.group_size) * (2 + self.bits / 8)

    def refuses(self, weight: QuantizedWeight) -> str | None:
        """Why codes and scales are none of this format, None if they are."""
        slabs = weight.codes.view(*weight.scale.shape, -1).to(torch.int16)
        lowest = slabs.amin(-1).clamp_max(0)
        if slabs.numel() and (int((slabs.amax(-1) - lowest).max()) > self.span or int(lowest.min()) < -self.span):
            return f"has groups whose codes are no {self.span + 1} levels on end with zero among them"
        return None


def offset_codes(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and zero points [N, groups], both int8 from -2^(b-1) up, whose difference the codes in memory are.

    The two are what compressed-tensors stores: each group's levels begin at its smallest code, or at 0 if that is less.
    """
    slabs = weight.codes.view(*weight.scale.shape, -1)
    zero = -slabs.amin(-1).clamp_max(0) - (1 << (WEIGHT_FORMATS[weight.format].bits - 1))
    return (slabs + zero[..., None]).view_as(weight.codes), zero


def from_offset(codes: Tensor, zero: Tensor) -> Tensor:
    """The codes in memory, [N, K] int8, of what `offset_codes` has made."""
    return (codes.view(*zero.shape, -1) - zero[..., None]).view_as(codes)


for _size in GROUP_SIZES:
    _name = f"int4-g{_size}{ASYMMETRIC}"
    WEIGHT_FORMATS.register(_name, AsymmetricInteger(name=_name, bits=4, group_size=_size))
