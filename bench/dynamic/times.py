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

import torch
import transformers
from torch import Tensor, nn

from lowprec.formats import resolve, scheme_named
from lowprec.runtime import KernelTable, QuantLinear
from lowprec.runtime.convert import linear_layers
from lowprec.runtime.measure import random_operands
from lowprec.targets.passes import Times, measure_passes
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

    def config(self) -> transformers.LlamaConfig:
        """The configuration of such a decoder."""
        return transformers.LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=False,
        )


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
    config = sizes.config()
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
) -> list[Times]:
    """Times of each rung, in processor seconds: `batches` sequences decoded, `prompts` tokens read."""
    return measure_passes(
        model,
        lambda rung: set_rung(model, rungs[rung]),
        len(rungs),
        batches=batches,
        prompts=prompts,
        context=context,
        repeats=repeats,
        clock=time.process_time,
    )
