"""The folder that vllm-ascend loads: safetensors and quant_model_description.json.

    NAME.weight         [N, K] int8, codes of the plan        NAME.weight_scale   [N, 1] bfloat16
    NAME.weight_offset  [N, 1] bfloat16, zeros                everything else in bfloat16

The description says W8A8_DYNAMIC of each of these tensors, and FLOAT of every other one, that of a tied head, which is
not stored, included. Inputs are rounded per token by vllm-ascend itself. In bfloat16, with the values of their codes,
are layers of other formats than INT8 per channel, and those that vllm-ascend fuses with one of them: it raises where
some but not all of what it fuses is in codes.

Source: github.com/vllm-project/vllm-ascend, vllm_ascend/quantization (quant_config.py, w8a8_dynamic.py).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowprec.artifacts import digests
from lowprec.artifacts.compressed_tensors import write_folder
from lowprec.artifacts.folder import atomic_write, write_text
from lowprec.artifacts.loading import read_back
from lowprec.artifacts.safetensors_io import tensor_entries, write_safetensors
from lowprec.errors import ArtifactError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lowprec.formats import QuantizedWeight
    from lowprec.onnx.folder import OnnxArtefact, Source
    from lowprec.records import Scheme

DESCRIPTION, METHOD, FLOAT = "quant_model_description.json", "W8A8_DYNAMIC", "FLOAT"
WEIGHTS = "model.safetensors"
REMEDY = "run lowprec calibrate --schemes int8"
FUSED = "in bfloat16 here, as vllm-ascend fuses layers that are all in INT8 or all in floats"
VERIFIED = "not verified on hardware: names, types and shapes are those that vllm-ascend's loader asks for"


def write_vllm(source: Path, out: Path) -> "OnnxArtefact":
    """Writes an artefact of a language model as vllm-ascend loads it.

    Raises:
        UnsupportedError: no language model, or no layer in INT8 that is not fused with one that is none.
        ArtifactError: a damaged artefact, or a folder that cannot be written.
    """
    from lowprec.onnx import require_extra

    require_extra()
    from lowprec.artifacts.ct_checks import fused_sets
    from lowprec.onnx.folder import artefact_of, load_source

    path = artefact_of(source)
    if path.resolve() in (out.resolve(), *out.resolve().parents):
        raise ArtifactError(out, "is the artefact's own folder; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / DESCRIPTION).exists():
        raise ArtifactError(
            out, "holds files that are no earlier export for vllm-ascend; choose an empty or a new folder"
        )
    loaded = load_source(path, None, None)
    solved = read_back(path)
    coded = {layer: w for layer, w in solved.items() if w.format == "int8" and not _is_table(loaded.module, layer)}
    if not hasattr(loaded.module, "lm_head") and not hasattr(loaded.module, "generate"):
        raise UnsupportedError(
            "vllm-ascend serves language models", (f"{type(loaded.module).__name__} is none", REMEDY)
        )
    if not coded:
        raise UnsupportedError(
            "no layer of the plan has INT8 weights per channel, the only codes of this form", (REMEDY,)
        )
    layers = tuple(name.removesuffix(".weight") for name in loaded.module.state_dict())
    torn = [members for members in fused_sets(layers) if 0 < len(coded.keys() & set(members)) < len(members)]
    kept = {layer: w for layer, w in coded.items() if not any(layer in members for members in torn)}
    told = [_told(members, loaded.schemes) for members in torn]
    if not kept:
        raise UnsupportedError(f"every INT8 layer would be {FUSED}", (*told, REMEDY))
    notes = [f"{'; '.join(told)}: {FUSED}"] if told else []
    if others := sorted({loaded.schemes[layer].name for layer in set(solved) - set(coded)}):
        notes.append(f"{', '.join(others)}: in bfloat16 here, with the values of their codes")
    size = sum(p.numel() * 2 for p in loaded.module.parameters())
    return write_folder(out, size, lambda folder: _fill(folder, out, loaded, kept, notes))


def _told(members: tuple[str, ...], schemes: "Mapping[str, Scheme]") -> str:
    """Layers that are fused, and what each was to be in."""
    parent = members[0].rpartition(".")[0]
    named = [f"{m.rpartition('.')[2]} {schemes[m].name if m in schemes else 'bf16'}" for m in members]
    return f"{parent} ({', '.join(named)})"


def _is_table(module: Any, layer: str) -> bool:
    """Whether an embedding reads the layer's rows, as vllm-ascend keeps them in floats."""
    inputs, head = module.get_input_embeddings(), module.get_output_embeddings()
    named = dict(module.named_modules())[layer]
    return named is inputs or (named is head and head.weight is inputs.weight)


def _tied_head(module: Any) -> str | None:
    """Name of the layer that makes logits with the embedding's weight."""
    head = module.get_output_embeddings()
    return next((name for name, found in module.named_modules() if found is head), None)


def _fill(
    folder: Path, out: Path, source: "Source", coded: "dict[str, QuantizedWeight]", floats: list[str]
) -> "OnnxArtefact":
    from lowprec.onnx.folder import OnnxArtefact, write_config

    tensors: dict[str, Tensor] = {}
    told: dict[str, str] = {}
    config: Any = source.module.config
    head = _tied_head(source.module) if config.get_text_config().tie_word_embeddings else None
    for name, value in source.module.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in coded and name.endswith(".weight"):
            weight = coded[layer]
            scale = weight.scale.to(torch.bfloat16)
            parts = {"weight": weight.codes, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
            tensors |= {f"{layer}.{part}": tensor.contiguous() for part, tensor in parts.items()}
            told |= {f"{layer}.{part}": METHOD for part in parts}
        else:
            told[name] = FLOAT
            if layer != head:
                tensors[name] = value.to(torch.bfloat16).contiguous() if value.is_floating_point() else value
    entries = tensor_entries(tensors)
    atomic_write(folder / WEIGHTS, lambda file: write_safetensors(file, entries, {"format": "pt"}))
    write_text(folder / DESCRIPTION, json.dumps({"model_quant_type": METHOD, **told}, indent=1))
    write_config(folder, source, torch.bfloat16)
    notes = [f"serve it with: vllm serve {out} --quantization ascend", *floats]
    if unrounded := sorted({source.schemes[x].name for x in coded if source.schemes[x].activation is None}):
        notes.append(f"{', '.join(unrounded)}: inputs are rounded to INT8 per token here, as they were not when scored")
    notes += [*source.notes, VERIFIED]
    facts = {
        "form": "vllm", "target": "ascend", "verified": VERIFIED, "notes": notes, **source.origin,
        "schemes": {layer: scheme.name for layer, scheme in source.schemes.items()},
    }  # fmt: skip
    write_text(folder / "lowprec_export.json", json.dumps(facts, indent=1))
    digested = digests.write_digests(folder)
    return OnnxArtefact(
        path=out,
        kind="decoder",
        layers=len(coded),
        bytes=(folder / WEIGHTS).stat().st_size,
        largest_error=None,
        notes=tuple(notes),
        digest=digested[WEIGHTS],
    )
