"""A model whose weights are where time goes: few wide blocks, far beyond the last-level cache, with random weights.

What it answers means nothing, and what rounding costs it says little of trained models. What it takes does not depend
on what its weights are: so it is there to show what a ladder wins by the clock, where a model as small as SmolLM2-135M
spends its time elsewhere.
"""

from dataclasses import replace
from pathlib import Path

import torch
import transformers

from bench.dynamic.times import Sizes
from lowprec.steps.load import load


def write_wide(like: Path, out: Path, sizes: Sizes | None = None, seed: int = 0) -> int:
    """Writes the folder of such a model, with the tokenizer of the one at `like`; returns its parameters."""
    tokenizer = load(like).tokenizer
    sizes = replace(sizes or Sizes(), vocabulary=len(tokenizer))
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(sizes.config()).to(torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return sum(p.numel() for p in model.parameters())
