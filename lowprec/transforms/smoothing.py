"""Smoothing: the scales between layers that let activations and weights be rounded with the least noise together.

SmoothQuant (arXiv 2211.10438, equation 4) takes s_j = max|x_j|^a / max|w_j|^(1-a). Here the noise itself is made
least. A token rounded by its largest value carries noise of variance max_j (x_tj / s_j)^2 / (12 qmax^2) on every
channel, which the weights w_nj s_j pass on; a group of weights rounded by its largest value does the same to the
inputs:

    minimise over s    mean_t max_j (x_tj / s_j)^2  sum_nj (w_nj s_j)^2 / 127^2
                     + sum over rows n and groups of max_j (w_nj s_j)^2  mean_t sum_j (x_tj / s_j)^2 / qmax^2

by Adam on log s (the objective does not depend on the mean of log s, which is kept 0); what comes of it is rounded to
powers of two. The weights' noise is the larger part by far in INT4, where columns of one group must stay alike: scales
that are right for INT8 make INT4 g64 worse by half (SmolLM2-135M, compensated and healed: KL 0.169 instead of 0.105).
So there is a set of scales for each format of the weights, and none where inputs are not rounded.

Tried on SmolLM2-135M, all layers of the blocks in W8A8 rounded plainly, KL in nats over 2 k tokens each of four texts:
no scales 0.031; SmoothQuant with a = 0.5, rounded to powers of two 0.015 (a = 0.35: 0.024); these 0.010; the same not
rounded to powers of two 0.0085, which the weights' own precision cannot hold exactly. A sample of 256 tokens and 256
rows and 60 steps reach the same noise as 512 tokens, all rows and 150 steps, to within 6 %.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lowprec.formats import WeightFormat
from lowprec.formats.int8 import QMAX

STEPS, RATE = 60, 0.1
LARGEST_EXPONENT = 8
MEANS = 8


def fit_exponents(
    x: Tensor, w: Tensor, fmt: WeightFormat, channels: int, spread: Callable[[Tensor], Tensor] = lambda s: s
) -> Tensor:
    """The scales' exponents, [channels] int64.

    Args:
        x: [T, K] float32, a sample of the layers' input.
        w: [N, K] float32, the weights of all layers that read it.
        fmt: what the weights are rounded to.
        channels: how many scales there are.
        spread: [channels] -> [K].
    """
    noise = _Noise(x, w, fmt, spread)
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

    def __init__(self, x: Tensor, w: Tensor, fmt: WeightFormat, spread: Callable[[Tensor], Tensor]) -> None:
        groups = w.shape[1] // (fmt.group_size or w.shape[1])
        self._x2, self._w2, self._spread = x.square() / QMAX**2, w.square().view(len(w), groups, -1), spread
        self._seen, self._read = x.square().mean(0), w.square().sum(0)
        self._qmax = 2 ** (fmt.bits - 1) - 1

    def __call__(self, shift: Tensor) -> Tensor:
        square = self._spread(2.0 * shift).exp()
        activations = (self._x2 / square).amax(1).mean() * (self._read * square).sum()
        of_group = square.view(self._w2.shape[1], -1)
        largest = (self._w2 * of_group).amax(-1).sum(0)
        weights = (largest * (self._seen.view_as(of_group) / of_group).sum(-1)).sum() / self._qmax**2
        return torch.log(activations + weights)
