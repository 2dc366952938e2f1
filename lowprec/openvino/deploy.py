"""A model for OpenVINO, written as a folder, by way of the canonical ONNX graph.

    openvino_model.xml, openvino_model.bin     graph; weights
    config.json, tokenizer files, digests.json

How inputs are rounded stands in the graph's runtime options (`lowprec.openvino.form`).
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import openvino
import torch
from torch import Tensor, nn

from lowprec.artifacts import digests
from lowprec.artifacts.compressed_tensors import write_folder
from lowprec.errors import ArtifactError
from lowprec.formats import SCHEMES
from lowprec.onnx import export_onnx
from lowprec.onnx.checks import LIMIT, LONG, SHORT
from lowprec.onnx.folder import DATA as ONNX_DATA
from lowprec.onnx.folder import MODEL as ONNX_MODEL
from lowprec.onnx.folder import OnnxArtefact, artefact_of, check_place, load_source, tokens_of
from lowprec.onnx.graph import graph_of, tidy
from lowprec.onnx.session import left_padded
from lowprec.openvino.form import read_onnx, to_openvino
from lowprec.openvino.layers import block_for
from lowprec.openvino.module import DATA, MODEL, OpenVinoModule
from lowprec.records import Deployed, Scheme, digest


def deploy(artefact: Path, out: Path) -> Deployed:
    """Writes an artefact for OpenVINO to `out`, whole or not at all.

    Raises:
        UnsupportedError: a scheme or model that OpenVINO cannot hold, with the reasons.
        ArtifactError: a damaged artefact, a folder that cannot be written, or a graph that is not valid or computes
            something else than the artefact.
    """
    return _deploy(artefact, out)[0]


def export(source: Path, out: Path) -> OnnxArtefact:
    """Writes a run's artefact for OpenVINO; see `deploy` for the errors.

    Its error is that of its outputs in OpenVINO, no input rounded, against the artefact's in torch.
    """
    deployed, exported, error = _deploy(source, out)
    notes = (*deployed.notes, "the difference is OpenVINO's, inputs not rounded, from the artefact in torch")
    return replace(
        exported, path=out, bytes=deployed.weight_bytes, digest=deployed.digest, notes=notes, largest_error=error
    )


def _deploy(source: Path, out: Path) -> tuple[Deployed, OnnxArtefact, float]:
    artefact = artefact_of(source)
    check_place(out, artefact, MODEL)
    loaded = load_source(artefact, None, None)
    with tempfile.TemporaryDirectory() as place:
        exported = export_onnx(artefact, Path(place) / "onnx")
        schemes = _schemes(exported.path / ONNX_MODEL)
        errors: list[float] = []

        def check(folder: Path) -> None:
            errors.append(check_outputs(folder, out, loaded.module, tokens_of(loaded)))

        return _write(exported.path, out, block_for(schemes), exported.bytes, check), exported, errors[-1]


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


def check_outputs(folder: Path, place: Path, module: Any, tokens: Tensor) -> float:
    """Compares a folder's outputs in OpenVINO, no input rounded, with those of the artefact in torch.

    Two sequences of unlike lengths in one padded batch, a decoder's in two steps with its cache; torch computes each
    alone.

    Returns:
        The largest difference as a share of the largest output.

    Raises:
        ArtifactError: about `place`, where it is above `LIMIT`.
    """
    runtime, rows = OpenVinoModule(folder, exact=True), [tokens[0][:LONG].long(), tokens[-1][:SHORT].long()]
    with torch.no_grad():
        if runtime.decodes:
            ids, mask = left_padded(rows)
            start = runtime(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
            last = runtime(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=start.past_key_values)
            whole = torch.cat([start.logits, last.logits], 1)
            pairs = [(whole[i, -len(row) :], module(input_ids=row[None]).logits[0]) for i, row in enumerate(rows)]
        else:
            alone = [(runtime(input_ids=row[None]), module(input_ids=row[None])) for row in rows]
            pairs = [(found.last_hidden_state[0], expected.last_hidden_state[0]) for found, expected in alone]
    error = max(float((f - e).abs().max() / e.abs().max().clamp_min(1e-30)) for f, e in pairs)
    if not error <= LIMIT:
        raise ArtifactError(
            place,
            f"computes something else in OpenVINO than the artefact, {error:.2g} of the largest output off (this is a "
            "bug of lowprec); nothing was written",
        )
    return error


def _write(
    exported: Path, out: Path, block: int, size: int, check: Callable[[Path], object] = lambda folder: None
) -> Deployed:
    model = read_onnx(exported / ONNX_MODEL)
    notes = to_openvino(model, block)
    return write_folder(out, size, lambda folder: _fill(folder, exported, model, notes, check))


def _fill(folder: Path, exported: Path, model: Any, notes: Sequence[str], check: Callable[[Path], object]) -> Deployed:
    openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
    for file in exported.iterdir():
        if file.name not in (ONNX_MODEL, ONNX_DATA, digests.FILE_NAME):
            shutil.copyfile(file, folder / file.name)
    check(folder)
    written = digests.write_digests(folder)
    return Deployed(
        weight_bytes=sum((folder / name).stat().st_size for name in (MODEL, DATA)),
        notes=tuple(notes),
        digest=digest(written[MODEL], written[DATA]),
    )
