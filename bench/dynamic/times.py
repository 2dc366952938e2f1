"""Step times of the rungs of a ladder, on this machine's CPU: a decoder whose blocks are in INT8 or INT4.

The decoder has the sizes of Llama-3.2-1B's blocks and random codes, so that its weights are far beyond the last-level
cache; a time does not depend on what the codes are. Both levels are held side by side here, as two weights: what a
nested format would hold as one. Every rung is measured, none is interpolated; rungs take turns, so that what else the
machine does meets all of them. The clock counts the processor's seconds of the one thread that computes: on a shared
machine it stands still while others run, though not while they use the memory.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor, nn

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

    blocks: int = 8
    hidden: int = 2048
    intermediate: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32000


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
    with torch.inference_mode():
        for batch in batches:
            for repeat in range(repeats + 1):
                for index, low in enumerate(rungs):
                    set_rung(model, low)
                    tokens = torch.randint(0, 1000, (batch, context))
                    if index == 0 or repeat == 0:
                        cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
                    start = time.process_time()
                    model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
                    if repeat:
                        taken.setdefault((index, "decode", batch), []).append(time.process_time() - start)
            print(
                f"decode {batch}: "
                + ", ".join(f"{1e3 * np.median(taken[i, 'decode', batch]):.1f} ms" for i in range(len(rungs))),
                flush=True,
            )
        set_rung(model, rungs[-1])
        for tokens_read in prompts:
            tokens = torch.randint(0, 1000, (1, tokens_read))
            for repeat in range(max(3, repeats // 3) + 1):
                start = time.process_time()
                model(input_ids=tokens, use_cache=True, logits_to_keep=1)
                if repeat:
                    taken.setdefault((len(rungs) - 1, "prefill", tokens_read), []).append(time.process_time() - start)
            print(
                f"prefill {tokens_read}: {1e3 * np.median(taken[len(rungs) - 1, 'prefill', tokens_read]):.1f} ms",
                flush=True,
            )

    def times(index: int, phase: Phase, sizes: Sequence[int]) -> tuple[PassTime, ...]:
        found = []
        for size in sizes:
            p20, p50, p80 = 1e6 * np.percentile(taken[index, phase, size], [20, 50, 80])
            found.append(PassTime(tokens=size, p20_us=p20, p50_us=p50, p80_us=p80, origin="measured"))
        return tuple(found)

    top = len(rungs) - 1
    return [
        {"decode": times(index, "decode", batches), "prefill": times(top, "prefill", prompts)}
        for index in range(len(rungs))
    ]
