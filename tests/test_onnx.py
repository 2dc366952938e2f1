"""ONNX: graphs answer as torch does at any size, codes come back bit for bit, exports are checked."""

import copy
import errno
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from torch import Tensor, nn

import lowprec
import tiny
from lowprec.artifacts.compressed_tensors import write_artefact
from lowprec.artifacts.digests import sha256_of, verify_digests, write_digests
from lowprec.artifacts.loading import leave_inputs_, load_artefact, read_back
from lowprec.artifacts.own_form import write_own_form
from lowprec.artifacts.source import weights_digest
from lowprec.cli import main
from lowprec.errors import ArtifactError, ConfigError, UnsupportedError
from lowprec.formats import SCHEMES, WEIGHT_FORMATS, QuantizedWeight, held_bits
from lowprec.formats.rows import MixedRows
from lowprec.onnx import NEEDED, export_onnx, graph
from lowprec.onnx.canonical import dequantised, onnx_type, to_canonical
from lowprec.onnx.checks import check_file, check_outputs
from lowprec.onnx.graph import OPSET, Graph, graph_of, tidy
from lowprec.onnx.session import OnnxDecoder, left_padded, open_session, run_session
from lowprec.runtime.convert import linear_layers, weight_of, weighted_modules

SLOW = pytest.mark.slow
TOLERANCE = 1e-4
HEAD, TABLE = "lm_head", "model.embed_tokens"
QKV = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
O, DOWN = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"  # noqa: E741
GATE_UP = [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up")]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def saved(made: Graph, folder: Path) -> Path:
    """The graph as a checked file."""
    tidy(made)
    path = folder / "model.onnx"
    ir.save(made.model, path, external_data="model.onnx.data")
    check_file(path, path)
    return path


def alone(model: Any, row: Tensor) -> Tensor:
    """Logits [T, V] of one sequence by torch: no padding, no mask, no cache."""
    with torch.no_grad():
        found: Tensor = model(input_ids=row[None], use_cache=False).logits[0]
    return found


@pytest.fixture(
    scope="module", params=["llama", "gpt2", *(pytest.param(name, marks=SLOW) for name in ("qwen3", "gemma3"))]
)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, OnnxDecoder]:
    """A model in torch, and its graph in onnxruntime."""
    model = tiny.decoder(request.param).float()
    attention = model.config._attn_implementation
    made = graph_of(model)
    assert model.config._attn_implementation == attention, "the model is left as it was"
    return model, OnnxDecoder(saved(made, tmp_path_factory.mktemp("onnx")), threads=1)


def assert_equal_logits(pair: tuple[Any, OnnxDecoder], lengths: Sequence[int], cuts: Sequence[int]) -> None:
    """Rows of these lengths, padded on the left and given in chunks, against torch."""
    model, found = pair
    rows = [tiny.batch(1, length, seed=i)[0] for i, length in enumerate(lengths)]
    ids, mask = left_padded(rows)
    width = ids.shape[1]
    past, parts = found.empty(len(rows)), []
    ends = [*sorted({cut for cut in cuts if 0 < cut < width}), width]
    for start, end in zip([0, *ends], ends, strict=False):
        logits, past = found.step(ids[:, start:end], mask[:, :end], past)
        parts.append(logits)
    whole = torch.cat(parts, 1)
    assert bool(whole.isfinite().all()), "also where only padding is"
    for row, logits in zip(rows, whole, strict=True):
        torch.testing.assert_close(logits[-len(row) :], alone(model, row), rtol=0, atol=TOLERANCE)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 109), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 108), max_size=4),
)
@example(lengths=[1], cuts=[])
@example(lengths=[101], cuts=[100])
@example(lengths=[101, 3, 100, 50, 1], cuts=[100])
@example(lengths=[40, 33], cuts=[1, 2, 20, 39])
def test_any_batch_past_padding_and_chunks(
    decoder: tuple[Any, OnnxDecoder], lengths: list[int], cuts: list[int]
) -> None:
    assert_equal_logits(decoder, lengths, cuts)


def test_padding_on_the_right(decoder: tuple[Any, OnnxDecoder]) -> None:
    model, found = decoder
    ids, mask = tiny.batch(3, 12), torch.ones(3, 12, dtype=torch.long)
    for i, length in enumerate((12, 5, 1)):
        mask[i, length:] = 0
    logits = found.logits(ids, mask)
    for i, length in enumerate((12, 5, 1)):
        expected = alone(model, ids[i, :length])
        torch.testing.assert_close(logits[i, :length], expected, rtol=0, atol=TOLERANCE)


def test_an_encoder(tmp_path: Path) -> None:
    model = tiny.encoder()
    session = open_session(saved(graph_of(model), tmp_path), threads=1)
    for lengths in ([1], [7, 3], [100, 1, 40, 99, 17]):
        rows = [tiny.batch(1, length, seed=length)[0] for length in lengths]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.stack([torch.arange(ids.shape[1]) < length for length in lengths]).long()
        hidden, pooled = run_session(session, {"input_ids": ids, "attention_mask": mask})
        for i, row in enumerate(rows):
            with torch.no_grad():
                expected = model(input_ids=row[None])
            torch.testing.assert_close(hidden[i, : len(row)], expected.last_hidden_state[0], rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(pooled[i], expected.pooler_output[0], rtol=0, atol=TOLERANCE)
    with pytest.raises(ArtifactError, match="no decoder"):
        OnnxDecoder(tmp_path / "model.onnx")


def test_names_and_sizes_of_a_decoder(decoder: tuple[Any, OnnxDecoder]) -> None:
    model, found = decoder
    inputs, outputs = found._session.get_inputs(), found._session.get_outputs()
    layers = range(model.config.num_hidden_layers)
    parts = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    assert [i.name for i in inputs] == ["input_ids", "attention_mask", *(f"past_key_values.{p}" for p in parts)]
    assert [o.name for o in outputs] == ["logits", *(f"present.{p}" for p in parts)]
    assert inputs[0].shape == ["batch", "sequence"]
    assert inputs[1].shape == ["batch", "total"]
    assert inputs[2].shape[0] == "batch"
    assert inputs[2].shape[2] == "past"


# Codes


class One(nn.Module):
    """A linear layer of K = 128."""

    def __init__(self, n: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(128, n)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 128] -> [B, T, N]."""
        y: Tensor = self.linear(x)
        return y


def planned(module: nn.Module, fmt: str, layer: str = "linear") -> QuantizedWeight:
    """The layer's weight in a format, which the layer has from now on."""
    linear: Any = module.get_submodule(layer)
    weight = tiny.rounded(weight_of(linear), fmt)
    linear.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    return weight


@pytest.mark.parametrize("fmt", sorted(f for f in WEIGHT_FORMATS if not isinstance(WEIGHT_FORMATS[f], MixedRows)))
def test_dequantize_linear_gives_the_weight_bit_for_bit(fmt: str, tmp_path: Path) -> None:
    weight = planned(One(), fmt)
    bare = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="weight")
    node = dequantised(bare, "linear", weight)
    bare.append(node)
    bare.outputs.append(node.outputs[0])
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((128, 24))
    ir.save(ir.Model(bare, ir_version=10), tmp_path / "w.onnx")
    check_file(tmp_path / "w.onnx", tmp_path)
    (found,) = run_session(open_session(tmp_path / "w.onnx", threads=1), {})
    assert torch.equal(found.T, weight.dequantize())
    kind, bits = onnx_type(fmt), held_bits(WEIGHT_FORMATS[fmt])
    codes = bare.initializers["linear.codes"].const_value
    assert codes is not None
    assert codes.dtype == kind
    assert codes.nbytes == 128 * 24 * bits // 8, "packed"


@pytest.mark.parametrize("fmt", ["int4-g32", "int4-g128-asym", "int3-g64", "int6", "int8", "fp8", "int4-g64-rows25"])
def test_a_product_with_codes_is_exact(fmt: str, tmp_path: Path) -> None:
    module = One()
    weight = planned(module, fmt)
    made = graph_of(module, {"x": torch.zeros(2, 3, 128)})
    rewritten = to_canonical(made, {"linear": weight})
    assert (rewritten.layers, rewritten.tables) == (("linear",), ())
    session = open_session(saved(made, tmp_path), threads=1)
    kinds = [node.op_type for node in made.model.graph]
    assert kinds.count("DequantizeLinear") == kinds.count("MatMul") == (2 if "rows" in fmt else 1)
    assert "linear.weight" not in made.model.graph.initializers
    # One-hot rows pick single weights, which an inexact kernel would round.
    x = torch.eye(128)[:, None].expand(-1, 3, -1).contiguous()
    with torch.no_grad():
        expected = module(x)
    assert torch.equal(run_session(session, {"x": x})[0], expected)


class Odd(nn.Module):
    """Layers in places that are no MatMul's, or nobody's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.unused, self.shown = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 64] -> [B, 64]."""
        y: Tensor = self.first(x) + self.shown.weight.sum(0)
        return y


def test_planned_layers_that_do_not_match_are_named_with_the_reason() -> None:
    module = Odd()
    weights = {name: planned(module, "int8", name) for name in ("first", "unused", "shown")}
    example_inputs = {"x": torch.randn(2, 64)}
    made = graph_of(module, example_inputs)
    before = [node.op_type for node in made.model.graph]
    with pytest.raises(UnsupportedError) as refused:
        to_canonical(made, {**weights, "first": tiny.rounded(weights["first"].dequantize() * 2, "int8")})
    assert len(refused.value.reasons) == 3
    told = dict(reason.split(": ", 1) for reason in refused.value.reasons)
    assert "another weight than the one that its codes stand for" in told["first"]
    assert "no output depends on it" in told["unused"]
    assert "ReduceSum reads its weight" in told["shown"]
    assert [node.op_type for node in made.model.graph] == before, "nothing is changed by halves"
    smoothed = QuantizedWeight(
        format="int8", codes=weights["first"].codes, scale=weights["first"].scale, exponents=torch.ones(64)
    )
    with pytest.raises(UnsupportedError, match="not merged into the model"):
        to_canonical(made, {"first": smoothed})


# Artefacts


def small(tied: bool = True) -> Any:
    """A Llama of one layer."""
    torch.manual_seed(0)
    config = copy.deepcopy(tiny.DECODERS["llama"])
    config.num_hidden_layers, config.tie_word_embeddings, config.architectures = 1, tied, ["LlamaForCausalLM"]
    return transformers.LlamaForCausalLM(config).eval().to(torch.bfloat16)


def parts(module: nn.Module, schemes: Mapping[str, str]) -> dict[str, Any]:
    layers = weighted_modules(module)
    return {
        "solved": {
            layer: tiny.rounded(weight_of(layers[layer]), str(SCHEMES[s].weight)) for layer, s in schemes.items()
        },
        "schemes": {layer: SCHEMES[s] for layer, s in schemes.items()},
    }


MIX = {**dict.fromkeys(QKV, "w4a16-g32"), O: "w8a8-fp8", **dict.fromkeys(GATE_UP, "w3a16-g64"), DOWN: "w8a8-int8"}


def checkpoint(path: Path) -> Path:
    """A compressed-tensors artefact with several schemes and a quantised head."""
    model = small()
    write_artefact(
        path,
        config=model.config,
        tensors=model.state_dict(),
        **parts(model, {**MIX, HEAD: "w4a16-g64"}),
        tokenizer=tiny.tokenizer(),
        generation_config=model.generation_config,
        finish=write_digests,
    )
    return path


def own(model: Any, path: Path, schemes: Mapping[str, str], **more: Any) -> Path:
    """An artefact of lowprec's own form."""
    write_own_form(path, module=model, name="org/m", revision=weights_digest(model), **parts(model, schemes), **more)
    return path


def tables(path: Path) -> Path:
    """A head in rows of two widths that the embedding shares."""
    return own(small(), path, {HEAD: "w4a16-g64-rows25", DOWN: "w4a16-g64-asym"}, tables={HEAD: (TABLE,)})


def untied(path: Path) -> Path:
    """An embedding in codes of its own."""
    return own(small(tied=False), path, {TABLE: "w6a16", HEAD: "w4a16-g32-asym"})


def gpt2(path: Path) -> Path:
    """Conv1D layers."""
    block = "transformer.h.0"
    mix = {f"{block}.attn.c_attn": "w4a16-g64", f"{block}.mlp.c_fc": "w4a8-int8-g32", f"{block}.mlp.c_proj": "w8a16"}
    return own(tiny.decoder("gpt2"), path, mix)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artefact and what was exported from it."""
    place = tmp_path_factory.mktemp("exported")
    export_onnx(checkpoint(place / "artefact"), place / "onnx")
    return place


def metadata(folder: Path) -> dict[str, str]:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return {p.key: p.value for p in model.metadata_props}


@pytest.mark.parametrize(
    ("make", "codes", "said"),
    [
        (checkpoint, 8, ["w8a8-fp8, w8a8-int8: weights", "3-bit", "onnxruntime rounds"]),
        (tables, 3, [f"{HEAD}: rows that an embedding reads"]),
        pytest.param(untied, 1, [f"{TABLE}: rows that an embedding reads"], marks=SLOW),
        pytest.param(gpt2, 3, ["w4a8-int8-g32: weights"], marks=SLOW),
    ],
)
def test_an_artefact_is_exported_whole(
    tmp_path: Path, make: Callable[[Path], Path], codes: int, said: list[str]
) -> None:
    source = make(tmp_path / "artefact")
    written = export_onnx(source, tmp_path / "onnx")
    folder = written.path
    assert written.kind == "decoder"
    assert written.layers == len(read_back(source)) - len([n for n in said if n.startswith(TABLE)])
    assert written.largest_error < 1e-5
    for start in said:
        assert any(note.startswith(start) for note in written.notes), written.notes
    model = onnx.load(folder / "model.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DequantizeLinear") == codes
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    facts = metadata(folder)
    assert facts["lowprec.version"] == lowprec.__version__
    assert set(json.loads(facts["lowprec.schemes"])) == set(read_back(source))
    assert json.loads(facts["lowprec.notes"]) == list(written.notes)
    assert len(facts["lowprec.plan"]) == 16
    assert b"site-packages" not in (folder / "model.onnx").read_bytes(), "no paths of the machine that made it"
    assert verify_digests(folder) == ()
    assert not list(tmp_path.glob(".*"))
    loaded, tokenizer = load_artefact(source)
    leave_inputs_(loaded)
    found = OnnxDecoder(folder / "model.onnx", threads=1)
    assert_equal_logits((loaded, found), [20, 7, 13], [5, 19])
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    assert config.num_hidden_layers == loaded.config.num_hidden_layers
    assert not hasattr(config, "quantization_config")
    if tokenizer is not None:
        back = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert back("w1 w2")["input_ids"] == tokenizer("w1 w2")["input_ids"]
        assert facts["lowprec.artefact"] == sha256_of(source / "digests.json")
    else:
        assert facts["lowprec.source_revision"]


def test_weights_take_the_bytes_of_their_codes(exported: Path) -> None:
    model = onnx.load(exported / "onnx" / "model.onnx", load_external_data=False)
    outside = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert {f"{layer}.codes" for layer in MIX} <= outside
    held = (exported / "onnx" / "model.onnx.data").stat().st_size
    expected = tiny.WORDS * 64 * 4  # the embedding
    for weight in read_back(exported / "artefact").values():
        n, k = weight.codes.shape
        expected += n * k * (8 if WEIGHT_FORMATS[weight.format].bits == 8 else 4) // 8 + weight.scale.numel() * 4
    assert held == pytest.approx(expected, rel=0.03)


def test_an_encoder_and_a_module_of_ones_own(tmp_path: Path) -> None:
    encoder = tiny.encoder().to(torch.bfloat16)
    encoder.config.architectures = ["BertModel"]
    layers = dict.fromkeys(linear_layers(encoder), "w8a16")
    write_artefact(tmp_path / "bert", config=encoder.config, tensors=encoder.state_dict(), **parts(encoder, layers))
    written = export_onnx(tmp_path / "bert", tmp_path / "bert-onnx")
    assert (written.kind, written.layers) == ("encoder", len(layers))
    module = One()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    own(module, tmp_path / "one", {"linear": "w4a16-g128"})
    given_inputs = {"x": torch.randn(2, 3, 128)}
    done = export_onnx(tmp_path / "one", tmp_path / "one-onnx", module=module, inputs=given_inputs)
    assert (done.kind, done.layers) == ("module", 1)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items()), "the module is only read"
    session = open_session(tmp_path / "one-onnx" / "model.onnx", threads=1)
    x = torch.randn(5, 3, 128)
    lowprec.apply_artefact(module, tmp_path / "one")
    with torch.no_grad():
        torch.testing.assert_close(run_session(session, {"x": x})[0], module(x), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="give that module and example inputs"):
        export_onnx(tmp_path / "one", tmp_path / "again")
    with pytest.raises(ConfigError, match="at least two"):
        graph_of(module, {"x": torch.randn(1, 3, 128)})
    with pytest.raises(ConfigError, match="neither a module nor inputs"):
        export_onnx(tmp_path / "bert", tmp_path / "again", inputs=given_inputs)
    assert not (tmp_path / "again").exists()


# What is refused


def deaf(self: Any, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> Any:
    """A decoder that takes its mask for granted, as a trace with a mask of ones does."""
    return ORIGINAL(self, input_ids, torch.ones_like(attention_mask), past)


ORIGINAL = graph._Decoder.forward


def test_a_mask_that_was_traced_away_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "artefact")
    with monkeypatch.context() as patched:
        patched.setattr(graph._Decoder, "forward", deaf)
        with pytest.raises(UnsupportedError, match="attention_mask does not reach logits"):
            export_onnx(source, tmp_path / "onnx")
        # Only its outputs tell where the mask reaches something, positions for example, but hides nothing.
        patched.setattr(graph, "unread_inputs", lambda _: set())
        with pytest.raises(ArtifactError, match="the attention mask was traced away"):
            export_onnx(source, tmp_path / "onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artefact"]


def test_a_graph_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(made: Graph) -> None:
        tidy(made)
        scale = made.model.graph.initializers[f"{DOWN}.scale"]
        assert scale.const_value is not None
        scale.const_value = ir.tensor(scale.const_value.numpy() * np.float32(1.5), name=scale.name)

    source = checkpoint(tmp_path / "artefact")
    monkeypatch.setattr("lowprec.onnx.folder.tidy", wrong)
    with pytest.raises(ArtifactError, match="computes something else than the artefact"):
        export_onnx(source, tmp_path / "onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artefact"]


def test_a_damaged_file_is_no_onnx(tmp_path: Path) -> None:
    module = One()
    path = saved(graph_of(module, {"x": torch.zeros(2, 3, 128)}), tmp_path)
    inputs = {"x": torch.randn(2, 3, 128)}
    assert check_outputs(path, path, "module", module, inputs, torch.zeros(1, 1)) < 1e-5
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match="is no valid ONNX"):
        check_file(path, path)
    with pytest.raises(ArtifactError, match="does not load in onnxruntime"):
        check_outputs(path, path, "module", module, inputs, torch.zeros(1, 1))


class Wild(nn.Module):
    """Its graph depends on its values."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, K] -> [B, K]."""
        return x * 2 if x.sum() > 0 else x


def test_what_cannot_be_traced_is_named_with_the_reason_and_the_remedy() -> None:
    with pytest.raises(UnsupportedError, match="Wild cannot be exported to ONNX") as refused:
        graph_of(Wild(), {"x": torch.randn(2, 4)})
    assert "data-dependent" in refused.value.reasons[0]
    assert "lowprec.load_artefact" in refused.value.reasons[1]
    config = transformers.MambaConfig(
        vocab_size=tiny.WORDS, hidden_size=32, num_hidden_layers=1, state_size=4, expand=1, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="MambaForCausalLM cannot be exported to ONNX"):
        graph_of(transformers.MambaForCausalLM(config).eval())


def test_the_extra_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        if name == "onnxscript":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"onnxruntime": "1.2.0"}.get(name, NEEDED[name])

    monkeypatch.setattr("importlib.metadata.version", missing)
    monkeypatch.setattr("sys.argv", ["lowprec", "export", str(tmp_path), "--out", str(tmp_path / "onnx")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "onnxscript is missing; onnxruntime is 1.2.0, 1.23 is needed" in told
    assert "pip install --upgrade 'lowprec[onnx]'" in told
    assert "Traceback" not in told


def test_the_extra_installs_what_is_needed() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    extra = [Requirement(text) for text in project["project"]["optional-dependencies"]["onnx"]]
    oldest = {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in extra}
    assert NEEDED.items() <= oldest.items()


def test_targets_and_places_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lowprec", "export", str(tmp_path), "--out", "o", "--target", "onxx"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "unknown export target 'onxx': did you mean 'onnx'?" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match="neither the folder of a finished run"):
        export_onnx(tmp_path / "nowhere", tmp_path / "onnx")
    source = checkpoint(tmp_path / "model")
    for inside in (source, source / "onnx"):
        with pytest.raises(ConfigError, match="the artefact's own folder"):
            export_onnx(tmp_path, inside)
    other = checkpoint(tmp_path / "other")
    with pytest.raises(ArtifactError, match="no earlier export"):
        export_onnx(source, other)
    assert verify_digests(source) == verify_digests(other) == ()
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: content has changed"):
        export_onnx(source, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_read_only_folder_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "artefact")
    make = Path.mkdir

    def refused(self: Path, *arguments: Any, **named: Any) -> None:
        if self.name == ".onnx.new":
            raise OSError(errno.EROFS, "Read-only file system")
        make(self, *arguments, **named)

    def unmade(*_: Any) -> Any:
        raise AssertionError("a graph was made")

    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr("lowprec.onnx.folder.graph_of", unmade)
    with pytest.raises(ArtifactError, match="choose a folder that you may write to"):
        export_onnx(source, tmp_path / "onnx")


@SLOW
def test_a_finished_run_by_the_command_line(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model")
    tiny.text(tmp_path / "text.jsonl")
    report = lowprec.optimize(
        tmp_path / "model", out=tmp_path / "run", budget="30%", objective="bytes", effort=tiny.EFFORT,
        data=[tmp_path / "text.jsonl"],
    )  # fmt: skip
    command = [sys.executable, "-m", "lowprec.cli", "export", str(tmp_path / "run"), "--out", str(tmp_path / "onnx")]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, check=False)
        assert done.returncode == 0, done.stderr
        assert "decoder" in done.stdout
        assert "Traceback" not in done.stderr
    facts = metadata(tmp_path / "onnx")
    assert facts["lowprec.source_revision"] == report.plan.revision
    loaded, _ = load_artefact(tmp_path / "run" / "model")
    leave_inputs_(loaded)
    found = OnnxDecoder(tmp_path / "onnx" / "model.onnx", threads=1)
    assert_equal_logits((loaded, found), [40, 7], [20])
