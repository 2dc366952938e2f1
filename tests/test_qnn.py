"""Qualcomm's HTP: whole graphs in integers, the plan's codes in them, and two of them compiled into one context."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import tiny
from lowprec.artifacts.digests import write_digests
from lowprec.artifacts.loading import read_back
from lowprec.errors import ArtifactError, ConfigError
from lowprec.onnx.windows import plain_session
from lowprec.targets.exporting import export_for
from lowprec.targets.qnn import OPERATORS, compile_htp
from targets_factory import artefact, facts

pytestmark = pytest.mark.slow


def bert(layers: int = 1) -> Any:
    """A BERT of so many layers."""
    import copy

    import transformers

    torch.manual_seed(0)
    config = copy.deepcopy(tiny.ENCODERS["bert"])
    config.num_hidden_layers = layers
    return transformers.BertModel(config).eval().to(torch.bfloat16)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder in 8 bits and in 4 (in blocks where K is 128), each exported."""
    root = tmp_path_factory.mktemp("qnn")
    artefact(root / "eight", bert(), "w8a16")
    artefact(root / "four", bert(), "w4a16-g64")
    export_for("qnn", root / "eight", root / "a8w8", form="a8w8", sequence=16)
    export_for("qnn", root / "four", root / "a16w4", form="a16w4", sequence=16)
    return root


@pytest.mark.parametrize(
    ("form", "source", "kind", "activation", "limit"),
    [("a8w8", "eight", onnx.TensorProto.INT8, "uint8", 0.05), ("a16w4", "four", onnx.TensorProto.INT4, "uint16", 0.02)],
)
def test_codes_are_the_plans_and_everything_is_in_integers(
    place: Path, form: str, source: str, kind: int, activation: str, limit: float
) -> None:
    model = onnx.load(place / form / "model.onnx")
    stored = {t.name: t for t in model.graph.initializer}
    kept = again = 0
    for layer, weight in read_back(place / source).items():
        tensor = stored[f"{layer}.dense_quantized"]
        assert tensor.data_type == kind
        if weight.scale.shape[1] > 1:
            again += 1
            continue
        kept += 1
        assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), weight.codes.numpy().T)
        scale = numpy_helper.to_array(stored[f"{layer}.dense_scale"])
        assert np.array_equal(scale, weight.scale.float().numpy()[:, 0])
    assert (kept, again) == ((7, 0) if form == "a8w8" else (6, 1)), "one layer has two blocks in a row"
    float_inputs = {v.name for v in model.graph.input if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    made_by = {output: node.op_type for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Softmax", "LayerNormalization", "Gelu"):
            assert all(made_by[name] == "DequantizeLinear" for name in node.input[:2]), node.name
    assert not float_inputs
    assert {node.op_type for node in model.graph.node} <= OPERATORS
    sizes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]
    assert sizes == [[1, 16], [1, 16]]
    told = facts(place / form)
    assert (told["lowprec.target"], told["lowprec.form"], told["lowprec.kind"]) == ("qnn", form, "encoder")
    assert told["lowprec.verified"].startswith("not verified on hardware")
    assert told["lowprec.verified"] in json.loads(told["lowprec.notes"])
    assert 0 < float(told["lowprec.deviation"].split()[2]) < limit
    codes = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert codes, "activations are rounded"
    assert {numpy_helper.to_array(stored[n.input[2]]).dtype.name for n in codes} == {activation}


def test_a_decoder_goes_on_from_a_cache_that_slides(tmp_path: Path) -> None:
    model = tiny.decoder("llama")
    artefact(tmp_path / "model", model, {"proj": "w8a16"})
    written = export_for("qnn", tmp_path / "model", tmp_path / "qnn", form="a16w8", sequence=8, past=24)
    assert written.kind == "decoder"
    assert "fixed sizes: batch 1, 8 tokens behind 24" in " ".join(written.notes)
    assert "KL" in written.notes[0]
    session = plain_session(tmp_path / "qnn" / "model.onnx")
    shapes = {i.name: i.shape for i in session.get_inputs()}
    assert shapes["input_ids"] == [1, 8]
    assert shapes["attention_mask"] == [1, 32]
    assert shapes["past_key_values.0.key"] == [1, 2, 24, 16]
    assert written.largest_error < 0.1, "16-bit activations of a random model"


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown form 'a8w4' of qnn: did you mean 'a8w8'\?"):
        export_for("qnn", place / "eight", tmp_path / "x", form="a8w4")
    with pytest.raises(ConfigError, match=r"sequence 64 is longer than the windows .* give at most 32"):
        export_for("qnn", place / "eight", tmp_path / "x", sequence=64)
    with pytest.raises(ConfigError, match="sequence -1: give at least 1"):
        export_for("qnn", place / "eight", tmp_path / "x", sequence=-1)
    shutil.copytree(place / "eight", tmp_path / "mute")
    (tmp_path / "mute" / "probe.safetensors").unlink()
    write_digests(tmp_path / "mute")
    with pytest.raises(ArtifactError, match=r"has no probe\.safetensors, on whose text ranges are measured"):
        export_for("qnn", tmp_path / "mute", tmp_path / "x", sequence=8)
    assert not (tmp_path / "x").exists()


def test_sizes_that_cannot_work_are_told_before_anything_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("lowprec.onnx.targeted.load_source", never)
    monkeypatch.setattr("lowprec.onnx.targeted.graph_of", never)
    with pytest.raises(ConfigError, match=r"sequence 33 is longer than the windows"):
        export_for("qnn", place / "eight", tmp_path / "x", sequence=33)


def test_two_graphs_are_compiled_for_htp_into_one_context(place: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "onnxruntime_qnn",
        reason="onnxruntime-qnn is missing (pip install 'lowprec[qnn]'): not tested that graphs compile for HTP, are "
        "whole there, and share one context",
    )
    models = [place / form / "model.onnx" for form in ("a8w8", "a16w4")]
    with pytest.raises(ConfigError, match="given twice"):
        compile_htp([models[0], models[0]], tmp_path / "twice")
    context = compile_htp(models, tmp_path / "htp", soc_model="43")
    assert context.stat().st_size > 50_000
    for number in range(2):
        wrapper = onnx.load(tmp_path / "htp" / f"{number}.onnx", load_external_data=False)
        nodes = list(wrapper.graph.node)
        assert [node.op_type for node in nodes] == ["EPContext"], "the whole graph is on HTP"
        named = {a.name: a for a in nodes[0].attribute}
        assert named["ep_cache_context"].s.decode() == context.name
    with pytest.raises(ArtifactError, match="holds files already"):
        compile_htp(models, tmp_path / "htp")
