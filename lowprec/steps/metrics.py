"""The budget's metric: how outputs are compared, how tuning tables become a loss with a bound, how the judge is fed.

Inside the search a loss is in the unit in which predictions add: nats of mean loss for perplexity (a relative change r
is ln(1 + r) nats), the metric's own unit otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lowprec.errors import ConfigError
from lowprec.records import Budget
from lowprec.registry import closest
from lowprec.steps.data import TokenSet
from lowprec.steps.judge import Looked, judge
from lowprec.steps.load import Model
from lowprec.steps.measure import Compare, compare_tokens, compare_vectors, paired
from lowprec.steps.scores import PairedValues

DECODER_METRICS = ("perplexity", "kl", "top1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A budget's metric on one kind of model."""

    budget: Budget
    compare: Compare
    tokens: bool
    seed: int

    def limit(self) -> float:
        """The budget in the unit of the search."""
        return math.log1p(self.budget.limit) if self._exponential() else self.budget.limit

    def shown(self, loss: float) -> float:
        """A loss in the unit of the search, as the metric shows it."""
        return math.expm1(loss) if self._exponential() else loss

    def _exponential(self) -> bool:
        return self.budget.metric == "perplexity"

    def _inner(self, change: float) -> float:
        return math.log1p(max(change, -0.99)) if self._exponential() else change

    def looked(self, table: Tensor, data: TokenSet, batches: Sequence[Any]) -> Looked:
        """A comparison's table as the judge takes it."""
        if self.tokens:
            return paired(table, data, batches)
        order = [window for batch in batches for window in batch.index]
        values = table[:, 1].double().numpy()
        return PairedValues(
            unit=np.array([data.units[i] for i in order]),
            source=np.array([data.sources[i] for i in order]),
            weight=np.ones(len(order)),
            reference=np.zeros(len(order)),
            candidate=values,
        )

    def tuning_loss(self, table: Tensor, data: TokenSet, batches: Sequence[Any]) -> tuple[float, float]:
        """(estimate, upper bound) at the confidence of one look of the judge, in the unit of the search."""
        loss = judge([self.looked(table, data, batches)], self.budget, data.source_names, seed=self.seed).loss
        return self._inner(loss.relative), self._inner(loss.upper)


def metric_of(budget: Budget, model: Model, seed: int) -> Metric:
    """The metric that `budget` names, for this model.

    Raises:
        ConfigError: unknown, or not one that this kind of model has.
    """
    if model.kind == "decoder":
        if budget.metric not in DECODER_METRICS:
            raise ConfigError(f"unknown metric {budget.metric!r}: {closest(budget.metric, DECODER_METRICS)}")
        return Metric(budget=budget, compare=compare_tokens, tokens=True, seed=seed)
    if budget.metric in DECODER_METRICS:
        raise ConfigError(f"{model.name} has no logits, so no {budget.metric}: use the metric 'cosine' or your own")
    if budget.kind != "absolute":
        raise ConfigError(f"the reference's {budget.metric!r} is 0, so its budget must be absolute: '0.05 abs'")
    return Metric(budget=budget, compare=compare_vectors(model.metric), tokens=False, seed=seed)
