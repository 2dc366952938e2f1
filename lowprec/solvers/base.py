"""What a solver is: an algorithm that turns a weight and its statistics into codes and scales.

Here too: what all solvers check first, and the fit of all grids of a weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowprec.errors import ConfigError, ModelError, UnsupportedError
from lowprec.formats.base import QuantizedWeight, WeightFormat
from lowprec.registry import Registry

# Weights to a chunk of rows: 2 MiB of float32, so that the passes of a scale search stay in a core's cache.
CHUNK_WEIGHTS = 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerStatistics:
    """What calibration knows of a layer's input.

    Attributes:
        hessian: [K, K] float32, X^T X / tokens over the calibration tokens.
        tokens: how many tokens it was summed over.
        drift: [K, K] float32, (X' - X)^T X / tokens, X' being what the input was before anything was rounded; None
            where X is that input itself.
        outputs: for the rows of each layer that reads the input, in their order and in one or more parts, [R, R] float,
            D^T D up to a factor, D being the gradients of log-likelihoods at these outputs; empty where unknown.
    """

    hessian: Tensor
    tokens: int
    drift: Tensor | None = None
    outputs: tuple[Tensor, ...] = ()


class Solver(Protocol):
    """A rounding algorithm."""

    @property
    def name(self) -> str:
        """Name that plans and files use."""

    @property
    def needs_statistics(self) -> bool:
        """Whether `solve` needs a Hessian."""

    def solve(self, w: Tensor, fmt: WeightFormat, statistics: LayerStatistics | None) -> QuantizedWeight:
        """w [N, K] float32 -> codes and scales in `fmt`.

        Raises:
            ConfigError: `statistics` is None although the solver needs them.
            ModelError: the weight or the statistics hold values that are not finite.
            UnsupportedError: `fmt` does not fit rows of K weights.
        """


SOLVERS: Registry[Solver] = Registry("solver", "lowprec.solvers")


def check_inputs(w: Tensor, fmt: WeightFormat, statistics: LayerStatistics | None) -> None:
    """Refuses what no solver can round; see `Solver.solve` for the errors. w: [N, K]."""
    if w.ndim != 2 or 0 in w.shape:
        raise ConfigError(f"a weight has two dimensions that are not empty, this one has the shape {tuple(w.shape)}")
    k = w.shape[1]
    if reason := fmt.fits(k):
        raise UnsupportedError(f"format {fmt.name} does not fit K = {k}", (reason,))
    _check_finite("weight", w)
    if statistics is not None:
        if statistics.hessian.shape != (k, k):
            raise ConfigError(f"a weight with K = {k} has a Hessian of shape {tuple(statistics.hessian.shape)}")
        _check_finite("Hessian", statistics.hessian)
        if bool((statistics.hessian.diagonal() < 0).any()):
            raise ModelError("the Hessian has a negative diagonal: it is no X^T X; calibrate the layer again")


def _check_finite(name: str, x: Tensor) -> None:
    # The sum is finite unless a value is not (or the sum overflows): one pass without a mask in the usual case.
    if not bool(torch.isfinite(x.sum())):
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ModelError(f"the {name} {tuple(x.shape)} has {bad} values that are not finite")


def row_chunks(n: int, k: int) -> Iterator[slice]:
    """Slices that cover `n` rows of `k` weights, CHUNK_WEIGHTS weights or less each (at least one row)."""
    rows = max(1, CHUNK_WEIGHTS // k)
    for start in range(0, n, rows):
        yield slice(start, min(n, start + rows))


def fit_grid(w: Tensor, fmt: WeightFormat, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """All scales of a weight, and where its windows begin: w [N, K], importance [K] or None -> two of [N, groups].

    Scales are float32 of bfloat16 values; the second is float32, and None for symmetric formats.
    """
    n, k = w.shape
    size = fmt.group_size or k
    weights = None if importance is None else importance.view(k // size, size)
    scale = torch.empty(n, k // size, dtype=torch.float32, device=w.device)
    lowest = None if fmt.symmetric else torch.empty_like(scale)
    for rows in row_chunks(n, k):
        slabs = w[rows].to(torch.float32).reshape(-1, k // size, size)
        found = fmt.fit_scale(slabs, weights)
        scale[rows] = found[..., 0]
        starts = fmt.fit_lowest(slabs, found, weights)
        if lowest is not None and starts is not None:
            lowest[rows] = starts[..., 0]
    return fmt.store_scales(scale), lowest
