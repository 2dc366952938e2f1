"""The casts that begin with a norm or a gated activation, as ops: each is one call of `triton_cast.quantize`.

Left out: sums of groups, which `quantize` gives.
"""

from typing import cast

from torch import Tensor

from lowprec_kernels.kernel import ActivationKind
from lowprec_kernels.triton_cast import quantize
from lowprec_kernels.tuning import Config


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, kind: str, block: int | None = None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """x [M, K], weight [K] -> codes [M, K] and scales of norm(x)."""
    found = quantize(x, cast(ActivationKind, kind), block=block, norm_weight=weight, eps=eps, config=config)
    return found.codes, found.scale


def add_rms_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    kind: str,
    block: int | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [M, K], weight [K] -> codes [M, K] and scales of norm(x + residual), and x + residual."""
    found = quantize(
        x, cast(ActivationKind, kind), block=block, norm_weight=weight, eps=eps, residual=residual, config=config
    )
    # The sum is there because a residual was given.
    return found.codes, found.scale, cast(Tensor, found.residual)


def silu_mul_quantize(
    x: Tensor, kind: str, block: int | None = None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """x = gate|up [M, 2K] -> codes [M, K] and scales of silu(gate) * up."""
    found = quantize(x, cast(ActivationKind, kind), block=block, silu=True, config=config)
    return found.codes, found.scale
