"""Rounding to nearest: each weight to the closest point of its grid, by itself.

    codes = round(w / s)        s per slab by the format's own search

With statistics the search weighs a column's squared error with its mean squared input, diag(X^T X): the error that
the column alone brings into the output. Without them all columns weigh the same. What rounding one weight does to
the others' best choice is left to `lowprec.solvers.gptq`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.formats.base import QuantizedWeight, WeightFormat
from lowprec.solvers.base import SOLVERS, LayerStatistics, check_inputs, fit_grid, row_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Rtn:
    """Rounds to nearest; see `lowprec.solvers.base.Solver`."""

    name: str = "rtn"
    needs_statistics: bool = False

    def solve(self, w: Tensor, fmt: WeightFormat, statistics: LayerStatistics | None) -> QuantizedWeight:
        """w [N, K] -> nearest codes, in chunks of rows."""
        check_inputs(w, fmt, statistics)
        importance = None if statistics is None else statistics.hessian.diagonal()
        scale, lowest = fit_grid(w, fmt, importance)
        return QuantizedWeight(format=fmt.name, codes=nearest_codes(w, fmt, scale, lowest), scale=scale)


def nearest_codes(w: Tensor, fmt: WeightFormat, scale: Tensor, lowest: Tensor | None = None) -> Tensor:
    """w [N, K], scale and lowest codes [N, groups] -> [N, K] nearest codes in the format's own dtype."""
    n, k = w.shape
    groups = scale.shape[1]
    codes = torch.empty(n, k, dtype=fmt.code_dtype, device=w.device)
    for rows in row_chunks(n, k):
        slabs = w[rows].to(torch.float32).reshape(-1, groups, k // groups)
        starts = None if lowest is None else lowest[rows, :, None]
        codes[rows] = fmt.round(slabs, scale[rows, :, None], starts).reshape(-1, k).to(fmt.code_dtype)
    return codes


SOLVERS.register("rtn", Rtn())
