"""What is compared, made once: lowprec's folders from a run, and onnxruntime-genai's from the same model."""

import copy
import subprocess
from pathlib import Path

import onnx_ir as ir
import torch
import transformers

from lowprec.artifacts.loading import quiet
from lowprec.onnx import export_onnx
from lowprec.onnx.folder import DATA, MODEL
from lowprec.onnx.graph import graph_of, tidy
from lowprec.onnx.runtime_form import positions_of, to_runtime
from lowprec.steps.load import load


def exported(run: Path, out: Path, accuracy: str) -> Path:
    """The artefact of a run in onnxruntime's form."""
    if not (out / MODEL).exists():
        export_onnx(run, out, target="onnxruntime", accuracy=accuracy)
    return out


def plain(model: str, out: Path) -> Path:
    """The model as a Hugging Face folder in float32, whatever file it comes from."""
    if not (out / "model.safetensors").exists():
        found = load(model)
        config = copy.deepcopy(found.module.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # A model from a GGUF file counts as quantised, and is not saved: a fresh one with its tensors is.
        with quiet():
            fresh = transformers.AutoModelForCausalLM.from_config(config).float()
            fresh.load_state_dict({name: t.float() for name, t in found.module.state_dict().items()})
            fresh.save_pretrained(out)
            found.tokenizer.save_pretrained(out)
    return out


def in_float32(folder: Path, out: Path, fused: bool) -> Path:
    """lowprec's graph of the unquantised model: in standard operators, or in onnxruntime's."""
    if not (out / MODEL).exists():
        out.mkdir(parents=True, exist_ok=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        graph = graph_of(model)
        if fused:
            graph = to_runtime(graph, {}, {}, positions_of(model)).graph
        else:
            tidy(graph)
        graph.model.metadata_props["lowprec.kind"] = graph.kind
        model.config.save_pretrained(out)
        ir.save(graph.model, out / MODEL, external_data=DATA)
    return out


def built(python: Path, folder: Path, out: Path, precision: str) -> Path:
    """onnxruntime-genai's own model of a Hugging Face folder."""
    if not (out / "genai_config.json").exists():
        builder = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(out)]
        cache = str(out.parent / "genai-cache")
        subprocess.run([*builder, "-p", precision, "-e", "cpu", "-c", cache], check=True, capture_output=True)
    return out
