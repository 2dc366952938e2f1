"""nested-int4-int8: one stored weight of two levels, of which the lower is an INT4 weight as it stands.

    level 4    w ~ s c              plane 1: any INT4 weight of groups (codes c, zero points taken off, scale s)
    level 8    w ~ (s / m) c8       c8 = m c + r; plane 2: residual nibbles r in [-8, 7]

Level 4 reads plane 1 alone: half the bytes. The *ratio* m says how many steps of level 8 are one of level 4, for each
row and group one of RATIOS: a residual reaches 8/m steps of INT4 to either side. Rounding with error feedback, and
clipping, leave weights further from their codes than half a step, where a plain low nibble (m = 16) would be clipped;
groups without such weights take a finer step instead. Only ratios whose c8 fit int8 are taken; m = 8 always does,
since |c| <= 15.

Stored are, beside the INT4 weight, a nibble for each weight and two bits for each group. Bits for a weight, scales and
zero points included:

    groups of   64      128
    symmetric   8.281   8.141
    zero point  8.344   8.172

Which m and r are best is the matter of a solver: `lowprec.solvers.residual`.
Compare Any-Precision LLM (arXiv 2402.10517: bit planes, one rounding for all widths) and NestedFP (two planes of FP16).
Left out: levels between the two, formats without groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.errors import ConfigError
from lowprec.formats.base import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.integer import decode_groups
from lowprec.registry import closest

NAME = "nested-int4-int8"
LEVELS = (4, 8)
LEVEL_NAMES = {"int4": 4, "int8": 8}
"""What ladders call them, the lower one first."""
RATIOS = (4, 6, 8, 12)
RATIO_BITS = 2
RESIDUAL_MIN, RESIDUAL_MAX = -8, 7
CODE_MIN, CODE_MAX = -128, 127


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NestedWeight:
    """One layer's weight in two levels.

    Attributes:
        base: the weight of level 4, in an INT4 format of groups.
        residual: [N, K] int8 in [-8, 7].
        ratio: [N, K / group_size] int8, one of RATIOS each.
    """

    base: QuantizedWeight
    residual: Tensor
    ratio: Tensor

    @property
    def group_size(self) -> int:
        """Columns that share a scale and a ratio."""
        return self.base.codes.shape[1] // self.base.scale.shape[1]

    def codes(self) -> Tensor:
        """Codes of level 8, [N, K] int8."""
        slabs = self.base.codes.to(torch.int16).view(*self.ratio.shape, -1) * self.ratio[..., None]
        return (slabs.view_as(self.residual) + self.residual).to(torch.int8)

    def step(self) -> Tensor:
        """What one code of level 8 stands for, [N, K / group_size] float32."""
        return self.base.scale / self.ratio

    def dequantize(self, level: int) -> Tensor:
        """The weight that a level stands for, [N, K] float32.

        Raises:
            ConfigError: there is no such level.
        """
        if require_level(level) == 4:
            return self.base.dequantize()
        return decode_groups(self.codes(), self.step())


def require_level(level: int) -> int:
    """`level`, or ConfigError where nested weights have none of that name."""
    if level not in LEVELS:
        raise ConfigError(f"level {level!r} does not exist: nested weights have the levels {LEVELS[0]} and {LEVELS[1]}")
    return level


def base_reason(fmt: str) -> str | None:
    """None if weights in `fmt` can be plane 1, else the reason."""
    if fmt not in WEIGHT_FORMATS:
        return f"{fmt!r} is no weight format: {closest(fmt, list(WEIGHT_FORMATS))}"
    # Rows of two widths are 4 bits wide only in part.
    if not fmt.startswith("int4-g") or "-rows" in fmt:
        return f"{NAME} is built on INT4 in groups (int4-g64, int4-g128-asym, ...), not on {fmt}"
    return None


def bits_per_weight(fmt: str, k: int) -> float:
    """Stored bits of a weight, both levels, in rows of `k` on a base in `fmt`."""
    base = WEIGHT_FORMATS[fmt]
    groups = k // (base.group_size or k)
    return (8 * base.bytes_per_row(k) + 4 * k + RATIO_BITS * groups) / k


def residual_bounds(codes: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest code of level 8 for base codes and ratios that broadcast to each other, float32 each.

    The first exceeds the second where no residual gives an int8 code.
    """
    middle = codes.to(torch.float32) * ratio
    return (middle + RESIDUAL_MIN).clamp_min(CODE_MIN), (middle + RESIDUAL_MAX).clamp_max(CODE_MAX)


def refuses(weight: NestedWeight) -> str | None:
    """Why the parts are no nested weight, None if they are."""
    base, residual, ratio = weight.base, weight.residual, weight.ratio
    if reason := base_reason(base.format):
        return reason
    for name, found, shape in (("residuals", residual, base.codes.shape), ("ratios", ratio, base.scale.shape)):
        if found.shape != shape or found.dtype != torch.int8:
            return f"has {name} {found.dtype} {tuple(found.shape)}, not int8 {tuple(shape)}"
    if not _all_in(ratio, RATIOS):
        return f"has ratios other than {RATIOS}"
    if residual.numel() and not RESIDUAL_MIN <= int(residual.min()) <= int(residual.max()) <= RESIDUAL_MAX:
        return f"has residuals outside [{RESIDUAL_MIN}, {RESIDUAL_MAX}]"
    slabs = base.codes.to(torch.int16).view(*ratio.shape, -1) * ratio[..., None] + residual.view(*ratio.shape, -1)
    if slabs.numel() and not CODE_MIN <= int(slabs.min()) <= int(slabs.max()) <= CODE_MAX:
        return "has codes of level 8 that do not fit int8"
    return None


def _all_in(values: Tensor, allowed: Sequence[int]) -> bool:
    return bool(torch.isin(values, torch.tensor(allowed, dtype=values.dtype)).all())
