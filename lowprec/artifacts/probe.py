"""The probe set: a few tokens and what the scored model said to them, so that anyone can check a loaded copy.

    tokens     [W, T] int32   short windows of token ids
    positions  [P]    int32   places in each window where the answer is kept
    ids        [W, P, 8]      the eight most likely next tokens there
    log_probs  [W, P, 8]      their log-probabilities in the scored model, nats

The deviation of a copy is, at each place, the Kullback-Leibler divergence over nine outcomes: the eight tokens and "any
other". By the data processing inequality it is at most the divergence over the whole vocabulary; 0 means the same
answers. A model without logits (an encoder) is probed at its last hidden state instead: `values` holds the first eight
components, and the deviation is the squared distance over the squared length.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowprec.artifacts.folder import atomic_write
from lowprec.artifacts.safetensors_io import load_tensors, tensor_entries, write_safetensors
from lowprec.errors import ArtifactError

FILE_NAME = "probe.safetensors"
TOP = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """A probe set; see the module's docstring. `ids` is None for a model without logits."""

    tokens: Tensor
    positions: Tensor
    ids: Tensor | None
    values: Tensor


def _outputs(model: Any, tokens: Tensor, positions: Tensor) -> tuple[Tensor, bool]:
    """[W, P, V] outputs at the positions in float64, and whether they are logits."""
    device = next(model.parameters()).device
    rows = []
    logits = False
    with torch.no_grad():
        for window in tokens:
            result = model(input_ids=window[None].to(device=device, dtype=torch.long))
            logits = getattr(result, "logits", None) is not None
            whole = result.logits if logits else result.last_hidden_state
            rows.append(whole[0, positions.to(device=device, dtype=torch.long)].double().cpu())
    return torch.stack(rows), logits


def make_probe(model: Any, tokens: Tensor, positions: Tensor | None = None) -> Probe:
    """Asks `model` (as it was scored) for its answers.

    Args:
        model: a transformers model in eval mode.
        tokens: [W, T] token ids.
        positions: [P] places in each window; None takes eight, evenly spread, the last one included.
    """
    length = tokens.shape[1]
    if positions is None:
        positions = torch.linspace(0, length - 1, min(TOP, length)).round()
    positions = positions.to(torch.int32)
    outputs, logits = _outputs(model, tokens, positions)
    stored = tokens.to(torch.int32)
    if not logits:
        return Probe(tokens=stored, positions=positions, ids=None, values=outputs[..., :TOP].float())
    best = outputs.log_softmax(-1).topk(min(TOP, outputs.shape[-1]), dim=-1)
    return Probe(tokens=stored, positions=positions, ids=best.indices.to(torch.int32), values=best.values.float())


def save_probe(folder: Path, probe: Probe) -> Path:
    """Writes the probe set into an artefact's folder and returns the file's path."""
    tensors = {"tokens": probe.tokens, "positions": probe.positions}
    if probe.ids is None:
        tensors["values"] = probe.values
    else:
        tensors |= {"ids": probe.ids, "log_probs": probe.values}
    path = folder / FILE_NAME
    atomic_write(path, lambda file: write_safetensors(file, tensor_entries(tensors), {"format": "pt"}))
    return path


def load_probe(folder: Path) -> Probe:
    """Reads the probe set of an artefact.

    Raises:
        ArtifactError: missing or damaged.
    """
    path = folder / FILE_NAME
    tensors, _ = load_tensors(path)
    values = tensors.get("log_probs", tensors.get("values"))
    if values is None or not {"tokens", "positions"} <= set(tensors):
        raise ArtifactError(path, f"is no probe set: it has {', '.join(sorted(tensors))}")
    return Probe(tokens=tensors["tokens"], positions=tensors["positions"], ids=tensors.get("ids"), values=values)


def check_probe(model: Any, folder: Path) -> float:
    """Largest deviation of `model` from the answers stored in `folder`: nats, or a relative square without logits.

    Raises:
        ArtifactError: the probe set is missing, damaged, or of another kind of model.
    """
    probe = load_probe(folder)
    outputs, logits = _outputs(model, probe.tokens, probe.positions)
    if logits == (probe.ids is None):
        raise ArtifactError(folder / FILE_NAME, "was made for another kind of model")
    stored = probe.values.double()
    if probe.ids is None:
        distance = (outputs[..., :TOP] - stored).square().sum(-1)
        return float((distance / stored.square().sum(-1).clamp_min(1e-12)).max())
    found = outputs.log_softmax(-1).gather(-1, probe.ids.long())
    p, q = stored.exp(), found.exp()
    p_rest, q_rest = (1.0 - x.sum(-1) for x in (p, q))
    # Float32 log-probabilities make the rest uncertain by about 1e-7; below that it counts as empty.
    tiny = 1e-7
    rest = torch.where(p_rest > tiny, p_rest * (p_rest.clamp_min(tiny) / q_rest.clamp_min(tiny)).log(), 0.0)
    return float(((p * (stored - found)).sum(-1) + rest).clamp_min(0.0).max())
