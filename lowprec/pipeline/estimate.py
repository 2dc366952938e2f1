"""What a run will take, before it starts: memory, disk and time, from the model's shape and one short measurement."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from lowprec.artifacts.compressed_tensors import CONFIG_BYTES
from lowprec.settings import Effort, Settings
from lowprec.steps.importance import OUTPUT_ROWS, OUTPUT_TOKENS
from lowprec.steps.learn import STEP_TOKENS
from lowprec.steps.linear import linear_layers, weight_of
from lowprec.steps.metrics import text_growth
from lowprec.steps.tokens import BATCH_TOKENS, PORTION_TOKENS
from lowprec.targets import TARGETS, RuntimeTarget

LIBRARIES_BYTES = 0.9e9
LOGITS_COPIES = 6
TABLE_FORMATS = 4
DEPLOYED_COPIES = 3
PASSES_FORWARD_BACKWARD = 4
# Of a block's, in float32 where the disk has bfloat16: as gathered, ordered, and factorised.
OUTPUT_COPIES = 3 * 2
PROBE_K, PROBE_RUNS = 4096, 7
# Over tuning text: the reference, the lower level as a mix, and seven rungs.
LADDER_RUNS = 9
LEVEL_BYTES = 3.2
# Of a run's time, what its matmuls take; the rest is rounding, softmaxes over the vocabulary, attention, disk.
SHARE_OF_MATMULS = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Expected peak memory, disk and time of a run."""

    memory_bytes: int
    disk_bytes: int
    seconds: float

    def __str__(self) -> str:
        minutes = round(self.seconds / 60)
        time_ = "1 minute" if minutes <= 1 else f"{minutes} minutes"
        return f"about {self.memory_bytes / 1e9:.1f} GB of memory, {self.disk_bytes / 1e9:.1f} GB of disk and {time_}"


def estimate(module: nn.Module, settings: Settings) -> Estimate:
    """What optimising `module` with `settings` is expected to take on this machine.

    A runtime with files of its own takes copies in float32: of the artefact, its graph and its session.

    Memory: the stored weights, two blocks and everything outside them in float32, the samples' hidden states, and a
    few buffers of logits; of a turned model a copy in float32 as well, or before that one in float64.
    Disk: codes, samples and the artefact, with the room that it asks for beside its weights.
    Time: the tokens that pass through the model, forwards counted once and backwards as three,
    over the measured speed of a matmul.
    """
    effort = settings.effort
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    layers = linear_layers(module)
    parameters = sum(weight_of(layer).numel() for layer in layers.values())
    wide = max((weight_of(layer).shape[0] for layer in layers.values()), default=1)
    hidden = max((weight_of(layer).shape[1] for layer in layers.values()), default=1)
    depth = max((len(m) for m in module.modules() if isinstance(m, nn.ModuleList)), default=1)
    block = 4.0 * parameters / depth
    embedding = 4.0 * sum(p.numel() for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    # The errors of a table that is quantised as well, in every format of its own at once.
    tables = 0.5 * embedding * TABLE_FORMATS if settings.rounds_embeddings else 0.0
    turned = 4.0 * sum(p.numel() for p in module.parameters()) + embedding if settings.rotate else 0.0
    growth = text_growth(settings.budget)
    samples = (
        4.0
        * hidden
        * max(
            2 * min(effort.held_out_tokens * growth, PORTION_TOKENS),
            2 * min(effort.tuning_tokens * growth, PORTION_TOKENS),
            effort.calibration_tokens + effort.sensitivity_tokens,
        )
    )
    logits = 4.0 * LOGITS_COPIES * BATCH_TOKENS * wide
    outputs = sum(_output_bytes(weight_of(layer).shape[0]) for layer in layers.values()) * effort.two_sided
    run = 2 * block + embedding + tables + samples + logits + OUTPUT_COPIES * outputs / depth
    scratch = 4.0 * hidden * effort.sensitivity_tokens * (depth + 2) + outputs
    passes = (
        2 * effort.calibration_tokens
        + (PASSES_FORWARD_BACKWARD + 1) * effort.sensitivity_tokens
        + effort.checked_pairs * effort.checked_tokens * 0.6
        + 3 * growth * effort.tuning_tokens
        + 2 * growth * effort.held_out_tokens
        + (PASSES_FORWARD_BACKWARD + 1) * _gradient_tokens(effort)
        + effort.rounds * _passes_per_mix(settings) * effort.calibration_tokens
        + settings.ladder * _ladder_passes(settings)
    )
    served = 4.0 * sum(p.numel() for p in module.parameters()) * isinstance(TARGETS[settings.target], RuntimeTarget)
    # Of nested weights: as they are read, a code to a byte, and as they run, beside the model they are loaded into.
    levels = settings.ladder * (LEVEL_BYTES * parameters + weights)
    memory = max(
        3.0 * weights + turned + run, weights + 2 * turned, weights + turned + DEPLOYED_COPIES * served,
        weights + turned + run + levels,
    )  # fmt: skip
    return Estimate(
        memory_bytes=int(LIBRARIES_BYTES + memory),
        disk_bytes=int((2.5 + 1.5 * settings.ladder) * max(weights, turned / 2) + scratch + 2 * served) + CONFIG_BYTES,
        seconds=2.0 * parameters * passes / (SHARE_OF_MATMULS * _flops_per_second(hidden)),
    )


def _output_bytes(rows: int) -> float:
    """On disk, of what is known of a layer's outputs (`lowprec.steps.importance`): bfloat16, in parts."""
    whole, rest = divmod(rows, OUTPUT_ROWS)
    return 2.0 * (whole * OUTPUT_ROWS**2 + rest**2)


def _gradient_tokens(effort: Effort) -> int:
    """Tokens that gradients are taken of for compensation: all where they weigh, the first ones for outputs alone."""
    if effort.weighted:
        return effort.calibration_tokens
    return min(OUTPUT_TOKENS, effort.calibration_tokens) if effort.two_sided else 0


def _passes_per_mix(settings: Settings) -> float:
    """Forward passes over the calibration text that rounding one mix takes."""
    effort = settings.effort
    compensated = 4 if effort.compensated else 0
    learned = PASSES_FORWARD_BACKWARD * effort.learning_steps * STEP_TOKENS / effort.calibration_tokens
    return compensated + effort.compensated * learned + (PASSES_FORWARD_BACKWARD + 1) * settings.healing_passes


def _ladder_passes(settings: Settings) -> float:
    """Tokens that pass through the model for a ladder: the lower level rounded, the higher fitted, rungs measured."""
    effort, growth = settings.effort, text_growth(settings.budget)
    return (_passes_per_mix(settings) + 1) * effort.calibration_tokens + LADDER_RUNS * growth * effort.tuning_tokens


def _flops_per_second(k: int) -> float:
    """float32 speed of this machine on a batch through a layer of K = k, N = 2 k, from a short measurement."""
    k = min(k, PROBE_K)
    x, w = torch.ones(BATCH_TOKENS, k), torch.ones(2 * k, k)
    seconds = []
    for _ in range(PROBE_RUNS):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        seconds.append(time.perf_counter() - start)
    return 4.0 * BATCH_TOKENS * k * k / statistics.median(seconds)
