"""Small artefacts with a probe set, for what is written for runtimes that are not here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

import tiny
from lowprec.artifacts.compressed_tensors import write_artefact
from lowprec.artifacts.digests import write_digests
from lowprec.artifacts.probe import make_probe, save_probe
from lowprec.formats import SCHEMES
from lowprec.runtime.convert import linear_layers, weight_of


def artefact(path: Path, model: Any, scheme: str | Mapping[str, str]) -> Path:
    """The model with every linear layer in one scheme, or in that of the ending of its name."""
    layers = linear_layers(model)
    if isinstance(scheme, str):
        chosen = dict.fromkeys(layers, SCHEMES[scheme])
    else:
        ends = {name: [s for end, s in scheme.items() if name.endswith(end)] for name in layers}
        chosen = {name: SCHEMES[found[0]] for name, found in ends.items() if found}
    solved = {name: tiny.rounded(weight_of(layers[name]), str(s.weight)) for name, s in chosen.items()}
    with torch.no_grad():
        for name, weight in solved.items():
            layers[name].weight.copy_(weight.dequantize())
    model.config.architectures = [type(model).__name__]

    def finish(folder: Path) -> None:
        save_probe(folder, make_probe(model, tiny.batch(2, 32)))
        write_digests(folder)

    write_artefact(
        path, config=model.config, tensors=model.state_dict(), solved=solved, schemes=chosen, finish=finish,
        tokenizer=tiny.tokenizer(),
    )  # fmt: skip
    return path


def facts(folder: Path) -> dict[str, str]:
    """The metadata of an export."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return {p.key: p.value for p in model.metadata_props}
