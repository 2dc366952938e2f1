"""The loss of a mix on tuning data, by what all mixes lost there per nat of KL.

A token's loss is a difference of two log-likelihoods, d = log p_y - log q_y, and the variance of its noise is about
twice its KL; the KL itself is an expectation over the whole vocabulary and known far better. On a small budget that
noise is as large as what separates two mixes, so that the one of less KL may lose more. Mixes that were rounded in the
same way lose alike per nat, so this is one number for all of them,

    c = sum over mixes m and units u of d_mu / sum of kl_mu        loss_m = c KL_m

(the combined ratio estimator: Cochran, Sampling Techniques, 1977, section 6.11). Measured on SmolLM2-135M, budget of
1 %, 71 k tokens: mixes of 0.025, 0.022 and 0.017 nats lost 0.61, 1.11 and 0.53 % each by itself.

The upper bound of loss_m has three independent parts, added as squares: what is not known of c, what is not known of
KL_m on other text, and the noise of the text that the judge will read, which no pooling makes smaller. Where few units
hold most of the KL, c is known less well than loss_m itself; a mix keeps its own bound then.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lowprec.steps.judge import Floats, ratio_bounds
from lowprec.steps.scores import UnitSums
from lowprec.steps.verify import Measured


def pooled(mixes: Sequence[Measured], judged: float, confidence: float, seed: int = 0) -> list[Measured]:
    """The mixes with the upper bounds that they have by all of them together; their own losses stay.

    Args:
        mixes: of one rounding, each measured on the same units by itself; one without `units` stays as it is.
        judged: tokens that the judge may read, as a multiple of those that the mixes were measured on.
        confidence: of the bounds.
    """
    known = [mix.units for mix in mixes if mix.units is not None]
    loss, kl = (sum((np.array(getattr(units, name)) for units in known), np.zeros(1)) for name in ("loss", "kl"))
    if kl.sum() <= 0.0:
        return list(mixes)
    ratio = ratio_bounds(loss, kl, confidence, seed=seed)

    def bounded(mix: Measured, units: UnitSums) -> Measured:
        own: Floats = np.array(units.kl)
        nats = ratio_bounds(own, np.array(units.tokens), confidence, seed=seed)
        parts = (
            (ratio.upper - ratio.estimate) * nats.estimate,
            ratio.estimate * (nats.upper - nats.estimate),
            (mix.upper - mix.loss) / math.sqrt(1.0 + judged),
        )
        reach = math.hypot(*parts)
        if reach >= mix.upper - mix.loss:
            return mix
        return replace(mix, upper=ratio.estimate * nats.estimate + reach)

    return [mix if mix.units is None else bounded(mix, mix.units) for mix in mixes]
