"""The next token of each sequence from its logits: the likeliest, or one drawn by temperature and top-p.

p = softmax(logits / temperature);  the likeliest tokens whose p sum to top_p stay, at least one (arXiv 1904.09751)
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowprec.errors import ConfigError, ModelError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How tokens are chosen; one random stream for each row, so that a row does not depend on those beside it.

    Attributes:
        temperature: 0 for the likeliest token.
        top_p: share of the probability that is drawn from.

    Raises:
        ConfigError: a temperature below 0, or a top_p that is no share.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    _streams: dict[int, np.random.Generator] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"the temperature is {self.temperature}; give 0 for the likeliest token, or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; give a share above 0 and up to 1")

    def choose(self, logits: Array) -> Array:
        """[B, V] float32 -> [B] int64.

        Raises:
            ModelError: logits that are NaN or infinite in both ways; names the row.
        """
        if (wrong := np.flatnonzero(np.isnan(logits).any(-1) | ~np.isfinite(logits.max(-1)))).size:
            raise ModelError(f"logits of row {wrong[0]} are not finite: the model, or the text, is damaged")
        if self.temperature == 0:
            likeliest: Array = logits.argmax(-1)
            return likeliest
        return np.array([self._draw(row, number) for number, row in enumerate(logits)], dtype=np.int64)

    def _draw(self, logits: Array, number: int) -> int:
        stream = self._streams.setdefault(number, np.random.default_rng((self.seed, number)))
        scaled = (logits.astype(np.float64) - logits.max()) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        chances = np.exp(scaled[order])
        chances /= chances.sum()
        kept = chances[: int(np.searchsorted(chances.cumsum(), self.top_p)) + 1]
        return int(order[stream.choice(len(kept), p=kept / kept.sum())])
