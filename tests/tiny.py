"""Tiny random models with a tokenizer and text of their own, small enough for whole runs in seconds."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.rows import FINE, MixedRows
from lowprec.settings import Effort
from lowprec.solvers import SOLVERS

WORDS = 300
COMMON: dict[str, Any] = {"vocab_size": WORDS, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64}
DECODERS: dict[str, Any] = {
    "llama": LlamaConfig(**COMMON, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**COMMON, intermediate_size=128, num_key_value_heads=2),
    "mistral": MistralConfig(**COMMON, intermediate_size=128, num_key_value_heads=2),
    "qwen3": Qwen3Config(**COMMON, intermediate_size=128, num_key_value_heads=2, head_dim=16),
    "gemma3": Gemma3TextConfig(
        **COMMON | {"num_hidden_layers": 7},
        intermediate_size=128,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
    ),
    "gpt2": GPT2Config(vocab_size=WORDS, n_embd=64, n_layer=3, n_head=4),
}
ENCODERS: dict[str, Any] = {"bert": BertConfig(**COMMON, intermediate_size=128)}

EFFORT = Effort(
    name="tiny",
    calibration_tokens=1_024,
    sensitivity_tokens=1_024,
    tuning_tokens=1_024,
    held_out_tokens=1_200,
    checked_pairs=6,
    checked_tokens=256,
    compensated=False,
    rounds=2,
    window=64,
)


def decoder(name: str = "llama", seed: int = 0) -> Any:
    """A decoder whose weights are wide enough that quantising it changes its output."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(DECODERS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.to(torch.bfloat16)


def encoder(seed: int = 0) -> Any:
    """A BERT."""
    torch.manual_seed(seed)
    return AutoModel.from_config(ENCODERS["bert"]).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of `WORDS` words."""
    vocabulary = {f"w{i}": i for i in range(WORDS - 2)} | {"x": WORDS - 2, "<unk>": WORDS - 1}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def text(path: Path, documents: int = 160, words: int = 70, seed: int = 0) -> Path:
    """JSONL documents of random words: independent units."""
    generator = random.Random(seed)
    lines = []
    for _ in range(documents):
        body = " ".join(f"w{generator.randrange(WORDS - 2)}" for _ in range(words))
        lines.append(f'{{"text": "{body}"}}\n')
    path.write_text("".join(lines))
    return path


def folder(path: Path, name: str = "llama") -> Path:
    """The decoder as a Hugging Face folder."""
    decoder(name).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def rounded(weight: torch.Tensor, fmt: str) -> QuantizedWeight:
    """[N, K] to nearest; the last rows of one of two widths are the fine ones."""
    found = WEIGHT_FORMATS[fmt]
    if isinstance(found, MixedRows):
        importance = torch.arange(len(weight), dtype=torch.float32)
        return found.mixed(rounded(weight, FINE), rounded(weight, found.coarse), importance)
    return SOLVERS["rtn"].solve(weight.float(), found, None)


def batch(rows: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """[rows, length] token ids."""
    return torch.randint(0, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))
