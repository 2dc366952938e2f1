"""Times both levels of nested weights, and whole forward passes at every rung of a ladder, none interpolated.

Rungs take turns, so that what else the machine does meets all of them alike: only ratios within one call say something.
Prompts are read at the top, so their times are measured there and hold for every rung.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from lowprec.errors import ModelError
from lowprec.formats import WEIGHT_FORMATS
from lowprec.formats.nested import LEVELS, bits_per_weight
from lowprec.ladder import PassTime, Phase
from lowprec.records import CostSample
from lowprec.runtime.measure import measure_levels
from lowprec.targets.base import Progress
from lowprec.targets.torch import OP, Cached
from lowprec_kernels.cpu_nested import few_rows_form


def level_name(fmt: str, level: int) -> str:
    """What cost samples call a level of nested weights on a base in `fmt`."""
    return f"{fmt}@{level}"


def time_levels(fmt: str, n: int, k: int, ms: Sequence[int]) -> list[CostSample]:
    """A sample for each level of a nested weight [n, k] on a base in `fmt`, and number of rows, on this CPU."""
    bits = {level: 8.0 * WEIGHT_FORMATS[fmt].bytes_per_row(k) / k for level in LEVELS}
    bits[max(LEVELS)] = bits_per_weight(fmt, k)
    samples = []
    for (level, m), found in measure_levels(fmt, n, k, ms).items():
        samples.append(
            CostSample(
                op=OP,
                m=m,
                n=n,
                k=k,
                scheme=level_name(fmt, level),
                kernel=few_rows_form(WEIGHT_FORMATS[fmt].group_size or k),
                p20_us=found.p20_us,
                p50_us=found.p50_us,
                p80_us=found.p80_us,
                bytes=round(bits[level] * n * k / 8),
                origin="measured",
            )
        )
    return samples


Times = dict[Phase, tuple[PassTime, ...]]


def measure_passes(
    model: nn.Module,
    set_rung: Callable[[int], None],
    rungs: int,
    *,
    batches: Sequence[int],
    prompts: Sequence[int],
    context: int,
    repeats: int = 9,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda done, total: None,
) -> list[Times]:
    """Microseconds of passes of a causal transformers model, for each rung: p20, p50 and p80 over `repeats`.

    Args:
        set_rung: puts the model at a rung; the highest one is the top.
        batches: sequences that are decoded together, rising; each has `context` tokens in its cache.
        prompts: tokens of one prompt that a pass reads, rising.
        clock: seconds; on a machine that others compute on, processor seconds of the one thread that computes.

    Raises:
        ModelError: the model has no KV cache or no vocabulary.
    """
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is None:
        raise ModelError(f"{type(model).__name__} has no config with vocab_size: only causal models can be timed")
    taken: dict[tuple[int, Phase, int], list[float]] = {}
    forward, top, total = Cached(model), rungs - 1, len(batches) + len(prompts)
    generator = torch.Generator().manual_seed(0)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, shape, generator=generator)

    with torch.inference_mode():
        for done, batch in enumerate(batches):
            set_rung(top)
            _, cache = forward(tokens(batch, context))
            given = tokens(batch, 1)
            # The first round lays weights out.
            for repeat in range(repeats + 1):
                # Each begins a round in turn: what comes at regular intervals would meet the same rung again and again.
                for rung in [(repeat + place) % rungs for place in range(rungs)]:
                    set_rung(rung)
                    start = clock()
                    forward(given, cache)
                    if repeat:
                        taken.setdefault((rung, "decode", batch), []).append(clock() - start)
                    cache.crop(-1)
            progress(done + 1, total)
        set_rung(top)
        for done, size in enumerate(prompts):
            given = tokens(1, size)
            for repeat in range(max(3, repeats // 2) + 1):
                start = clock()
                forward(given)
                if repeat:
                    taken.setdefault((top, "prefill", size), []).append(clock() - start)
            progress(len(batches) + done + 1, total)

    def times(rung: int, phase: Phase, sizes: Sequence[int]) -> tuple[PassTime, ...]:
        found = []
        for size in sizes:
            p20, p50, p80 = (1e6 * np.percentile(taken[rung, phase, size], [20, 50, 80])).tolist()
            found.append(PassTime(tokens=size, p20_us=p20, p50_us=p50, p80_us=p80, origin="measured"))
        return tuple(found)

    return [
        {"decode": times(rung, "decode", batches), "prefill": times(top, "prefill", prompts)} for rung in range(rungs)
    ]
