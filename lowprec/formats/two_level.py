"""INT4 with scales of two levels: a group's scale is a whole multiple of one step of its row.

    s[n, g] = m[n, g] r[n],   m in 1 .. 15            w ~ s c = r (m c),    m c in [-120, 105]

So the very same weights are INT8 with one scale for a row: integer products, which have no scale within a sum, run them
exactly, where ordinary groups need a float after each. Few rows read four bits a weight, many multiply in INT8.

r keeps four significant bits, so that s = m r is a bfloat16 value as every scale is, and can be found again from the
scales alone. Of the steps that give the row's largest scale a multiplier of 8 to 15, that one is taken whose multiples
are nearest to the others, in relative terms. What it costs, tried on four layers of SmolLM2-135M in groups of 64, plain
and in a random basis: scales move by 2 % on average, the squared error of the weights grows by 2.4 to 4.8 %.

Source: two-level integer scales, VS-Quant, arXiv 2102.04503, section 4.2; INT4 that is INT8 within a row, QServe, arXiv
2405.04532, section 4.1, there with zero points and scales of eight bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.errors import UnsupportedError
from lowprec.formats.base import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.integer import SymmetricInteger
from lowprec.formats.schemes import GROUP_SIZES, TWO_LEVEL

LARGEST = 15
TOP = range(8, LARGEST + 1)
"""What the largest scale of a row may be a multiple of: below, steps would be coarser than need be."""
SIGNIFICANT = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoLevelInteger(SymmetricInteger):
    """Symmetric INT4 with scales of two levels; see `lowprec.formats.base.WeightFormat`."""

    def store_scales(self, scale: Tensor) -> Tensor:
        """[N, groups] -> multiples, 1 to 15, of a step of each row."""
        top = scale.amax(1, keepdim=True)
        best, least = scale, torch.full_like(top, torch.inf)
        for multiple in TOP:
            step = _four_bits(top / multiple)
            found = (scale / step).round().clamp(1, LARGEST) * step
            error = (found / scale - 1.0).square().sum(1, keepdim=True)
            best = torch.where(error < least, found, best)
            least = torch.minimum(least, error)
        return best

    def refuses(self, weight: QuantizedWeight) -> str | None:
        """Why codes and scales are none of this format, None if they are."""
        # The base's own, by name: `super()` does not find its class in a dataclass with slots.
        if reason := SymmetricInteger.refuses(self, weight):
            return reason
        if bool((multipliers(weight.scale) == 0).any()):
            return f"has scales that are no multiples, 1 to {LARGEST}, of a step of their row"
        return None


def multipliers(scale: Tensor) -> Tensor:
    """[N, groups] scales -> what they are multiples of their row's step by, 1 to 15; 0 in rows that have no step."""
    exact = scale.double()
    top, found = exact.amax(1, keepdim=True), torch.zeros_like(exact)
    for multiple in range(1, LARGEST + 1):
        step = top / multiple
        whole = (exact / step).round()
        fits = (step == _four_bits(step)) & (whole * step == exact) & (whole >= 1)
        found = torch.where(fits.all(1, keepdim=True) & (found == 0), whole, found)
    return found


def is_by_rows(fmt: str | None) -> bool:
    """Whether weights in the format called `fmt` are INT8 by rows as well."""
    return fmt is not None and isinstance(WEIGHT_FORMATS[fmt], TwoLevelInteger)


def stored_multiples(fmt: str, scale: Tensor) -> Tensor | None:
    """Scales [N, groups] of a weight in `fmt` -> what kernels need of them, [N, groups] int8; None: other formats."""
    return _whole(scale).to(torch.int8) if is_by_rows(fmt) else None


def in_rows(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight [N, K] in INT8, one scale for a row.

    Raises:
        UnsupportedError: its scales are not of two levels.
    """
    whole = _whole(weight.scale)
    n, k = weight.codes.shape
    codes = (weight.codes.view(n, whole.shape[1], -1) * whole[..., None]).to(torch.int8).view(n, k)
    step = weight.scale[:, :1].double() / whole[:, :1]
    return QuantizedWeight(format="int8", codes=codes, scale=step.float(), exponents=weight.exponents)


def _whole(scale: Tensor) -> Tensor:
    """Multipliers of scales that must be of two levels."""
    found = multipliers(scale)
    if bool((found == 0).any()):
        raise UnsupportedError("weights are not INT8 by rows", ("their scales are not whole multiples of a step",))
    return found


def _four_bits(x: Tensor) -> Tensor:
    """`x` > 0 rounded to four significant bits."""
    fraction, exponent = torch.frexp(x)
    return torch.ldexp((fraction * SIGNIFICANT).round() / SIGNIFICANT, exponent)


for _size in GROUP_SIZES:
    _name = f"int4{TWO_LEVEL}-g{_size}"
    WEIGHT_FORMATS.register(_name, TwoLevelInteger(name=_name, bits=4, group_size=_size))
