"""A model for OpenVINO, written as a folder, by way of the canonical ONNX graph.

    openvino_model.xml, openvino_model.bin     graph; weights
    config.json, tokenizer files, digests.json

How inputs are rounded stands in the graph's runtime options (`lowprec.openvino.form`).
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import openvino
import torch
from torch import nn

from lowprec.artifacts import digests
from lowprec.artifacts.compressed_tensors import write_folder
from lowprec.errors import ArtifactError
from lowprec.formats import SCHEMES
from lowprec.onnx import export_onnx
from lowprec.onnx.folder import DATA as ONNX_DATA
from lowprec.onnx.folder import MODEL as ONNX_MODEL
from lowprec.onnx.folder import OnnxArtefact
from lowprec.onnx.graph import graph_of, tidy
from lowprec.openvino.form import read_onnx, to_openvino
from lowprec.openvino.layers import block_for
from lowprec.openvino.module import DATA, MODEL, OpenVinoModule
from lowprec.records import Deployed, Scheme, digest


def deploy(artefact: Path, out: Path) -> Deployed:
    """Writes an artefact for OpenVINO to `out`, whole or not at all.

    Raises:
        UnsupportedError: a scheme or model that OpenVINO cannot hold, with the reasons.
        ArtifactError: a damaged artefact, a folder that cannot be written, or a graph that is not valid.
    """
    return _deploy(artefact, out)[0]


def export(source: Path, out: Path) -> OnnxArtefact:
    """Writes a run's artefact for OpenVINO, and loads it there; see `deploy` for the errors.

    Its error is that of the canonical graph that it is made from, in onnxruntime against torch.
    """
    deployed, exported = _deploy(source, out)
    module = OpenVinoModule(out)
    found = module(torch.ones(1, 3, dtype=torch.long))
    if not all(bool(value.isfinite().all()) for value in vars(found).values() if isinstance(value, torch.Tensor)):
        raise ArtifactError(out, "gives NaN or infinite outputs in OpenVINO")
    notes = (*deployed.notes, "the difference is that of the graph that it is made from; OpenVINO loads and runs it")
    return replace(exported, path=out, bytes=deployed.weight_bytes, digest=deployed.digest, notes=notes)


def _deploy(artefact: Path, out: Path) -> tuple[Deployed, OnnxArtefact]:
    with tempfile.TemporaryDirectory() as place:
        exported = export_onnx(artefact, Path(place) / "onnx")
        schemes = _schemes(exported.path / ONNX_MODEL)
        return _write(exported.path, out, block_for(schemes), exported.bytes), exported


def deploy_unquantised(module: nn.Module, out: Path) -> Deployed:
    """Writes a float32 model of transformers as it is; see `deploy`."""
    model: Any = module
    with tempfile.TemporaryDirectory() as place:
        graph = graph_of(module)
        tidy(graph)
        ir.save(graph.model, Path(place) / ONNX_MODEL, external_data=ONNX_DATA)
        model.config.save_pretrained(place)
        return _write(Path(place), out, 0, sum(p.numel() * p.element_size() for p in module.parameters()))


def _schemes(file: Path) -> dict[str, Scheme]:
    """Layer -> scheme, as the canonical graph says."""
    facts = {p.key: p.value for p in onnx.load(file, load_external_data=False).metadata_props}
    return {layer: SCHEMES[name] for layer, name in json.loads(facts["lowprec.schemes"]).items()}


def _write(exported: Path, out: Path, block: int, size: int) -> Deployed:
    model = read_onnx(exported / ONNX_MODEL)
    notes = to_openvino(model, block)
    return write_folder(out, size, lambda folder: _fill(folder, exported, model, notes))


def _fill(folder: Path, exported: Path, model: Any, notes: Sequence[str]) -> Deployed:
    openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
    for file in exported.iterdir():
        if file.name not in (ONNX_MODEL, ONNX_DATA, digests.FILE_NAME):
            shutil.copyfile(file, folder / file.name)
    written = digests.write_digests(folder)
    return Deployed(
        weight_bytes=sum((folder / name).stat().st_size for name in (MODEL, DATA)),
        notes=tuple(notes),
        digest=digest(written[MODEL], written[DATA]),
    )
