"""A ladder: the rungs between which one stored model moves at run time, with what each loses and how long it takes.

A rung names a level for every group of layers. Rungs stand from the cheapest to the dearest, so that a higher index is
higher precision; the last is the top. What a ladder must hold to be one is checked when it is built:

    monotone     going up no group goes down, unless both rungs' losses and times are measured and apart: then the
                 intervals prove that the step is one
    useful       going up loses no more, and going down some measured pass takes less time
    plausible    finite, positive times; p20 <= p50 <= p80; lower <= loss <= upper; tokens strictly rising

Time of a pass that was not measured: linear between the measured numbers of tokens; below the first the first (a pass
has fixed costs); beyond the last in proportion. A step that reads prompts and decodes is a pass for each prompt and one
for all that is decoded, one after the other, as `lowprec.live` does it. A runtime that fuses them takes less.

Left out: the length of the context. Decode times hold at `context_tokens`.
"""

import bisect
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowprec.errors import ArtifactError, ConfigError
from lowprec.records import SCHEMA_VERSION, Origin, from_json, to_json
from lowprec.registry import closest

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
ORIGINS: tuple[Origin, ...] = ("measured", "modelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTime:
    """Microseconds of one forward pass: over `tokens` tokens of prompts, or one token each of `tokens` sequences."""

    tokens: int
    p20_us: float
    p50_us: float
    p80_us: float
    origin: Origin

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"a pass over {self.tokens} tokens: give 1 or more")
        times = (self.p20_us, self.p50_us, self.p80_us)
        if not all(math.isfinite(t) and t > 0 for t in times):
            raise ConfigError(f"a pass over {self.tokens} tokens takes {times} us: times are positive")
        if not self.p20_us <= self.p50_us <= self.p80_us:
            raise ConfigError(f"a pass over {self.tokens} tokens: p20, p50 and p80 are {times} us and must not fall")
        _check_origin(self.origin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One precision of the whole model.

    Attributes:
        levels: (group, level) for every group, in the order of the model.
        loss_nats: KL(reference || rung) per token, with its bounds `loss_lower` and `loss_upper` at the ladder's
            confidence; what is spent is the upper one.
        prefill, decode: times by number of tokens, rising.
    """

    name: str
    levels: tuple[tuple[str, str], ...]
    loss_nats: float
    loss_lower: float
    loss_upper: float
    loss_origin: Origin
    prefill: tuple[PassTime, ...]
    decode: tuple[PassTime, ...]

    def __post_init__(self) -> None:
        bounds = (self.loss_lower, self.loss_nats, self.loss_upper)
        if not all(math.isfinite(v) and v >= 0 for v in bounds) or list(bounds) != sorted(bounds):
            raise ConfigError(
                f"rung {self.name!r} loses {self.loss_nats:g} nats [{self.loss_lower:g}, {self.loss_upper:g}]: "
                "give 0 <= lower <= loss <= upper"
            )
        if not self.levels:
            raise ConfigError(f"rung {self.name!r} has no levels: name one for each group")
        _check_origin(self.loss_origin)
        for phase in PHASES:
            tokens = [t.tokens for t in self.times(phase)]
            if not tokens or any(a >= b for a, b in itertools.pairwise(tokens)):
                raise ConfigError(
                    f"rung {self.name!r} has {phase} times at {tokens} tokens: give some, strictly rising"
                )

    def times(self, phase: Phase) -> tuple[PassTime, ...]:
        """The times of a phase."""
        return self.prefill if phase == "prefill" else self.decode

    def pass_us(self, phase: Phase, tokens: int) -> float:
        """Median microseconds of a pass over `tokens` tokens; 0 for none. How it is read off: see the module."""
        if tokens <= 0:
            return 0.0
        times = self.times(phase)
        at = bisect.bisect_left(times, tokens, key=lambda t: t.tokens)
        if at == len(times):
            return times[-1].p50_us * tokens / times[-1].tokens
        right = times[at]
        if at == 0 or right.tokens == tokens:
            return right.p50_us
        left = times[at - 1]
        share = (tokens - left.tokens) / (right.tokens - left.tokens)
        return left.p50_us + share * (right.p50_us - left.p50_us)

    @property
    def is_measured(self) -> bool:
        """Whether neither its loss nor any of its times is modelled."""
        origins = {self.loss_origin, *(t.origin for phase in PHASES for t in self.times(phase))}
        return origins == {"measured"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The rungs of one stored model, the cheapest first.

    Attributes:
        model, model_digest: whose rungs these are; the digest is that of the stored weights.
        device: what the times are from, or are modelled for.
        levels: names of the levels that the weights hold, the lowest first.
        context_tokens: tokens in the cache of each sequence where decoding was timed.
        loss_tokens: tokens that the losses are from.
        layers: (group, its layers) of the model, so that a switch can be made for it; empty where there is none.
        confidence: one-sided, of each bound of a loss; between 0 and 1.
        notes: (what, how) that a reader must know, such as which times are modelled and from what.

    Raises:
        ConfigError: what the module's docstring demands does not hold; the message has the rungs and the values.
    """

    model: str
    model_digest: str
    device: str
    levels: tuple[str, ...]
    context_tokens: int
    loss_tokens: int
    confidence: float
    rungs: tuple[Rung, ...]
    notes: tuple[tuple[str, str], ...] = ()
    layers: tuple[tuple[str, tuple[str, ...]], ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.context_tokens < 0 or self.loss_tokens < 1:
            raise ConfigError(
                f"decoding at {self.context_tokens} tokens of context, losses from {self.loss_tokens} tokens: "
                "give 0 or more of the first and 1 or more of the second"
            )
        if not 0.0 < self.confidence < 1.0:
            raise ConfigError(f"confidence {self.confidence:g} is outside (0, 1): give for example 0.95")
        names = [rung.name for rung in self.rungs]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"a ladder has two rungs or more, each with a name of its own; these are {names}")
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise ConfigError(f"levels {list(self.levels)}: give each a name of its own, the lowest first")
        groups = [group for group, _ in self.rungs[0].levels]
        for rung in self.rungs:
            if [group for group, _ in rung.levels] != groups:
                raise ConfigError(f"rungs {names[0]!r} and {rung.name!r} do not name the same groups in the same order")
            for group, level in rung.levels:
                if level not in self.levels:
                    raise ConfigError(
                        f"rung {rung.name!r} wants level {level!r} for {group}, which the weights do not hold: "
                        f"{closest(level, list(self.levels))}"
                    )
        if self.layers and [group for group, _ in self.layers] != groups:
            raise ConfigError("the ladder has layers of other groups than its rungs have levels for")
        for lower, upper in itertools.pairwise(self.rungs):
            self._check_step(lower, upper)

    def _check_step(self, lower: Rung, upper: Rung) -> None:
        pair = f"from rung {lower.name!r} to {upper.name!r}"
        if reason := reason_for_no_step(lower, upper):
            raise ConfigError(f"{pair} {reason}")
        fallen = [
            group
            for (group, below), (_, above) in zip(lower.levels, upper.levels, strict=True)
            if self.levels.index(above) < self.levels.index(below)
        ]
        if fallen and not _proved(lower, upper):
            raise ConfigError(
                f"{pair} {fallen[0]} falls ({len(fallen)} groups do), and no measurement proves that this is a step "
                "up: losses and times must both be measured, and their intervals apart"
            )

    @property
    def top(self) -> int:
        """Index of the highest rung."""
        return len(self.rungs) - 1

    def rung_named(self, name: str) -> int:
        """The index of a rung; ConfigError with a suggestion where there is none."""
        names = [rung.name for rung in self.rungs]
        if name not in names:
            raise ConfigError(f"the ladder has no rung {name!r}: {closest(name, names)}")
        return names.index(name)

    def check_model(self, model_digest: str) -> None:
        """Refuses a model that the ladder is not for.

        Raises:
            ConfigError: the digests differ.
        """
        if model_digest != self.model_digest:
            raise ConfigError(
                f"the ladder is for {self.model} with digest {self.model_digest}, this model's is {model_digest}: "
                "losses and times of another model say nothing; make a ladder for this one"
            )

    def seconds(self, phase: Phase, most: int) -> tuple[tuple[float, ...], ...]:
        """Seconds of a pass for 0..`most` tokens, a row for each rung."""
        return tuple(tuple(1e-6 * rung.pass_us(phase, n) for n in range(most + 1)) for rung in self.rungs)


def reason_for_no_step(lower: Rung, upper: Rung) -> str | None:
    """Why `upper` is no step up from `lower` by their losses and times, None if it is."""
    if upper.loss_nats > lower.loss_nats:
        return (
            f"loss rises from {lower.loss_nats:g} to {upper.loss_nats:g} nats: "
            "rungs stand from the cheapest to the dearest"
        )
    if all(lower.pass_us(phase, t.tokens) >= t.p50_us for phase in PHASES for t in upper.times(phase)):
        return f"no pass takes longer: leave {lower.name!r} out, it loses more and wins nothing"
    return None


def _proved(lower: Rung, upper: Rung) -> bool:
    """Whether measurements alone show that `upper` loses less and takes longer."""
    if not (lower.is_measured and upper.is_measured) or upper.loss_upper >= lower.loss_lower:
        return False
    below = {t.tokens: t for t in lower.decode}
    shared = [t for t in upper.decode if t.tokens in below]
    return bool(shared) and all(below[t.tokens].p80_us < t.p20_us for t in shared)


def _check_origin(origin: str) -> None:
    if origin not in ORIGINS:
        raise ConfigError(f"unknown origin {origin!r}: {closest(origin, list(ORIGINS))}")


def write_ladder(ladder: Ladder, path: Path) -> None:
    """Writes `ladder` as JSON; the folder must exist.

    Raises:
        ArtifactError: the file cannot be written.
    """
    try:
        path.write_text(to_json(ladder), encoding="utf-8")
    except OSError as error:
        raise ArtifactError(path, f"cannot be written ({error.strerror})") from error


def _record(text: str) -> str:
    """The ladder in what a run stores; any other text as it is."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return text
    return json.dumps(whole["record"]) if isinstance(whole, dict) and {"inputs", "record"} <= set(whole) else text


def read_ladder(path: Path, model_digest: str | None = None) -> Ladder:
    """The ladder of a file; with `model_digest`, only if it is that model's.

    A run's ladder.json, which has the digests of its inputs beside it, is read as well.

    Raises:
        ArtifactError: the file is missing or cannot be read.
        ConfigError: it is no ladder, one that breaks its rules, of another version, or of another model.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ArtifactError(path, f"cannot be read as a ladder ({reason})") from error
    try:
        ladder = from_json(Ladder, _record(text))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if model_digest is not None:
        ladder.check_model(model_digest)
    return ladder
