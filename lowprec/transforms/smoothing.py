"""Smoothing: the scales between layers that let activations and weights be rounded with the least noise together.

SmoothQuant (arXiv 2211.10438, equation 4) takes s_j = max|x_j|^a / max|w_j|^(1-a). Here the noise itself is made
least. A token rounded by its largest value carries noise of variance max_j (x_tj / s_j)^2 / (12 qmax^2) on every
channel, which the weights w_nj s_j pass on; a row of weights rounded by its largest value does the same to the inputs:

    minimise over s    mean_t max_j (x_tj / s_j)^2  sum_nj (w_nj s_j)^2     activations, a scale a token
                     + sum_n max_j (w_nj s_j)^2  mean_t sum_j (x_tj / s_j)^2    weights, a scale a row

by Adam on log s (the objective does not depend on the mean of log s, which is kept 0); what comes of it is rounded to
powers of two. Groups of columns with scales of their own (INT4) have less noise in the weights than this says.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

STEPS, RATE = 150, 0.05
LARGEST_EXPONENT = 8
MEANS = 8


def fit_exponents(x: Tensor, w: Tensor, channels: int, spread: Callable[[Tensor], Tensor] = lambda s: s) -> Tensor:
    """The scales' exponents, [channels] int64.

    Args:
        x: [T, K] float32, a sample of the layers' input.
        w: [N, K] float32, the weights of all layers that read it.
        channels: how many scales there are.
        spread: [channels] -> [K].
    """
    noise = _Noise(x, w, spread)
    shift = torch.zeros(channels, requires_grad=True)
    optimiser = torch.optim.Adam([shift], lr=RATE)
    best, least = shift.detach().clone(), math.inf
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = RATE * 0.5 * (1.0 + math.cos(math.pi * step / STEPS))
        value = noise(shift)
        if value.item() < least:
            best, least = shift.detach().clone(), value.item()
        optimiser.zero_grad()
        torch.autograd.backward(value)
        optimiser.step()
    # The mean is free, so it is put where rounding to powers of two costs least.
    log2 = (best - best.mean()) / math.log(2.0)
    rounded = [(log2 + i / MEANS).round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT) for i in range(MEANS)]
    with torch.no_grad():
        return min(rounded, key=lambda e: noise(e * math.log(2.0)).item()).long()


class _Noise:
    """Logarithm of the objective, a function of log s [channels]."""

    def __init__(self, x: Tensor, w: Tensor, spread: Callable[[Tensor], Tensor]) -> None:
        self._x2, self._w2, self._spread = x.square(), w.square(), spread
        self._seen, self._read = self._x2.mean(0), self._w2.sum(0)

    def __call__(self, shift: Tensor) -> Tensor:
        square = self._spread(2.0 * shift).exp()
        activations = (self._x2 / square).amax(1).mean() * (self._read * square).sum()
        weights = (self._w2 * square).amax(1).sum() * (self._seen / square).sum()
        return (activations + weights).log()
