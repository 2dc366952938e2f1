"""The budget's metric: what it is measured on, how outputs are compared, how the judge is fed.

Inside the search a loss is in the unit in which predictions add: nats of mean loss for perplexity (a relative change r
is ln(1 + r) nats), the metric's own unit otherwise. A metric of one's own and that of sentence embeddings are 0 for the
reference, so their budgets are absolute; KL and top-1 (the share of tokens whose first choice changes) likewise.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lowprec.errors import ConfigError
from lowprec.records import Budget
from lowprec.registry import closest
from lowprec.steps.data import Splits
from lowprec.steps.judge import Looked, judge, require_kind
from lowprec.steps.load import Model
from lowprec.steps.measure import Compare, compare_tokens, compare_vectors, mean_kl, paired
from lowprec.steps.scores import PairedScores, PairedValues, unit_sums
from lowprec.steps.tasks import PREFIX, Question, check_above_chance, encode_pair, load_task, paired_answers
from lowprec.steps.tokens import TokenSet
from lowprec.steps.verify import Curve, Measured

DECODER_METRICS = ("perplexity", "kl", "top1", f"{PREFIX}FILE")
TUNING_SHARE = 0.4
USUAL_LIMIT, LARGEST_GROWTH = 0.05, 3.0
PERPLEXITY_PER_KL = {"plain": 0.8, "compensated": 0.6, "healed": 0.4}


class Metric(Protocol):
    """A budget's metric on one model."""

    @property
    def budget(self) -> Budget:
        """What may be lost."""

    @property
    def divergence(self) -> Compare:
        """Compares outputs by KL, or by what stands for it; its last column sums it, its first one counts."""

    @property
    def may_be_blind(self) -> bool:
        """Whether the reference itself can be so bad at it that no loss would show; `looked` then raises."""

    def sets(self, splits: Splits) -> tuple[TokenSet, tuple[TokenSet, ...]]:
        """What the metric is measured on: for tuning, and for each look of the judge."""

    def compare(self, data: TokenSet) -> Compare:
        """Compares outputs on `data`, one of the sets."""

    def looked(self, table: Tensor, data: TokenSet, batches: Sequence[Any]) -> Looked:
        """A comparison's table as the judge takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMetric:
    """Perplexity, KL or top-1 of a decoder on held-out text."""

    budget: Budget
    divergence: Compare = compare_tokens
    may_be_blind: bool = False

    def sets(self, splits: Splits) -> tuple[TokenSet, tuple[TokenSet, ...]]:
        """The text's own splits."""
        return splits.tuning, splits.held_out

    def compare(self, data: TokenSet) -> Compare:
        """Token scores."""
        return self.divergence

    def looked(self, table: Tensor, data: TokenSet, batches: Sequence[Any]) -> Looked:
        """Sums per window."""
        return paired(table, data, batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorMetric:
    """A loss per example: a callable's, or half the squared error of the output."""

    budget: Budget
    divergence: Compare
    value: Compare
    may_be_blind: bool = False

    def sets(self, splits: Splits) -> tuple[TokenSet, tuple[TokenSet, ...]]:
        """The text's own splits."""
        return splits.tuning, splits.held_out

    def compare(self, data: TokenSet) -> Compare:
        """The metric's value per row."""
        return self.value

    def looked(self, table: Tensor, data: TokenSet, batches: Sequence[Any]) -> Looked:
        """One value per window, weighed by its tokens, against a reference of zero."""
        order = _order(batches)
        return PairedValues(
            unit=np.array([data.units[i] for i in order]),
            source=np.array([data.sources[i] for i in order]),
            weight=np.array([float(len(data.ids[i])) for i in order]),
            reference=np.zeros(len(order)),
            candidate=table[:, 1].double().numpy(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One choice of one question as a window: where the continuation starts in it."""

    question: int
    choice: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskMetric:
    """Accuracy of a multiple-choice task: questions for tuning, and others for one look of the judge."""

    budget: Budget
    questions: tuple[Question, ...]
    tokenizer: Any
    seed: int
    divergence: Compare = compare_tokens
    may_be_blind: bool = True
    _asked: dict[str, tuple[_Asked, ...]] = field(default_factory=dict)

    def sets(self, splits: Splits) -> tuple[TokenSet, tuple[TokenSet, ...]]:
        """Two disjoint sets of questions."""
        order = list(range(len(self.questions)))
        random.Random(self.seed).shuffle(order)
        cut = max(1, round(TUNING_SHARE * len(order)))
        return self._set(order[:cut]), (self._set(order[cut:]),)

    def _set(self, chosen: Sequence[int]) -> TokenSet:
        ids, asked = [], []
        for question in chosen:
            for choice, continuation in enumerate(self.questions[question].continuations):
                context, rest = encode_pair(self.tokenizer, self.questions[question].context, continuation)
                ids.append(torch.tensor([*context, *rest]))
                asked.append(_Asked(question=question, choice=choice, start=len(context)))
        data = TokenSet(
            ids=tuple(ids),
            units=tuple(a.question for a in asked),
            sources=(0,) * len(ids),
            documents=tuple(f"question {a.question + 1}" for a in asked),
            source_names=(self.budget.metric.removeprefix(PREFIX),),
        )
        self._asked[data.digest] = tuple(asked)
        return data

    def compare(self, data: TokenSet) -> Compare:
        """[B, 4]: tokens of the continuation, its log-likelihood before and after, KL."""
        asked = self._asked[data.digest]

        def by(reference: Tensor, output: Tensor, batch: Any) -> Tensor:
            rows = []
            for row, (window, length) in enumerate(zip(batch.index, batch.lengths.tolist(), strict=True)):
                where = slice(asked[window].start - 1, length - 1)
                labels = batch.ids[row, asked[window].start : length, None].to(output.device)
                before = reference[row, where].float().log_softmax(-1)
                after = output[row, where].float().log_softmax(-1)
                kl = (before.exp() * (before - after)).sum()
                scores = [before.gather(1, labels).sum(), after.gather(1, labels).sum(), kl]
                rows.append(torch.stack([torch.tensor(float(len(labels))), *[s.cpu() for s in scores]]))
            return torch.stack(rows)

        return by

    def looked(self, table: Tensor, data: TokenSet, batches: Sequence[Any]) -> Looked:
        """Right or wrong, per question; refuses a task at chance level."""
        asked = self._asked[data.digest]
        scores: dict[int, dict[int, tuple[float, float]]] = {}
        for window, (_, before, after, _) in zip(_order(batches), table.tolist(), strict=True):
            scores.setdefault(asked[window].question, {})[asked[window].choice] = (before, after)
        answers = np.array([self.questions[q].answer for q in scores])
        chosen = np.array([np.argmax([found[c] for c in sorted(found)], axis=0) for found in scores.values()])
        before, after = (chosen == answers[:, None]).T.astype(np.float64)
        check_above_chance([self.questions[q] for q in scores], before)
        return paired_answers(before, after)


def _order(batches: Sequence[Any]) -> list[int]:
    return [window for batch in batches for window in batch.index]


def limit_of(budget: Budget) -> float:
    """The budget in the unit of the search."""
    return in_search_unit(budget, budget.limit)


def of_likelihood(budget: Budget) -> bool:
    """Whether the loss is one of log-likelihood per token, so that what is known of those holds."""
    return budget.metric == "perplexity" and budget.kind == "relative"


def text_growth(budget: Budget) -> float:
    """How many times as much text a budget takes as one of USUAL_LIMIT, for noise of the same share of it.

    The loss of a token is a difference of log-likelihoods, whose variance is about twice its KL, and the KL that fits
    is in proportion to the budget: noise / limit = sqrt(2 KL / tokens) / limit falls with limit x tokens. Nothing is
    known like that of metrics that are no loss of likelihood.
    """
    if not of_likelihood(budget):
        return 1.0
    return min(max(USUAL_LIMIT / budget.limit, 1.0), LARGEST_GROWTH)


def expected_curve(budget: Budget, rounding: str = "plain") -> Curve:
    """How the metric's loss is expected to rise with KL, before anything is measured.

    Measured on SmolLM2-135M at 0.04 to 0.07 nats: perplexity's log by 0.8 times the KL, by 0.6 when the rounding was
    compensated and by 0.4 when it was healed, since both move the outputs back towards the text; the share of tokens
    whose first choice changes by 0.5 times its square root. Answers that turn wrong are such changes, too.

    Args:
        rounding: "plain", "compensated" or "healed".
    """
    if budget.metric == "top1" or budget.metric.startswith(PREFIX):
        return Curve(scale=0.5, power=0.5)
    return Curve(scale=1.0 if budget.metric == "kl" else PERPLEXITY_PER_KL[rounding], power=1.0)


def in_search_unit(budget: Budget, change: float) -> float:
    """A change of the metric in the unit of the search."""
    return math.log1p(max(change, -0.99)) if budget.metric == "perplexity" else change


def shown(budget: Budget, loss: float) -> float:
    """A loss in the unit of the search, as the metric shows it."""
    return math.expm1(loss) if budget.metric == "perplexity" else loss


def tuning_loss(
    metric: Metric,
    table: Tensor,
    data: TokenSet,
    batches: Sequence[Any],
    judged_tokens: int,
    seed: int,
    looks: int = 2,
) -> Measured:
    """A mix's loss with its upper bound at the confidence of one look of the judge, in the unit of the search.

    Args:
        judged_tokens: of held-out text that the judge may look at. Its bound has a noise of its own, so this one is
            widened to that of a prediction: by sqrt(1 + tuning tokens / judged tokens).
        looks: that the judge has planned.
    """
    looked = metric.looked(table, data, batches)
    loss = judge([looked], metric.budget, data.source_names, planned_looks=looks, seed=seed).loss
    estimate, upper = (in_search_unit(metric.budget, value) for value in (loss.relative, loss.upper))
    return Measured(
        loss=estimate,
        upper=estimate + (upper - estimate) * math.sqrt(1.0 + data.tokens / max(judged_tokens, 1)),
        kl_nats=mean_kl(table),
        units=unit_sums(looked) if of_likelihood(metric.budget) and isinstance(looked, PairedScores) else None,
    )


def metric_of(budget: Budget, model: Model, seed: int) -> Metric:
    """The metric that `budget` names, for this model.

    Raises:
        ConfigError: unknown, not one that this kind of model has, or without a loss of the budget's kind.
    """
    if model.kind == "decoder":
        if budget.metric.startswith(PREFIX):
            return TaskMetric(budget=budget, questions=load_task(budget.metric), tokenizer=model.tokenizer, seed=seed)
        if budget.metric not in DECODER_METRICS and model.metric is not None:
            by = compare_vectors(model.metric)
            return VectorMetric(budget=replace(budget, kind="absolute"), divergence=compare_tokens, value=by)
        if budget.metric not in DECODER_METRICS:
            raise ConfigError(f"unknown metric {budget.metric!r}: {closest(budget.metric, DECODER_METRICS)}")
        require_kind(budget)
        return TokenMetric(budget=budget)
    if budget.metric in DECODER_METRICS or budget.metric.startswith(PREFIX):
        raise ConfigError(f"{model.name} has no logits, so no {budget.metric}: use the metric 'cosine' or your own")
    own = getattr(model.metric, "__name__", budget.metric)
    if budget.metric not in (own, "cosine", "squared error"):
        raise ConfigError(f"unknown metric {budget.metric!r}: {closest(budget.metric, [own])}")
    by = compare_vectors(model.metric)
    # The reference's own value is 0, so no share of it exists; the number is meant as the difference.
    return VectorMetric(budget=replace(budget, kind="absolute"), divergence=by, value=by)
