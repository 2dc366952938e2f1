"""Forms for runtimes that are not here: operators, types and codes as their documentation asks, and what is told."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto, numpy_helper
from safetensors.torch import load_file

import tiny
from lowprec.artifacts.loading import read_back
from lowprec.artifacts.own_form import write_own_form
from lowprec.artifacts.source import weights_digest
from lowprec.cli import main
from lowprec.errors import ArtifactError, ConfigError, UnsupportedError
from lowprec.formats import SCHEMES
from lowprec.onnx import targeted
from lowprec.onnx.fixed import Sizes, fix_sizes
from lowprec.onnx.graph import graph_of
from lowprec.onnx.lowering import lower_opset
from lowprec.onnx.operators import check_operators, nodes_of
from lowprec.onnx.windows import Deviation
from lowprec.runtime.convert import linear_layers, weight_of
from lowprec.targets.exporting import EXPORTERS, export_for
from targets_factory import artefact, facts

SLOW = pytest.mark.slow
MIX = {"q_proj": "w8a8-int8", "k_proj": "w8a8-int8", "v_proj": "w8a8-int8", "o_proj": "w4a16-g32",
       "gate_proj": "w4a16-g64", "up_proj": "w4a16-g64", "down_proj": "w8a16"}  # fmt: skip


def llama(tied: bool = False) -> Any:
    """One block, with an untied head or a tied one."""
    torch.manual_seed(0)
    config = copy.deepcopy(tiny.DECODERS["llama" if tied else "llama-untied"])
    config.num_hidden_layers = 1
    return transformers.LlamaForCausalLM(config).eval().to(torch.bfloat16)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INT8 and INT4 layers."""
    return artefact(tmp_path_factory.mktemp("mixed") / "model", llama(), MIX)


def codes_of(model: Any) -> dict[str, Any]:
    return {t.name: t for t in model.graph.initializer}


def checked(folder: Path, target: str, form: str, kind: str = "decoder") -> Any:
    """The model of an export, whose metadata say what they should."""
    told = facts(folder)
    assert (told["lowprec.target"], told["lowprec.form"], told["lowprec.kind"]) == (target, form, kind)
    assert told["lowprec.verified"].startswith("not verified on")
    assert told["lowprec.verified"] in json.loads(told["lowprec.notes"])
    assert "KL" in told["lowprec.deviation"]
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return onnx.load(folder / "model.onnx")


@SLOW
def test_tensorrt_has_zero_points_of_zero_and_inputs_in_the_type_of_their_weights(mixed: Path, tmp_path: Path) -> None:
    written = export_for("tensorrt", mixed, tmp_path / "trt")
    model = checked(tmp_path / "trt", "tensorrt", "qdq")
    stored, made_by = codes_of(model), {o: n for n in model.graph.node for o in n.output}
    rounded = plain = 0
    for node in model.graph.node:
        weight = made_by.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in stored:
            continue
        kind = stored[weight.input[0]].data_type
        x = made_by.get(node.input[0])
        if kind == TensorProto.INT8:
            rounded += 1
            assert x is not None
            assert x.op_type == "DequantizeLinear"
            assert stored[x.input[2]].data_type == TensorProto.INT8
            assert numpy_helper.to_array(stored[x.input[2]]) == 0
        else:
            plain += 1
            assert kind == TensorProto.INT4
            assert len(weight.input) == 2, "no zero points"
            assert x is None or x.op_type != "DequantizeLinear"
    assert (rounded, plain) == (4, 3)
    sums = [n for n in model.graph.node if n.op_type == "CumSum"]
    assert all(made_by[n.input[0]].op_type == "Cast" for n in sums), "it adds up floats alone"
    assert written.layers == 7
    assert written.largest_error < 0.2
    for layer, weight in read_back(mixed).items():
        assert np.array_equal(numpy_helper.to_array(stored[f"{layer}.codes"]).astype(np.int8), weight.codes.numpy().T)


@SLOW
def test_webgpu_has_the_codes_in_matmulnbits(mixed: Path, tmp_path: Path) -> None:
    written = export_for("webgpu", mixed, tmp_path / "webgpu")
    model = checked(tmp_path / "webgpu", "webgpu", "nbits")
    bits = [a.i for n in model.graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits"]
    assert sorted(bits) == [4, 4, 4, 8, 8, 8, 8]
    assert written.largest_error < 1e-4, "codes are the plan's, and inputs are not rounded"
    assert any("the CPU of the browser runs them" in note for note in written.notes)


@SLOW
def test_migraphx_has_fixed_sizes_and_opset_19(mixed: Path, tmp_path: Path) -> None:
    written = export_for("migraphx", mixed, tmp_path / "amd", sequence=8, past=24)
    model = checked(tmp_path / "amd", "migraphx", "nbits")
    assert {o.domain: o.version for o in model.opset_import} == {"": 19, "com.microsoft": 1}
    kinds = [n.op_type for n in model.graph.node]
    assert (kinds.count("MatMulNBits"), kinds.count("DequantizeLinear")) == (3, 4)
    assert "Range" not in kinds
    assert all(d.dim_value > 0 for v in model.graph.input for d in v.type.tensor_type.shape.dim)
    assert written.largest_error < 1e-4, "codes are the plan's, and inputs are not rounded"


@SLOW
def test_ascend_takes_float16_at_opset_13(mixed: Path, tmp_path: Path) -> None:
    written = export_for("ascend", mixed, tmp_path / "half", form="fp16", sequence=8, past=24)
    model = checked(tmp_path / "half", "ascend", "fp16")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 13)]
    given = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert given.pop("input_ids") == given.pop("attention_mask") == TensorProto.INT64
    assert set(given.values()) == {TensorProto.FLOAT16}
    whole = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert 0 < max(np.prod(t.dims) for t in whole) <= 8, "frequencies of positions and exponents, no weights"
    made_by = {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        if node.op_type in ("Sin", "Cos"):
            angles = made_by[node.input[0]]
            while angles.op_type not in ("Cast", "Mul", "MatMul"):
                angles = made_by[angles.input[0]]
            assert angles.op_type != "Cast", "angles are not rounded to float16"
    assert 0 < written.largest_error < 0.01


@SLOW
def test_ascend_takes_int8_per_tensor_at_opset_13(mixed: Path, tmp_path: Path) -> None:
    written = export_for("ascend", mixed, tmp_path / "int8", form="int8", sequence=8, past=24)
    model = checked(tmp_path / "int8", "ascend", "int8")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 13)]
    stored, made_by = codes_of(model), {o: n for n in model.graph.node for o in n.output}
    products = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in made_by]
    products = [n for n in products if made_by[n.input[1]].op_type == "DequantizeLinear"]
    assert len(products) == written.layers == 7
    for node in products:
        weight, x = made_by[node.input[1]], made_by[node.input[0]]
        assert stored[weight.input[0]].data_type == TensorProto.INT8
        assert len(stored[weight.input[0]].dims) == 2
        assert list(stored[weight.input[1]].dims) == [], "per tensor"
        assert x.op_type == "DequantizeLinear"
    assert 0 < written.largest_error < 0.5
    assert any("rounded once more" in note for note in written.notes)


def test_ascend_folder_is_what_vllm_ascend_asks_for(mixed: Path, tmp_path: Path) -> None:
    written = export_for("ascend", mixed, tmp_path / "vllm")
    told = json.loads((tmp_path / "vllm" / "quant_model_description.json").read_text())
    tensors = load_file(tmp_path / "vllm" / "model.safetensors")
    assert told.pop("model_quant_type") == "W8A8_DYNAMIC"
    assert set(told) == set(tensors), "of every tensor"
    solved = read_back(mixed)
    dense = llama().state_dict()
    assert set(dense) <= set(tensors)
    for layer, weight in solved.items():
        stored = tensors[f"{layer}.weight"]
        if weight.format != "int8":
            assert told[f"{layer}.weight"] == "FLOAT"
            assert torch.equal(stored, weight.dequantize().to(torch.bfloat16))
            continue
        assert told[f"{layer}.weight"] == told[f"{layer}.weight_scale"] == "W8A8_DYNAMIC"
        assert torch.equal(stored, weight.codes)
        scale, offset = tensors[f"{layer}.weight_scale"], tensors[f"{layer}.weight_offset"]
        assert scale.shape == offset.shape == (len(stored), 1)
        assert torch.equal(scale.float(), weight.scale)
        assert not offset.any()
    assert written.layers == 4
    assert any("w8a16: inputs are rounded to INT8 per token here" in note for note in written.notes)
    assert any("w4a16-g32, w4a16-g64: in bfloat16 here" in note for note in written.notes)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "vllm", local_files_only=True)
    assert config.dtype == torch.bfloat16
    assert not hasattr(config, "quantization_config")


def own_form(path: Path, model: Any, mix: dict[str, str]) -> Path:
    """As `artefact`, in lowprec's own form, where layers that runtimes fuse may have several schemes."""
    layers = linear_layers(model)
    schemes = {n: SCHEMES[s] for end, s in mix.items() for n in layers if n.endswith(end)}
    solved = {n: tiny.rounded(weight_of(layers[n]), str(s.weight)) for n, s in schemes.items()}
    write_own_form(
        path, module=model, name="org/m", revision=weights_digest(model), solved=solved, schemes=schemes,
        tokenizer=tiny.tokenizer(), generation_config=model.generation_config, tables={},
    )  # fmt: skip
    return path


def test_vllm_ascend_finds_what_it_fuses_in_one_type_and_a_tied_head(tmp_path: Path) -> None:
    model = llama(tied=True)
    mix = {"q_proj": "w8a8-int8", "v_proj": "w4a16-g32", "gate_proj": "w8a8-int8", "down_proj": "w8a8-int8"}
    source = own_form(tmp_path / "model", model, mix)
    written = export_for("ascend", source, tmp_path / "vllm")
    told = json.loads((tmp_path / "vllm" / "quant_model_description.json").read_text())
    tensors = load_file(tmp_path / "vllm" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert told["lm_head.weight"] == "FLOAT", "the loader asks for it, stored or not"
    coded = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    assert coded == {"model.layers.0.mlp.down_proj"}
    assert written.layers == 1
    for members in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        assert {told[f"model.layers.0.{m}.weight"] for m in members} == {"FLOAT"}
    solved = read_back(source)
    values = solved["model.layers.0.self_attn.q_proj"].dequantize().to(torch.bfloat16)
    assert torch.equal(tensors["model.layers.0.self_attn.q_proj.weight"], values)
    note = next(note for note in written.notes if "vllm-ascend fuses" in note)
    assert "model.layers.0.self_attn (q_proj w8a8-int8, k_proj bf16, v_proj w4a16-g32)" in note
    assert "model.layers.0.mlp (gate_proj w8a8-int8, up_proj bf16)" in note
    assert written.largest_error is None, "nothing computed it"
    del mix["down_proj"]
    source = own_form(tmp_path / "torn", llama(tied=True), mix)
    with pytest.raises(UnsupportedError, match="every INT8 layer would be in bfloat16 here"):
        export_for("ascend", source, tmp_path / "none")


def test_nothing_is_said_of_outputs_that_nothing_computed(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["lowprec", "export", str(mixed), "--out", str(tmp_path / "o"), "--target", "ascend"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "4 layers in codes" in said
    assert "outputs within" not in said


@pytest.mark.parametrize(
    ("off", "rounds", "reason"),
    [
        (2e-3, False, r"0\.002 of the largest output off on the probe text .* nothing was written"),
        (float("nan"), False, "no numbers"),
        (float("nan"), True, "no numbers"),
        (float("inf"), True, "no numbers"),
    ],
)
def test_outputs_are_held_to_a_limit_where_nothing_is_rounded(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: float, rounds: bool, reason: str
) -> None:
    monkeypatch.setattr(targeted, "graph_of", lambda *_: SimpleNamespace(kind="decoder"))
    monkeypatch.setattr(targeted, "deviation", lambda *_: Deviation(largest=off))

    def make(*_: Any) -> targeted.Written:
        return targeted.Written(layers=1, notes=(), rounds=rounds)

    with pytest.raises(ArtifactError, match=reason):
        targeted.write_for("t", "f", mixed, tmp_path / "o", None, None, None, make=make, verified="not verified")
    assert not (tmp_path / "o").exists()


def test_padding_is_part_of_the_check_where_sizes_are_free(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the canonical form: sequences of two lengths in one batch, in three steps."""
    asked = []

    def fails(file: Path, out: Path, *_: Any) -> float:
        asked.append(file.name)
        raise ArtifactError(out, "only beside padding")

    monkeypatch.setattr(targeted, "graph_of", lambda *_: SimpleNamespace(kind="decoder"))
    monkeypatch.setattr(targeted, "deviation", lambda *_: Deviation(largest=1e-6))
    monkeypatch.setattr(targeted, "check_outputs", fails)
    with pytest.raises(ArtifactError, match="only beside padding"):
        targeted.write_for(
            "t", "f", mixed, tmp_path / "o", None, None, None, verified="not verified",
            make=lambda *_: targeted.Written(layers=1, notes=(), rounds=False),
        )  # fmt: skip
    assert asked == ["model.onnx"]


@SLOW
@pytest.mark.parametrize(
    ("scheme", "refusals"),
    [
        ("w8a8-fp8", {"webgpu": "MatMulNBits takes integers", "migraphx": "E4M3FNUZ", "ascend": "no layer .* INT8"}),
        ("w4a16-g64", {"ascend": "no layer of the plan has INT8"}),
    ],
)
def test_formats_that_a_runtime_lacks_are_refused_with_the_reason(
    tmp_path: Path, scheme: str, refusals: dict[str, str]
) -> None:
    artefact(tmp_path / "model", llama(), {"down_proj": scheme})
    for target, reason in refusals.items():
        with pytest.raises(UnsupportedError, match=reason):
            export_for(target, tmp_path / "model", tmp_path / "out")
    if scheme == "w8a8-fp8":
        written = export_for("tensorrt", tmp_path / "model", tmp_path / "trt")
        assert written.layers == 1
        assert written.largest_error < 0.1
    assert sorted(p.name for p in tmp_path.iterdir()) == (["model", "trt"] if scheme == "w8a8-fp8" else ["model"])


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=SLOW), pytest.param("gpt2", marks=SLOW)])
def test_fixed_and_lowered_graphs_compute_the_same(name: str, tmp_path: Path) -> None:
    import onnx_ir as ir

    from lowprec.onnx.windows import Text, deviation

    model = tiny.encoder() if name == "bert" else tiny.decoder(name).float()
    graph = graph_of(model)
    fix_sizes(graph, Sizes(sequence=8, past=16))
    lower_opset(graph, 13)
    ir.save(graph.model, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    loaded = onnx.load(tmp_path / "model.onnx")
    kinds = {n.op_type for n in nodes_of(loaded.graph)}
    assert not kinds & {"LayerNormalization", "Gelu", "GatherND", "Shape", "Range"}
    text = Text(kind=graph.kind, windows=tiny.batch(2, 24), inputs=None, sizes=Sizes(sequence=8, past=16))
    assert deviation(tmp_path / "model.onnx", model, text).largest < 1e-5


def test_an_operator_that_is_not_listed_is_named() -> None:
    node = onnx.helper.make_node("Frobnicate", ["x"], ["y"], name="here", domain="com.example")
    value = [onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", value[:1], value[1:]))
    with pytest.raises(UnsupportedError, match="Nowhere does not list operators") as refused:
        check_operators(model, "Nowhere", frozenset({"Add"}), "a list")
    assert refused.value.reasons[0] == "com.example:Frobnicate (first at here)"


@pytest.mark.parametrize("name", ["ascend", "migraphx", "qnn", "tensorrt", "webgpu"])
def test_every_exporter_names_its_forms(name: str) -> None:
    found = EXPORTERS[name]
    assert found.name == name
    assert found.forms
    assert set(found.fixed) <= set(found.forms)


@pytest.mark.parametrize(("kind", "said"), [("decoder", "sequence 8 behind past 24"), ("encoder", None)])
def test_sizes_are_held_against_the_models_positions(kind: Any, said: str | None) -> None:
    sizes = Sizes(sequence=8, past=24)
    sizes.require_room(kind, 32)
    sizes.require_room(kind, None)
    if said is None:
        sizes.require_room(kind, 8)
        said = "sequence 8"
    with pytest.raises(ConfigError, match=f"{said}: the model has positions for 7 tokens"):
        sizes.require_room(kind, 7)


def test_bad_requests_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*more: str) -> str:
        monkeypatch.setattr("sys.argv", ["lowprec", "export", str(tmp_path), "--out", str(tmp_path / "o"), *more])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "unknown export target 'tensort': did you mean 'tensorrt'?" in asked("--target", "tensort")
    assert "unknown form 'int4' of ascend" in asked("--target", "ascend", "--form", "int4")
    assert "sizes are free in the form qdq of tensorrt" in asked("--target", "tensorrt", "--sequence", "8")
    assert "sizes are free in the form nbits of webgpu" in asked("--target", "webgpu", "--sequence", "0")
    assert "sequence 0: give at least 1" in asked("--target", "migraphx", "--sequence", "0")
    assert "the target onnx has one form" in asked("--form", "a8w8")
    assert "the target onnx has one form" in asked("--past", "0")
    with pytest.raises(ConfigError, match="give neither module nor inputs, or take another form: fp16, int8"):
        export_for("ascend", tmp_path, tmp_path / "o", module=torch.nn.Linear(3, 3), inputs={"x": torch.ones(2, 3)})
    with pytest.raises(ConfigError, match="unknown export target"):
        export_for("nothing", tmp_path, tmp_path / "o")
