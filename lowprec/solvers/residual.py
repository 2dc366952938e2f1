"""The second plane of nested weights: what brings an INT4 weight, which stays as it is, to nearly 8 bits.

Given codes c and scales s of plane 1, a ratio m for each group and a residual r for each weight are sought
(`lowprec.formats.nested`) that

    minimise  trace(E H E^T),    E = W - (s / m)(m c + r),    r in [-8, 7]

over the same Hessian H that plane 1 was rounded with, or that of the text as the unrounded model sees it. It is
`lowprec.solvers.gptq` on another grid, and with an error state of its own: error feedback, then `rounds` sweeps of
coordinate descent, the code of a weight being confined to the sixteen around m c.

The error state is what makes plane 1 of any solver do. Rounding with feedback leaves one weight in ten more than half
a step of INT4 from its code, some more than a step; but it has moved them in directions in which H is small, and there
they need not be brought back. The ratios are the ones of least squared error of plain rounding, columns weighted as the
solver weighs them (1 / (H^-1)[j, j]), and are the same for both.

Tried on SmolLM2-135M (qkv, o, gate/up and down of block 12; plane 1 INT4 g64 by `gptq`), output error relative to
plain rounding to INT8 per channel, geometric mean; symmetric and with zero points:

    ratio 8 everywhere, plain rounding        3.7      -
    ratio 8 everywhere, feedback and a sweep  0.97   0.62
    ratios (4, 8, 12, 16)                     0.65   0.45    three sweeps 0.63, 0.43
    ratios (4, 6, 8, 12)                      0.58   0.40
    ratios 2 to 16, four bits for a group     0.51   0.35    beyond 8.35 bits at g64 with zero points
    for comparison, INT8 per channel by gptq  0.25

Left out because it did not pay: other sets of four ratios (0.58-0.73), choosing ratios again after a pass (worse).
"""

import torch
from torch import Tensor

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.nested import RATIOS, NestedWeight, base_reason, residual_bounds
from lowprec.solvers.base import LayerStatistics, check_inputs, row_chunks
from lowprec.solvers.gptq import Problem, problem_of, round_columns, rows_at_once

ROUNDS = 1


class _Around:
    """Codes between two bounds of each weight, [K, R] in the order of rounding."""

    def __init__(self, least: Tensor, most: Tensor) -> None:
        self._least, self._most = least, most

    def round(self, column: Tensor, scale: Tensor, place: int) -> Tensor:
        """See `lowprec.solvers.gptq.Grid`."""
        nearest = (column / scale).round_()
        return torch.minimum(torch.maximum(nearest, self._least[place]), self._most[place])


def fit_residual(
    w: Tensor, base: QuantizedWeight, statistics: LayerStatistics | None, rounds: int = ROUNDS
) -> NestedWeight:
    """The nested weight of least output error whose level 4 is `base`.

    Args:
        w: [N, K], what level 8 should be: the weight as it was before anything was rounded.
        base: [N, K] in an INT4 format of groups; kept as it is.
        statistics: of the layer's input; None rounds to nearest.
        rounds: sweeps of coordinate descent.

    Raises:
        ConfigError: weight and base are of different shapes, or columns were scaled before the base was rounded.
        UnsupportedError: the base is in another format.
        ModelError: values that are not finite; a Hessian that is no X^T X.
    """
    if reason := base_reason(base.format):
        raise UnsupportedError("this weight cannot be the first plane of a nested one", (reason,))
    if base.codes.shape != w.shape:
        raise ConfigError(f"the weight is {tuple(w.shape)}, its INT4 codes {tuple(base.codes.shape)}")
    if base.exponents is not None:
        raise ConfigError("the INT4 codes are of a weight whose columns were scaled: round it without smoothing")
    check_inputs(w, WEIGHT_FORMATS[base.format], statistics)
    problem = None if statistics is None else problem_of(statistics.hessian)
    ratio = _ratios(w, base, None if problem is None else problem.importance)
    codes = _nearest(w, base, ratio) if problem is None else _solved(w, base, ratio, problem, rounds)
    whole = base.codes.to(torch.int16).view(*ratio.shape, -1) * ratio[..., None]
    return NestedWeight(base=base, residual=(codes - whole.view_as(codes)).to(torch.int8), ratio=ratio)


def _slabs(w: Tensor, groups: int) -> Tensor:
    """[R, K] -> [R, groups, K / groups] float32."""
    return w.to(torch.float32).reshape(len(w), groups, -1)


def _ratios(w: Tensor, base: QuantizedWeight, importance: Tensor | None) -> Tensor:
    """[N, groups] int8: of least (weighted) squared error when codes are rounded to nearest."""
    n, groups = base.scale.shape
    found = torch.empty(n, groups, dtype=torch.int8)
    weights = None if importance is None else importance.view(groups, -1)
    for rows in row_chunks(n, w.shape[1]):
        slabs, codes, scale = _slabs(w[rows], groups), _slabs(base.codes[rows], groups), base.scale[rows, :, None]
        errors = []
        for ratio in RATIOS:
            least, most = residual_bounds(codes, torch.tensor(float(ratio)))
            step = scale / ratio
            rounded = torch.minimum(torch.maximum((slabs / step).round_(), least), most)
            squared = (rounded * step - slabs).square_()
            error = (squared if weights is None else squared * weights).sum(-1)
            errors.append(error.masked_fill((least > most).any(-1), torch.inf))
        found[rows] = torch.tensor(RATIOS, dtype=torch.int8)[torch.stack(errors).argmin(0)]
    return found


def _nearest(w: Tensor, base: QuantizedWeight, ratio: Tensor) -> Tensor:
    """[N, K] int16, the nearest codes of level 8."""
    codes = torch.empty(w.shape, dtype=torch.int16)
    for rows in row_chunks(*w.shape):
        slabs = _slabs(w[rows], ratio.shape[1])
        least, most = residual_bounds(_slabs(base.codes[rows], ratio.shape[1]), ratio[rows, :, None])
        step = (base.scale[rows] / ratio[rows])[..., None]
        nearest = torch.minimum(torch.maximum((slabs / step).round_(), least), most)
        codes[rows] = nearest.view(-1, w.shape[1]).to(torch.int16)
    return codes


def _solved(w: Tensor, base: QuantizedWeight, ratio: Tensor, problem: Problem, rounds: int) -> Tensor:
    """[N, K] int16, codes of level 8 of small output error."""
    codes = torch.empty(w.shape, dtype=torch.int16)
    groups = ratio.shape[1]
    for rows in rows_at_once(len(w)):
        bounds = residual_bounds(_slabs(base.codes[rows], groups), ratio[rows, :, None])
        grid = _Around(*(x.reshape(-1, w.shape[1]).T[problem.order].contiguous() for x in bounds))
        step, group_of = base.scale[rows] / ratio[rows], problem.group_of(groups)
        wt = w[rows].to(torch.float32).T[problem.order].contiguous()
        error = torch.zeros_like(wt)
        found = round_columns(wt, error, problem.feedback, step, group_of, grid, reach_all=False)
        for _ in range(rounds):
            found = round_columns(wt, error, problem.coupling, step, group_of, grid, reach_all=True)
        codes[rows] = found[problem.place].T.to(torch.int16)
    return codes
