"""What rounding a whole mix wins over rounding each group by itself, as the allocation should know it.

The sensitivity scores every group as calibration rounded it, alone. A mix is rounded once more, compensated and healed
(`lowprec.steps.compensate`, `lowprec.steps.heal`), and what that wins differs: formats of few bits win most, a table
that an embedding shares nothing. So the predicted KL of what is improved is multiplied by one factor c,

    KL = c sum over improved groups of predicted + sum over the others of predicted

first by experience, then as the measured mixes say, by least squares over them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lowprec.steps.allocate import Option
from lowprec.steps.verify import Options, Round

SMALLEST, LARGEST = 0.1, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Corrects predicted losses; see the module's docstring.

    Attributes:
        improved: (group, scheme) -> whether rounding the whole mix improves it.
        prior: the factor before anything was measured.
    """

    improved: Callable[[str, str], bool]
    prior: float

    def __call__(self, options: Options, taken: Sequence[Round]) -> dict[str, list[Option]]:
        """The options as calibration scored them -> as the mixes in `taken` say."""
        factor = self.factor(options, taken)
        return {
            group: [replace(o, loss=o.loss * factor) if self.improved(group, o.scheme) else o for o in found]
            for group, found in options.items()
        }

    def factor(self, options: Options, taken: Sequence[Round]) -> float:
        """c."""
        predicted = {(group, o.scheme): o.loss for group, found in options.items() for o in found}
        products = squares = 0.0
        for one in taken:
            parts = {True: 0.0, False: 0.0}
            for choice in one.allocation.schemes:
                parts[self.improved(*choice)] += predicted[choice]
            products += parts[True] * (one.measured.kl_nats - parts[False])
            squares += parts[True] ** 2
        return min(max(products / squares, SMALLEST), LARGEST) if squares > 0.0 else self.prior
