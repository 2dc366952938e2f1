"""Step times of the rungs of a ladder, on this machine's CPU: a decoder whose blocks are in INT8 or INT4.

The decoder is of Llama's kind, of few wide blocks with random codes: 187 million weights in them, far beyond the
last-level cache. A time does not depend on what the codes are. Both levels are held side by side here, as two weights:
what a nested format would hold as one. Every rung is measured, none is interpolated; rungs take turns, so that what
else the machine does meets all of them. The clock counts the processor's seconds of the one thread that computes: on a
shared machine it stands still while others run, though not while they use the memory.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from lowprec.artifacts.loading import cache_argument
from lowprec.formats import resolve, scheme_named
from lowprec.ladder import PassTime, Phase
from lowprec.runtime import KernelTable, QuantLinear
from lowprec.runtime.convert import linear_layers
from lowprec.runtime.measure import random_operands
from lowprec.targets.torch import TorchTarget

BUCKETS = (1, 8, 64, 256)
LEVELS = ("w4a16", "w8a16")
HEAD = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of the decoder."""

    blocks: int = 12
    hidden: int = 1024
    intermediate: int = 4096
    heads: int = 16
    kv_heads: int = 4
    vocabulary: int = 16384

    def parameters(self) -> int:
        """Of the linear layers in blocks."""
        kv = self.kv_heads * self.hidden // self.heads
        return self.blocks * self.hidden * (2 * self.hidden + 2 * kv + 3 * self.intermediate)


class Both(nn.Module):
    """One layer at two levels; `level` says which one computes."""

    def __init__(self, n: int, k: int, schemes: Sequence[str], table: KernelTable) -> None:
        super().__init__()
        made = []
        for name in schemes:
            scheme = resolve(scheme_named(name), k)
            made.append(QuantLinear(random_operands(scheme, n, k), scheme, table))
        self.levels, self.level = nn.ModuleList(made), len(made) - 1

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        y: Tensor = self.levels[self.level](x)
        return y


def decoder(sizes: Sizes, levels: Sequence[str], seconds: float) -> transformers.PreTrainedModel:
    """The decoder with both levels in its blocks and the higher one in its head."""
    config = transformers.LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shapes = {name: tuple(layer.weight.shape) for name, layer in linear_layers(model).items()}
    target = TorchTarget(seconds_per_sample=seconds)
    table = KernelTable(target.time(sorted(set(shapes.values())), [scheme_named(s) for s in levels], BUCKETS))
    for name, (n, k) in shapes.items():
        parent, _, child = name.rpartition(".")
        own = levels[-1:] if name == HEAD else levels
        setattr(model.get_submodule(parent), child, Both(n, k, own, table))
    model.model.embed_tokens.weight = nn.Parameter(torch.randn(sizes.vocabulary, sizes.hidden, dtype=torch.bfloat16))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Parameter(torch.ones(parameter.shape, dtype=torch.bfloat16)))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def machine() -> str:
    """The processor, and what times are in."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, one thread"


def set_rung(model: nn.Module, low: frozenset[int]) -> None:
    """Puts the blocks of these numbers at the lower level and all others at the higher."""
    for name, module in model.named_modules():
        if isinstance(module, Both) and len(module.levels) > 1:
            module.level = 0 if int(name.split(".")[2]) in low else 1


def measure(
    model: transformers.PreTrainedModel,
    rungs: Sequence[frozenset[int]],
    batches: Sequence[int],
    prompts: Sequence[int],
    context: int,
    repeats: int,
) -> list[dict[Phase, tuple[PassTime, ...]]]:
    """Times of each rung, the rungs interleaved: `batches` sequences decoded, `prompts` tokens read.

    Prompts are read at the top, so theirs are measured there and hold for every rung.
    """
    taken: dict[tuple[int, Phase, int], list[float]] = {}
    name, top = cache_argument(model), len(rungs) - 1

    def timed(index: int, phase: Phase, size: int, keep: bool, **given: Any) -> Any:
        start = time.process_time()
        output = model(use_cache=True, logits_to_keep=1, **given)
        if keep:
            taken.setdefault((index, phase, size), []).append(time.process_time() - start)
        return getattr(output, name)

    with torch.inference_mode():
        for batch in batches:
            set_rung(model, rungs[top])
            tokens = torch.randint(0, 1000, (batch, context))
            cache = timed(top, "prefill", 0, False, input_ids=tokens)
            for repeat in range(repeats + 1):
                for index, low in enumerate(rungs):
                    set_rung(model, low)
                    # The first round lays weights out.
                    timed(index, "decode", batch, repeat > 0, input_ids=tokens[:, :1], **{name: cache})
                    cache.crop(-1)
        set_rung(model, rungs[top])
        for size in prompts:
            tokens = torch.randint(0, 1000, (1, size))
            for repeat in range(max(3, repeats // 2) + 1):
                timed(top, "prefill", size, repeat > 0, input_ids=tokens)

    def times(index: int, phase: Phase, sizes: Sequence[int]) -> tuple[PassTime, ...]:
        found = []
        for size in sizes:
            p20, p50, p80 = 1e6 * np.percentile(taken[index, phase, size], [20, 50, 80])
            found.append(PassTime(tokens=size, p20_us=p20, p50_us=p50, p80_us=p80, origin="measured"))
        return tuple(found)

    return [
        {"decode": times(index, "decode", batches), "prefill": times(top, "prefill", prompts)}
        for index in range(len(rungs))
    ]
