"""Rows of two widths, for the tables of a vocabulary: the rows that matter most in INT8, all others in INT4.

    row i is INT8 per channel if it is among the `share` of all rows with the largest importance, else INT4 by groups

A vocabulary is skewed as no layer is: a few thousand tokens make nearly all of a text, and a row's error counts as
often as its token is read or predicted. So a table between INT4 and INT8 loses least by giving bits to tokens, not to
all rows alike. Which rows are fine needs no mark in memory: an INT8 row has codes that INT4 does not have.

In memory both kinds stand in one matrix of codes and one of scales, [N, K] and [N, K/G]; a fine row repeats its one
scale. Whoever stores or multiplies the weight takes it apart with `split`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.formats.base import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.integer import SymmetricInteger
from lowprec.formats.schemes import GROUP_SIZES, ROW_PERCENTS

FINE = "int8"
MASK_BYTES_PER_ROW = 1 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRows:
    """INT8 rows among INT4 ones; see `lowprec.formats.base.WeightFormat`.

    Scales and nearest codes are the coarse grid's: solvers round a table in both grids, and `mixed` puts the rows
    together.

    Attributes:
        share: of the rows that are fine.
    """

    name: str
    share: float
    group_size: int
    bits: int = 4
    code_dtype: torch.dtype = torch.int8
    tolerance: float = 1e-2
    symmetric: bool = True

    @property
    def coarse(self) -> str:
        """Name of the coarse rows' format."""
        return f"int4-g{self.group_size}"

    @property
    def _coarse(self) -> SymmetricInteger:
        found = WEIGHT_FORMATS[self.coarse]
        assert isinstance(found, SymmetricInteger)
        return found

    def fine_rows(self, n: int) -> int:
        """How many of `n` rows are fine."""
        return round(self.share * n)

    def fits(self, k: int) -> str | None:
        """None if rows of `k` weights can be stored, else the reason."""
        return self._coarse.fits(k)

    def fit_scale(self, slab: Tensor, importance: Tensor | None = None) -> Tensor:
        """[..., g] -> [..., 1], the coarse grid's scale."""
        return self._coarse.fit_scale(slab, importance)

    def store_scales(self, scale: Tensor) -> Tensor:
        """[N, groups] -> their bfloat16 values."""
        return self._coarse.store_scales(scale)

    def fit_lowest(self, slab: Tensor, scale: Tensor, importance: Tensor | None = None) -> None:
        """Both grids are symmetric."""
        return

    def round(self, w: Tensor, scale: Tensor, lowest: Tensor | None = None) -> Tensor:
        """Nearest code of the coarse grid."""
        return self._coarse.round(w, scale)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """[N, K] codes and [N, groups] scales -> [N, K] float32, whatever their widths."""
        return self._coarse.decode(codes, scale)

    def bytes_per_row(self, k: int) -> float:
        """Mean over both kinds of rows, and a bit for each that says which kind it is."""
        fine, coarse = (fmt.bytes_per_row(k) for fmt in (WEIGHT_FORMATS[FINE], self._coarse))
        return self.share * fine + (1.0 - self.share) * coarse + MASK_BYTES_PER_ROW

    def refuses(self, weight: QuantizedWeight) -> str | None:
        """Why codes and scales are none of this format, None if they are."""
        wide, alike, count = self._wide(weight.codes), _alike(weight.scale), self.fine_rows(len(weight.codes))
        if bool((wide & ~alike).any()):
            return "has INT8 rows of more than one scale"
        if not int(wide.sum()) <= count <= int((wide | alike).sum()):
            return f"has {int(wide.sum())} INT8 rows, {self.name} has {count}"
        return WEIGHT_FORMATS[FINE].refuses(weight)

    def _wide(self, codes: Tensor) -> Tensor:
        """[N] bool: rows with codes that INT4 does not have."""
        coarse = self._coarse
        return (codes.amin(1) < coarse.qmin) | (codes.amax(1) > coarse.qmax)

    def fine_mask(self, importance: Tensor) -> Tensor:
        """[N] -> [N] bool, True for the rows where it is largest."""
        rows = torch.zeros(len(importance), dtype=torch.bool)
        rows[torch.topk(importance, self.fine_rows(len(rows))).indices] = True
        return rows

    def mixed(self, fine: QuantizedWeight, coarse: QuantizedWeight, importance: Tensor) -> QuantizedWeight:
        """The same weight [N, K] in both grids, importance [N] -> fine rows where it is largest."""
        rows = self.fine_mask(importance)
        codes = torch.where(rows[:, None], fine.codes, coarse.codes)
        return QuantizedWeight(
            format=self.name, codes=codes, scale=torch.where(rows[:, None], fine.scale, coarse.scale).contiguous()
        )

    def split(self, weight: QuantizedWeight) -> tuple[Tensor, QuantizedWeight, QuantizedWeight]:
        """Which rows are fine, [N] bool, and the fine and the coarse rows as weights of their own formats.

        Rows that are both (of zeros, say) may count as either; so that there are always `fine_rows`, the first of them
        are called fine.
        """
        rows = self._wide(weight.codes)
        missing = self.fine_rows(len(rows)) - int(rows.sum())
        rows[(~rows & _alike(weight.scale)).nonzero().flatten()[:missing]] = True
        fine = QuantizedWeight(format=FINE, codes=weight.codes[rows], scale=weight.scale[rows, :1])
        coarse = QuantizedWeight(format=self.coarse, codes=weight.codes[~rows], scale=weight.scale[~rows])
        return rows, fine, coarse

    def joined(self, rows: Tensor, fine: QuantizedWeight, coarse: QuantizedWeight) -> QuantizedWeight:
        """The inverse of `split`."""
        k = fine.codes.shape[1]
        codes = torch.empty(len(rows), k, dtype=torch.int8)
        scale = torch.empty(len(rows), k // self.group_size)
        for which, part in ((rows, fine), (~rows, coarse)):
            codes[which], scale[which] = part.codes, part.scale.expand(-1, scale.shape[1])
        return QuantizedWeight(format=self.name, codes=codes, scale=scale)


def _alike(scale: Tensor) -> Tensor:
    """[N] bool: rows of one scale."""
    return (scale == scale[:, :1]).all(1)


for _size in GROUP_SIZES:
    for _percent in ROW_PERCENTS:
        _name = f"int4-g{_size}-rows{_percent}"
        WEIGHT_FORMATS.register(_name, MixedRows(name=_name, share=_percent / 100, group_size=_size))
