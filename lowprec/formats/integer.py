"""The grid that all symmetric integer weight formats share.

    codes = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1)        w ~ s * codes

The scale starts from the absolute maximum over qmax and, when the format searches, is shrunk to where the
(importance-weighted) squared error is least; the candidates are fixed, so the result depends on nothing else.
The sign of the scale stays positive; 8-bit grids leave -128 unused. A slab that holds a value that is not finite gets a
scale that is not finite, so damage shows in what is decoded; solvers refuse such weights before.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.formats.base import QuantizedWeight, as_bfloat16

SEARCH_SHRINK = tuple(1.0 - 0.025 * i for i in range(21))
# Least scale, for slabs of zeros: a power of two, so that it is a bfloat16 value as every scale is.
TINY = 2.0**-40


@dataclass(frozen=True, slots=True, kw_only=True)
class SymmetricInteger:
    """A symmetric integer weight format of `bits` bits; see `lowprec.formats.base.WeightFormat`."""

    name: str
    bits: int
    group_size: int | None
    code_dtype: torch.dtype = torch.int8
    tolerance: float = 1e-2
    symmetric: bool = True

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def qmin(self) -> int:
        """Smallest code; 8-bit formats keep to -127, so that products of two codes stay symmetric."""
        return -self.qmax if self.bits == 8 else -self.qmax - 1

    def fits(self, k: int) -> str | None:
        """None if rows of `k` weights can be stored, else the reason."""
        if self.group_size is not None and k % self.group_size:
            return f"{self.name} needs K to be a multiple of {self.group_size}, it is {k}"
        return None

    def fit_scale(self, slab: Tensor, importance: Tensor | None = None) -> Tensor:
        """[..., g] -> [..., 1]: the shrunken absolute maximum of least weighted squared error."""
        largest = slab.abs().amax(-1, keepdim=True)
        best_scale = as_bfloat16(largest / self.qmax).clamp_min(TINY)
        if self.bits == 8 and importance is None:
            return best_scale
        best_error = torch.full_like(largest, torch.inf)
        for shrink in SEARCH_SHRINK:
            # Half a step beyond qmax still rounds to it, and the lower end of short grids reaches one step further; on
            # long ones that is less than the search's own step.
            scale = as_bfloat16(largest * shrink / (self.qmax + (0.5 if self.bits <= 4 else 0.0))).clamp_min(TINY)
            squared = (self.round(slab, scale) * scale - slab).square()
            error = (squared if importance is None else squared * importance).sum(-1, keepdim=True)
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_error = torch.where(better, error, best_error)
        return best_scale

    def store_scales(self, scale: Tensor) -> Tensor:
        """[N, groups] -> their bfloat16 values."""
        return as_bfloat16(scale)

    def fit_lowest(self, slab: Tensor, scale: Tensor, importance: Tensor | None = None) -> None:
        """All slabs begin at `qmin`."""
        return

    def round(self, w: Tensor, scale: Tensor, lowest: Tensor | None = None) -> Tensor:
        """Nearest code of each weight, as float32."""
        return (w / scale).round().clamp(self.qmin, self.qmax)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """[N, K] codes and [N, groups] scales -> [N, K] float32."""
        return decode_groups(codes, scale)

    def bytes_per_row(self, k: int) -> float:
        """Codes plus bfloat16 scales."""
        return k * self.bits / 8 + 2 * (k // self.group_size if self.group_size else 1)

    def refuses(self, weight: QuantizedWeight) -> str | None:
        """Why codes and scales are none of this format, None if they are."""
        codes = weight.codes
        if codes.numel() and (int(codes.min()) < self.qmin or int(codes.max()) > self.qmax):
            return f"has codes outside [{self.qmin}, {self.qmax}]"
        return None


def decode_groups(codes: Tensor, scale: Tensor) -> Tensor:
    """[N, K] codes and [N, groups] scales -> [N, K] float32."""
    n, k = codes.shape
    return (codes.to(torch.float32).view(n, scale.shape[1], -1) * scale[..., None]).view(n, k)


def token_scale(x: Tensor, largest: float) -> Tensor:
    """Scale of each token: [..., K] -> [..., 1] float32, max |x| / `largest`; not finite where x is not."""
    return (x.abs().amax(-1, keepdim=True).to(torch.float32) / largest).clamp_min(TINY)
