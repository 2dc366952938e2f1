"""Asymmetric calibration: the weight that makes up for what rounding the layers before it has done to its input.

A layer's input X [tokens, K] in the rounded model is no longer the reference's X'. The layer should give the
reference's output all the same:

    minimise over V  |X' W^T - X V^T|^2 / tokens + ridge mean(diag H) |V - W|^2,    H = X^T X / tokens
    V = W + W D (H + ridge mean(diag H) I)^-1,                                      D = (X' - X)^T X / tokens  [K, K]

and V is what the solver then rounds (GPTAQ, arXiv 2504.02692, section 3, whose residual term this is in closed form;
with ridge, and before the rounding instead of column by column). Rounding V over H and rounding W over the reference's
outputs have the same minimum, so every solver is served, plain rounding too.

The ridge is what keeps this honest. Without it V fits the drift on the calibration text alone. From a prototype:
SmolLM2-135M, uniform INT4 g64, 32 k tokens of technical text, KL in nats on 5 k tokens each of (technical, literature,
code, exam questions), damping 0.03; a second implementation of ridge 0.5 gave literature 0.204, so much is chance:

    no drift, inputs of the rounded model     0.125  0.242  0.132  0.200
    ridge 0.03                                0.081  0.253  0.099  0.173
    ridge 0.5                                 0.063  0.188  0.072  0.128
    ridge 1 (the default), damping 0.1        0.060  0.179  0.073  0.127

Each group must see its own input, so the groups of a block are rounded one after the other: with one pass per block,
every layer of it makes up for the same error, and the model is destroyed (2.4 nats).
"""

import torch
from torch import Tensor

from lowprec.errors import ConfigError
from lowprec.solvers.base import LayerStatistics

RIDGE = 1.0


def retargeted(w: Tensor, statistics: LayerStatistics | None, ridge: float = RIDGE) -> Tensor:
    """w [N, K] float32 -> [N, K], the weight to round; `w` itself where the statistics have no drift.

    Raises:
        ConfigError: weight and drift do not fit.
    """
    if statistics is None or statistics.drift is None:
        return w
    hessian, drift = statistics.hessian, statistics.drift
    if drift.shape != (w.shape[1], w.shape[1]):
        raise ConfigError(f"a weight with K = {w.shape[1]} has a drift of shape {tuple(drift.shape)}")
    level = float(hessian.diagonal().mean())
    if level <= 0.0:
        return w
    damped = (hessian + hessian.T) / 2
    damped.diagonal().add_(ridge * level)
    return w + torch.cholesky_solve((w @ drift).T, torch.linalg.cholesky(damped)).T
