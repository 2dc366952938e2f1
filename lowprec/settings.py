"""What a run is asked to do, and what the efforts mean in tokens."""

from dataclasses import dataclass, field
from pathlib import Path

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.records import Budget, Objective, Workload
from lowprec.registry import closest


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much work a run may do.

    Attributes:
        calibration_tokens: tokens whose inputs the Hessians are summed over.
        sensitivity_tokens: tokens, others than those, that the backward pass goes through: an error that a solver has
            compensated on some text must not be scored on the same text.
        tuning_tokens, held_out_tokens: tokens that the mix is verified on, and those of each look of the judge.
        checked_pairs, checked_tokens: (group, scheme) pairs measured directly, and on how many tokens.
        compensated: round every mix that is measured once more, each group making up for those before it.
        weighted: whether the tokens of the calibration text weigh as their gradients say in that.
        two_sided: whether rows make up for each other's errors in that, as their outputs' gradients say.
        learning_steps: steps of learned rounding for each block of every mix that is compensated.
        healing_passes: passes over the calibration text that tune the scales of every mix that is measured; 0.5 is half
            of it.
        rounds: verification rounds at most.
        window: tokens of a window.
        solver: rounds weights of fewer than 8 bits.
    """

    name: str
    calibration_tokens: int
    sensitivity_tokens: int
    tuning_tokens: int
    held_out_tokens: int
    checked_pairs: int
    checked_tokens: int
    compensated: bool
    rounds: int
    window: int = 256
    solver: str = "gptq"
    weighted: bool = False
    two_sided: bool = False
    learning_steps: int = 0
    healing_passes: float = 0.0

    def __post_init__(self) -> None:
        if (self.weighted or self.two_sided or self.learning_steps) and not self.compensated:
            raise ConfigError(f"effort {self.name!r}: weighted, two_sided and learning_steps are parts of compensated")
        if not self.healing_passes >= 0:
            raise ConfigError(f"effort {self.name!r}: {self.healing_passes:g} passes of healing: give 0 or more")


EFFORTS = {
    effort.name: effort
    for effort in (
        Effort(
            name="fast",
            calibration_tokens=18_432,
            sensitivity_tokens=8_192,
            tuning_tokens=16_384,
            held_out_tokens=41_000,
            checked_pairs=24,
            checked_tokens=1_024,
            compensated=False,
            rounds=3,
            solver="gptq-quick",
        ),
        Effort(
            name="balanced",
            calibration_tokens=32_768,
            sensitivity_tokens=32_768,
            tuning_tokens=24_576,
            held_out_tokens=44_000,
            checked_pairs=24,
            checked_tokens=8_192,
            compensated=True,
            rounds=4,
        ),
        Effort(
            name="best",
            calibration_tokens=49_152,
            sensitivity_tokens=32_768,
            tuning_tokens=49_152,
            held_out_tokens=64_000,
            checked_pairs=48,
            checked_tokens=4_096,
            compensated=True,
            weighted=True,
            two_sided=True,
            rounds=4,
            healing_passes=1.0,
        ),
    )
}


OBJECTIVES: tuple[Objective, ...] = ("time", "bytes", "dollars")
DEVICES = ("cpu", "cuda")
KV_CACHES = {"8": "kv8-int8", "int8": "kv8-int8", "fp8": "kv8-fp8", "int8-channel": "kv8-channel-int8"}
KEPT = "none"
"""What says that the KV cache stays as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that a run is told, beside the model.

    Attributes:
        schemes: names of schemes or families that may be chosen, none for what the target offers; bf16 always may.
        data: files, dataset names or built-in sources; empty for the offline default.
        device: what the cost is for: "cpu", "cuda", or a device to plan for such as "h100".
        dollars_per_hour: price of that device, None for its list price.
        calibration_device: where calibration computes.
        smooth: whether scales are merged between layers, so that less is lost by rounding; the model's function stays.
        rotate: whether hidden states, and values in heads, are put into a random basis first; the model's function
            stays, a head that was tied to the embedding gets a weight of its own.
        heal: whether mixes are healed; None leaves it to the effort.
        embeddings: whether embeddings are rounded as well, one that a head is tied to with the head; None: when bytes
            are the objective. Such an artefact is in lowprec's own form.
        ladder: whether the run makes, after its plan, one set of weights of two levels and the rungs between which they
            switch while a model serves.
        kv_cache: what the KV cache may be kept in: "8" or "int8" for INT8, each head of each token with a scale,
            layers, keys and values by themselves; "fp8" for FP8 with calibrated scales in all layers at once, which
            checkpoints can say; "int8-channel" for INT8 with a calibrated scale for each channel, in all layers, which
            onnxruntime's attention computes with; "none" to leave it as it is; None for what the target offers. Our own
            runtime offers none, since it pays for few: what is judged is generation with such a cache, in torch a step
            takes longer by what is decoded, and the bytes count where contexts are long or batches large.
        workers: threads that round layers side by side; they do not change the results.
    """

    out: Path
    budget: Budget = field(default_factory=Budget)
    target: str = "torch"
    device: str = "cpu"
    objective: Objective = "time"
    workload: Workload = field(default_factory=Workload)
    effort: Effort = EFFORTS["fast"]
    schemes: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    dollars_per_hour: float | None = None
    calibration_device: str = "cpu"
    smooth: bool = True
    rotate: bool = False
    heal: bool | None = None
    embeddings: bool | None = None
    ladder: bool = False
    kv_cache: str | None = None
    seed: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"unknown objective {self.objective!r}: {closest(self.objective, OBJECTIVES)}")
        if self.calibration_device not in DEVICES:
            raise ConfigError(
                f"unknown calibration device {self.calibration_device!r}: {closest(self.calibration_device, DEVICES)}"
            )
        _require_device(self.calibration_device)
        if self.kv_cache is not None and self.kv_cache not in (KEPT, *KV_CACHES):
            raise ConfigError(f"unknown KV cache {self.kv_cache!r}: {closest(self.kv_cache, [*KV_CACHES, KEPT])}")
        if self.kv_cache in KV_CACHES and self.ladder:
            raise ConfigError(
                "rungs are measured with the KV cache as it is: give either a ladder or a KV cache format"
            )
        if self.workers < 1:
            raise ConfigError(f"{self.workers} workers: give 1 or more")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed}: give 0 or more")

    @property
    def rounds_embeddings(self) -> bool:
        """Whether embeddings are quantised."""
        return self.objective == "bytes" if self.embeddings is None else self.embeddings

    @property
    def fuses(self) -> bool:
        """Whether layers that runtimes fuse share a scheme; nothing that reads embeddings in codes fuses any."""
        return not self.rounds_embeddings

    def cache_format(self, offered: str | None) -> str | None:
        """The cache format that keys and values may have, None for none; `offered` is the target's."""
        if self.kv_cache is None:
            return None if self.ladder else offered
        return KV_CACHES.get(self.kv_cache)

    @property
    def healing_passes(self) -> float:
        """How often healing goes through the calibration text."""
        if self.heal is None:
            return self.effort.healing_passes
        return (self.effort.healing_passes or 1.0) if self.heal else 0.0


def _require_device(name: str) -> None:
    if name != "cuda":
        return
    # Settings alone need no torch.
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError(
            "calibration device 'cuda' cannot be used",
            (
                f"torch {torch.__version__} finds no CUDA device here: calibrate on 'cpu', or install a driver and a "
                "torch built for CUDA",
            ),
        )


def effort_named(name: str) -> Effort:
    """The effort called `name`; ConfigError with a suggestion when there is none."""
    if name not in EFFORTS:
        raise ConfigError(f"unknown effort {name!r}: {closest(name, list(EFFORTS))}")
    return EFFORTS[name]


def parse_budget(text: str | float, metric: str = "perplexity", confidence: float = 0.95) -> Budget:
    """A budget from "5%" or "0.05" (relative), or "0.05 abs" (absolute, in the metric's own unit).

    Raises:
        ConfigError: not a share between 0 and 1.
    """
    words = str(text).strip().split()
    kind = "absolute" if len(words) == 2 and words[1] == "abs" else "relative"
    number = words[0] if words and len(words) <= (2 if kind == "absolute" else 1) else ""
    try:
        limit = float(number.removesuffix("%")) / (100.0 if number.endswith("%") else 1.0)
    except ValueError as error:
        raise ConfigError(f"budget {text!r} is no number: give a share like 5% or 0.05") from error
    # Only these two have a value for the reference that a loss could be a share of.
    relative = kind == "relative" and (metric == "perplexity" or metric.startswith("task:"))
    return Budget(metric=metric, limit=limit, kind="relative" if relative else "absolute", confidence=confidence)
