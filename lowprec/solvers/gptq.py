"""GPTQ, followed by rounds of scale refits and coordinate descent.

A layer y = W x with W [N, K] is rounded to Q so that its output changes least over the calibration tokens:

    minimise  trace((W - Q) H (W - Q)^T),    H = X^T X / tokens  [K, K]

Rows are independent. The steps, on H damped by `damping` times its mean diagonal:

1. *Scales* by the format's own search, each column's squared error weighted with 1 / (H^-1)[j, j]: what an error in
   column j costs after all other columns have done their best to make up for it.
2. *Error feedback* (GPTQ, arXiv 2210.17323, algorithm 1 and equations 2-4): columns are rounded one after the other,
   and each error moves the columns still to come. With H = (U + I) D (U + I)^T, U strictly upper triangular, that is

       q[j] = round(w[j] + sum over i < j of U[i, j] (w[i] - q[i]))

   (QuIP, arXiv 2307.13304, equation 2 and theorem 6: the same codes as GPTQ's inverse gives). The factor comes from
   one Cholesky factorisation of H with both axes reversed, so H is never inverted.
3. Per round, first *refit of the scales*: codes C given, each row's scales s minimise a quadratic, whose normal
   equations (C^T H C) s = C^T H w are as large as the row has groups; rounded to bfloat16, kept where they help. Then
   *coordinate descent*, one sweep over all columns (QuantEase, arXiv 2309.01885, equation 8): with the others fixed,
   the best code is the one nearest to

       w[j] + sum over i != j of H[i, j] / H[j, j] (w[i] - q[i])

   No step of a round raises the damped objective.

Steps 2 and 3 are the same pass with another feedback matrix. Columns go by falling H[j, j] (GPTQ's activation order)
with *static groups*: a scale belongs to the columns that stand together in W, so a checkpoint needs no g_idx.
Columns that calibration never saw have the damping for a diagonal and are rounded to nearest.

Layout: a pass works on transposed, permuted weights [K, rows], so that a column is contiguous; blocks of
BLOCK_COLUMNS take the feedback of all other blocks in one matrix product.

Tried on SmolLM2-135M (q, o, gate and down of two blocks, INT4 g64, 32 k tokens), geometric mean of the error on text
that calibration did not see, relative to step 2 in activation order with scales weighted by diag(H) and damping 0.01:

    step 1's weights 0.937; then two rounds 0.880, three 0.873, three at damping 0.03 0.868
    the same for three rounds in INT8 0.904, in FP8 0.901

Left out because it did not pay: six rounds (0.865), two sweeps to a round (0.866), one round of three sweeps (0.878),
columns in their own order (1.110, and 0.927 after three rounds), unweighted scales (1.03), weights D of the
factorisation in step 1 (0.936, after three rounds 0.875), damping 0.003 (fits the calibration text as well, other text
worse: 0.878) and 0.1 (0.871).

Damping is 0.2 for the sake of text unlike the calibration text. Compensated for drift (`lowprec.solvers.asymmetric`,
ridge 1), calibrated on technical text, KL in nats on (technical, literature, code, exam questions): damping 0.1 0.060
0.179 0.073 0.127, 0.3 0.067 0.166 0.070 0.129, 1.0 0.073 0.162 0.081 0.140.

Token weights are `lowprec.steps.importance`; a second Hessian, of the outputs, is `lowprec.solvers.two_sided`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowprec.errors import ConfigError, ModelError
from lowprec.formats.base import QuantizedWeight, WeightFormat, as_bfloat16
from lowprec.solvers.base import SOLVERS, LayerStatistics, check_inputs, fit_grid

Store = Callable[[Tensor], Tensor]
"""Scales [R, groups] of whole rows -> the nearest that a format can store."""
DAMPING = 0.2
BLOCK_COLUMNS = 128
ROWS_AT_ONCE = 2048
# Multiples of the damping that are tried in turn when a Hessian is not positive definite.
DAMPING_STEPS = (1.0, 10.0, 100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """Error feedback and descent; see `lowprec.solvers.base.Solver`.

    Attributes:
        damping: share of the mean diagonal of H that is added to its diagonal.
        activation_order: round the columns of the largest inputs first.
        rounds: scale refits, each followed by a sweep of coordinate descent; 0 is GPTQ itself.
    """

    name: str = "gptq"
    needs_statistics: bool = True
    damping: float = DAMPING
    activation_order: bool = True
    rounds: int = 3

    def solve(self, w: Tensor, fmt: WeightFormat, statistics: LayerStatistics | None) -> QuantizedWeight:
        """w [N, K] -> codes and scales of small output error, ROWS_AT_ONCE rows at a time."""
        if statistics is None:
            raise ConfigError(f"solver {self.name!r} needs statistics: calibrate the layer first, or use 'rtn'")
        check_inputs(w, fmt, statistics)
        return self.prepared(fmt, statistics.hessian)(w)

    def prepared(self, fmt: WeightFormat, hessian: Tensor) -> Callable[[Tensor], QuantizedWeight]:
        """What rounds any rows [R, K] that see inputs of this Hessian [K, K], which is factorised once.

        Raises:
            ModelError: it is no X^T X.
        """
        problem = problem_of(hessian, self.damping, self.activation_order)

        def rounded(w: Tensor) -> QuantizedWeight:
            scale, lowest = fit_grid(w, fmt, problem.importance)
            codes = torch.empty(w.shape, dtype=fmt.code_dtype, device=w.device)
            for rows in rows_at_once(w.shape[0]):
                grid = _Windows(fmt, None if lowest is None else lowest[rows], problem)
                found, scale[rows] = self._solve_rows(
                    w[rows].to(torch.float32), scale[rows], grid, problem, fmt.store_scales
                )
                codes[rows] = found.to(fmt.code_dtype)
            return QuantizedWeight(format=fmt.name, codes=codes, scale=scale)

        return rounded

    def _solve_rows(
        self, w: Tensor, scale: Tensor, grid: "Grid", problem: "Problem", store: Store
    ) -> tuple[Tensor, Tensor]:
        """w [R, K], scale [R, groups] -> codes [R, K] float32, scale [R, groups]."""
        group_of = problem.group_of(scale.shape[1])
        wt = w.T[problem.order].contiguous()
        error = torch.zeros_like(wt)
        codes = round_columns(wt, error, problem.feedback, scale, group_of, grid, reach_all=False)
        for _ in range(self.rounds):
            scale = refit_scales(w, codes[problem.place].T.contiguous(), scale, problem.hessian, store)
            torch.sub(wt, codes * scale.T[group_of], out=error)
            codes = round_columns(wt, error, problem.coupling, scale, group_of, grid, reach_all=True)
        return codes[problem.place].T, scale


class Grid(Protocol):
    """The codes that the weights of some rows may have."""

    def round(self, column: Tensor, scale: Tensor, place: int) -> Tensor:
        """Nearest codes [R], float32, of the column that is rounded as the `place`-th, with scales [R]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """What all rows of a layer share.

    Attributes:
        hessian: [K, K], damped, columns as in the weight.
        importance: [K], 1 / (hessian^-1)[j, j], columns as in the weight.
        order: [K], `order[p]` is the column that is rounded as the p-th.
        place: [K], the inverse of `order`.
        feedback: [K, K], strictly lower triangular, U^T of step 2, columns in the order of rounding.
        coupling: [K, K], H[i, j] / H[i, i] without the diagonal, columns in the order of rounding.
    """

    hessian: Tensor
    importance: Tensor
    order: Tensor
    place: Tensor
    feedback: Tensor
    coupling: Tensor

    def group_of(self, groups: int) -> Tensor:
        """[K], the group of each column in the order of rounding, where a row has `groups` of them."""
        return self.order // (len(self.order) // groups)


class _Windows:
    """A format, and where the windows of some rows begin in each group ([R, groups]; None: all alike)."""

    def __init__(self, fmt: WeightFormat, lowest: Tensor | None, problem: Problem) -> None:
        self._fmt = fmt
        self._lowest = None if lowest is None else lowest.T[problem.group_of(lowest.shape[1])]

    def round(self, column: Tensor, scale: Tensor, place: int) -> Tensor:
        """See `Grid`."""
        return self._fmt.round(column, scale, None if self._lowest is None else self._lowest[place])


def rows_at_once(n: int) -> Iterator[slice]:
    """Slices that cover `n` rows, ROWS_AT_ONCE or less each."""
    for start in range(0, n, ROWS_AT_ONCE):
        yield slice(start, min(start + ROWS_AT_ONCE, n))


def problem_of(hessian: Tensor, damping: float = DAMPING, activation_order: bool = True) -> Problem:
    """Damps, orders and factorises a Hessian [K, K].

    Raises:
        ModelError: it is no X^T X.
    """
    hessian = hessian.to(torch.float32)
    diagonal = hessian.diagonal()
    columns = torch.arange(hessian.shape[0], device=hessian.device)
    order = torch.argsort(diagonal, descending=True, stable=True) if activation_order else columns
    place = torch.argsort(order)
    damped, lower = _factorise(hessian[order][:, order], damping)
    # H reversed = L L^T, so H = R R^T with R = L reversed, upper triangular.
    root = lower.flip(0, 1)
    coupling = damped / damped.diagonal()[:, None]
    coupling.diagonal().zero_()
    identity = torch.eye(len(columns), dtype=root.dtype, device=root.device)
    inverse_root = torch.linalg.solve_triangular(root, identity, upper=True)
    importance = 1.0 / inverse_root.square().sum(0)
    return Problem(
        hessian=damped[place][:, place].contiguous(),
        importance=importance[place],
        order=order,
        place=place,
        feedback=_feedback(lower),
        coupling=coupling,
    )


def feedback_of(hessian: Tensor, damping: float) -> Tensor:
    """U^T of step 2, [K, K], strictly lower triangular, for columns rounded in their own order.

    Raises:
        ModelError: it is no X^T X.
    """
    return _feedback(_factorise(hessian, damping)[1])


def _feedback(lower: Tensor) -> Tensor:
    """U^T: U + I is the reversed factor with a unit diagonal."""
    root = lower.flip(0, 1)
    feedback = (root / root.diagonal()).T.contiguous()
    feedback.diagonal().zero_()
    return feedback


def _factorise(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped Hessian and the lower Cholesky factor of it with both axes reversed; more damping if that fails."""
    symmetric = (hessian + hessian.T) / 2
    mean = float(symmetric.diagonal().mean())
    for step in DAMPING_STEPS:
        damped = symmetric.clone()
        # A Hessian of zeros says nothing about the columns: all count the same.
        damped.diagonal().add_(damping * step * mean if mean > 0 else 1.0)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            return damped, lower
    raise ModelError(
        f"the Hessian {tuple(hessian.shape)} is not positive definite, even with {damping * DAMPING_STEPS[-1]:g} times "
        "its mean diagonal added: it is no X^T X; calibrate the layer again"
    )


def round_columns(
    wt: Tensor, error: Tensor, feedback: Tensor, scale: Tensor, group_of: Tensor, grid: Grid, *, reach_all: bool
) -> Tensor:
    """Rounds column after column to the grid point nearest to w[j] + sum over i of feedback[j, i] error[i].

    Args:
        wt: [K, R] weights, columns in the order of rounding.
        error: [K, R] weights less what their codes stand for; brought up to date in place.
        feedback: [K, K], zero diagonal.
        scale: [R, groups].
        group_of: [K], the group of each column.
        grid: rounds a column.
        reach_all: whether columns later than j feed back to j; else they must not have an error yet.

    Returns:
        [K, R] codes, float32.
    """
    scale_of = scale.T.contiguous()
    groups = group_of.tolist()
    codes = torch.empty_like(wt)
    for start in range(0, len(wt), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(wt))
        reach = len(wt) if reach_all else start
        target = torch.addmm(wt[start:stop], feedback[start:stop, :reach], error[:reach])
        inside = feedback[start:stop, start:stop]
        # How the errors of this block have changed since the product above was taken.
        change = torch.empty_like(target)
        for j in range(stop - start):
            wanted = torch.addmv(target[j], change[:j].T, inside[j, :j])
            s = scale_of[groups[start + j]]
            codes[start + j] = grid.round(wanted, s, start + j)
            now = wt[start + j] - codes[start + j] * s
            torch.sub(now, error[start + j], out=change[j])
            error[start + j] = now
    return codes


def refit_scales(w: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor, store: Store = as_bfloat16) -> Tensor:
    """The stored scales of least output error for given codes, row by row; a row that they do not help keeps its own.

    Args:
        w: [N, K] weights.
        codes: [N, K] float32.
        scale: [N, groups], the scales so far.
        hessian: [K, K], positive definite.
        store: scales of whole rows -> the nearest that the format can store.

    Returns:
        [N, groups] float32 of bfloat16 values.
    """
    n, k = w.shape
    groups = scale.shape[1]
    slabs = codes.view(n, groups, k // groups)

    def inner(x: Tensor) -> Tensor:
        return (x.view_as(slabs) * slabs).sum(-1)

    linear = inner(w @ hessian)
    quadratic = torch.empty(n, groups, groups, dtype=w.dtype, device=w.device)
    for g in range(groups):
        columns = slice(g * k // groups, (g + 1) * k // groups)
        quadratic[:, g] = inner(codes[:, columns] @ hessian[columns])
    curvature = quadratic.diagonal(dim1=1, dim2=2)
    # Groups whose codes are all zero have no curvature: the ridge makes the rest of the row solvable, they keep theirs.
    ridge = 1e-6 * curvature.mean(-1, keepdim=True) + torch.finfo(w.dtype).tiny
    factor, info = torch.linalg.cholesky_ex(quadratic + torch.diag_embed(ridge.expand(n, groups)))
    solution = torch.cholesky_solve(linear[..., None], factor)[..., 0]
    fitted = store(torch.where(curvature > 0, solution, scale))

    def objective(s: Tensor) -> Tensor:
        return ((quadratic @ s[..., None])[..., 0] * s - 2 * linear * s).sum(-1)

    better = (info == 0) & (fitted > 0).all(-1) & (objective(fitted) < objective(scale))
    return torch.where(better[:, None], fitted, scale)


def output_error(w: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """The output's squared error relative to the output: trace(E H E^T) / trace(W H W^T) with E = W - Q.

    Args:
        w: [N, K] weights.
        quantized: what they were rounded to.
        hessian: [K, K], X^T X up to a factor.

    Returns:
        The share, 0 for an exact result and for a layer whose output is zero anyway.
    """
    weight, metric = w.to(torch.float64), hessian.to(torch.float64)
    error = weight - quantized.dequantize().to(torch.float64)
    whole = float(((weight @ metric) * weight).sum())
    return float(((error @ metric) * error).sum()) / whole if whole > 0 else 0.0


SOLVERS.register("gptq", Gptq())
# Where minutes count: most of what three rounds gain comes with the first.
SOLVERS.register("gptq-quick", Gptq(name="gptq-quick", rounds=1))
