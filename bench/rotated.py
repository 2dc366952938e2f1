"""Writes a model's copy with its hidden states in a random basis: the same function, on no grid of few bits.

    python bench/rotated.py .demo/model.gguf .demo/rotated

Weights that were dequantised from 4 bits flatter whoever rounds them to 4 bits again; this copy flatters nobody. Its
head is not tied to the embedding any more. Loads as any folder with a bfloat16 model.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from lowprec.steps.load import load
from lowprec.steps.rotate import hidden_basis
from lowprec.steps.stream import Stream
from lowprec.steps.tokens import Batch
from lowprec.transforms.rotation import orthogonal, rotate


def main(
    model: Annotated[str, typer.Argument(help="A decoder: folder, GGUF file or name.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    seed: Annotated[int, typer.Option(help="Of the basis.")] = 0,
) -> None:
    """Writes the copy."""
    loaded = load(model)
    ids = torch.tensor([[1, 2, 3, 4]])
    example = Batch(ids=ids, lengths=torch.tensor([4]), index=(0,))
    basis = hidden_basis(Stream(loaded.module, loaded.forward, example), example)
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if "quantization" not in k})
    fresh = type(loaded.module)(config).to(loaded.dtype)
    fresh.load_state_dict(loaded.module.state_dict())
    rotate(fresh, basis, orthogonal(basis.width, seed))
    fresh.config.tie_word_embeddings = False
    fresh.save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
