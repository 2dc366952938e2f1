"""What a code was rounded from: where a weight would stand on its grid if all others stay as they are.

With Q the rounded weight, E = W - Q and H the damped Hessian of the inputs, the best value of column j is

    t[j] = w[j] + sum over i != j of e[i] H[i, j] / H[j, j],        latent[j] = t[j] / s[j]

the target of coordinate descent (QuantEase, arXiv 2309.01885, equation 8; `lowprec.solvers.gptq`, step 3). A latent
near the middle between two codes is a weight that may go either way at hardly any cost, which is what a search for
better codes has to know: it is the rounding offset that learned rounding (`lowprec.steps.learn`) starts from.
"""

from torch import Tensor

from lowprec.formats import QuantizedWeight
from lowprec.formats.integer import decode_groups

# Strictly inside half a step, so that the codes are those that the solver has chosen.
LARGEST_OFFSET = 0.499


def latent_codes(w: Tensor, weight: QuantizedWeight, hessian: Tensor, damping: float) -> Tensor:
    """What the codes were rounded from, in units of the codes.

    Args:
        w: [N, K] float32, what was rounded.
        weight: what it was rounded to, by a solver of integer codes.
        hessian: [K, K], X^T X / tokens.
        damping: share of its mean diagonal that is added.

    Returns:
        [N, K] float32, within half a step of the codes.
    """
    damped = (hessian + hessian.T) / 2
    level = float(damped.diagonal().mean())
    damped.diagonal().add_(damping * level if level > 0 else 1.0)
    diagonal = damped.diagonal()
    codes = weight.codes.float()
    error = w - decode_groups(codes, weight.scale)
    target = w + (error @ damped - error * diagonal) / diagonal
    slabs = target.view(*weight.scale.shape, -1) / weight.scale[..., None]
    return codes + (slabs.view_as(w) - codes).clamp(-LARGEST_OFFSET, LARGEST_OFFSET)
