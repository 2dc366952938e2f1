"""The loss of a mix on tuning data, by what mixes like it lost there per nat of KL.

A token's loss is a difference of two log-likelihoods, d = log p_y - log q_y, and the variance of its noise is about
twice its KL; the KL itself is an expectation over the whole vocabulary and known far better. On a small budget that
noise is as large as what separates two mixes, so that the one of less KL may lose more. Mixes of about the same KL that
were rounded in the same way lose alike per nat, so this is one number for them,

    c = sum over mixes m and units u of d_mu / sum of kl_mu        loss_m = c KL_m

(the combined ratio estimator: Cochran, Sampling Techniques, 1977, section 6.11). Measured on SmolLM2-135M, budget of
1 %, 71 k tokens: mixes of 0.025, 0.022 and 0.017 nats lost 0.61, 1.11 and 0.53 % each by itself. Mixes of another KL
say little: healed ones of 0.02, 0.05, 0.08 and 0.11 nats lost 0.29, 0.52, 0.45 and 0.69 per nat, since healing moves
outputs towards the text and wins the more of a loss the smaller it is. So each mix is taken together with those whose
KL is at most NEAR times its own, and at least that part of it.

The upper bound of loss_m has three independent parts, added as squares: what is not known of c, what is not known of
KL_m on other text, and the noise of the text that the judge will read, which no pooling makes smaller. Where few units
hold most of the KL, c is known less well than loss_m itself; a mix keeps its own bound then.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lowprec.steps.judge import ratio_bounds
from lowprec.steps.scores import UnitSums
from lowprec.steps.verify import Measured

NEAR = 1.5


def pooled(mixes: Sequence[Measured], judged: float, confidence: float, seed: int = 0) -> list[Measured]:
    """The mixes with the upper bounds that they have together with those near them; their own losses stay.

    Args:
        mixes: of one rounding, each measured on the same units by itself; one without `units` stays as it is.
        judged: tokens that the judge may read, as a multiple of those that the mixes were measured on.
        confidence: of the bounds.
    """
    known = [(mix, mix.units) for mix in mixes if mix.units is not None]

    def bounded(mix: Measured, own: UnitSums) -> Measured:
        near = [units for other, units in known if 1.0 / NEAR <= other.kl_nats / mix.kl_nats <= NEAR]
        loss, kl = (sum((np.array(getattr(units, name)) for units in near), np.zeros(1)) for name in ("loss", "kl"))
        ratio = ratio_bounds(loss, kl, confidence, seed=seed)
        nats = ratio_bounds(np.array(own.kl), np.array(own.tokens), confidence, seed=seed)
        parts = (
            (ratio.upper - ratio.estimate) * nats.estimate,
            ratio.estimate * (nats.upper - nats.estimate),
            (mix.upper - mix.loss) / math.sqrt(1.0 + judged),
        )
        reach = math.hypot(*parts)
        if reach >= mix.upper - mix.loss:
            return mix
        return replace(mix, upper=ratio.estimate * nats.estimate + reach)

    return [mix if mix.units is None or mix.kl_nats <= 0.0 else bounded(mix, mix.units) for mix in mixes]
