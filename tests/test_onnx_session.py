"""An artefact in onnxruntime: exported, opened, and asked for logits and text."""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor

import tiny
from lowprec.artifacts.loading import leave_inputs_, load_artefact
from lowprec.artifacts.own_form import write_own_form
from lowprec.artifacts.source import weights_digest
from lowprec.cli import main
from lowprec.errors import ArtifactError, ConfigError, ModelError
from lowprec.formats import SCHEMES
from lowprec.onnx import export_onnx
from lowprec.onnx.module import OnnxModule
from lowprec.onnx.sampling import Sampler
from lowprec.onnx.session import Session
from lowprec.runtime.convert import weight_of, weighted_modules

SLOW = pytest.mark.slow
HEAD, TABLE = "lm_head", "model.embed_tokens"
LAYER = "model.layers.0"
QKV = [f"{LAYER}.self_attn.{x}_proj" for x in "qkv"]
GATE_UP = [f"{LAYER}.mlp.{x}_proj" for x in ("gate", "up")]
MIX = {
    **dict.fromkeys(QKV, "w4a16-g32"),
    f"{LAYER}.self_attn.o_proj": "w8a8-fp8",
    **dict.fromkeys(GATE_UP, "w4a16-g64-asym"),
    f"{LAYER}.mlp.down_proj": "w8a16",
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small(name: str = "llama") -> Any:
    """A decoder of one layer."""
    torch.manual_seed(0)
    config = copy.deepcopy(tiny.DECODERS[name])
    config.num_hidden_layers, config.bos_token_id, config.eos_token_id = 1, 1, 2
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
    return model.to(torch.bfloat16)


def artefact(path: Path, schemes: dict[str, str], model: Any = None, **more: Any) -> Path:
    """An artefact of lowprec's own form."""
    model = small() if model is None else model
    layers = weighted_modules(model)
    solved = {x: tiny.rounded(weight_of(layers[x]), str(SCHEMES[s].weight)) for x, s in schemes.items()}
    write_own_form(
        path, module=model, name="org/m", revision=weights_digest(model), solved=solved,
        schemes={x: SCHEMES[s] for x, s in schemes.items()}, tokenizer=tiny.tokenizer(),
        generation_config=model.generation_config, **more,
    )  # fmt: skip
    return path


def loaded(path: Path) -> Any:
    """The artefact in torch, its inputs not rounded."""
    model, _ = load_artefact(path)
    leave_inputs_(model)
    return model


def alone(model: Any, row: Tensor) -> Tensor:
    """Logits [T, V] of one sequence by torch."""
    with torch.no_grad():
        found: Tensor = model(input_ids=row[None], use_cache=False).logits[0]
    return found


def nodes(folder: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artefact of many schemes, and its two forms for onnxruntime and the canonical one."""
    place = tmp_path_factory.mktemp("exported")
    artefact(place / "artefact", {**MIX, HEAD: "w4a16-g64-rows25"}, tables={HEAD: (TABLE,)})
    for accuracy in ("exact", "fast"):
        export_onnx(place / "artefact", place / accuracy, target="onnxruntime", accuracy=accuracy)
    export_onnx(place / "artefact", place / "onnx")
    return place


def test_the_exact_form_answers_as_the_artefact(exported: Path) -> None:
    model, session = loaded(exported / "artefact"), Session(exported / "exact", threads=1)
    ids = tiny.batch(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :9], mask[2, 12:] = 0, 0
    found = session.logits(ids, mask)
    for row, real, logits in zip(ids, mask.bool(), found, strict=True):
        torch.testing.assert_close(logits[real], alone(model, row[real]), rtol=0, atol=1e-4)
    # Exact forms differ in the order of additions alone.
    torch.testing.assert_close(
        found[mask.bool()], Session(exported / "onnx", threads=1).logits(ids, mask)[mask.bool()], rtol=0, atol=1e-4
    )


def test_the_fast_form_rounds_inputs_and_nothing_else(exported: Path) -> None:
    ids = tiny.batch(2, 24)
    exact, fast = (Session(exported / name, threads=1).logits(ids) for name in ("exact", "fast"))
    error = float((fast - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.1
    pairs = zip(nodes(exported / "exact"), nodes(exported / "fast"), strict=True)
    for one, other in pairs:
        levels = [{a.name: a.i for a in n.attribute}.get("accuracy_level") for n in (one, other)]
        assert levels in ([1, 4], [None, None])
    weights = [(exported / name / "model.onnx.data").read_bytes() for name in ("exact", "fast")]
    assert weights[0] == weights[1]


def test_layers_that_share_an_input_are_one_product(exported: Path) -> None:
    found = nodes(exported / "fast")
    products = {n.name for n in found if n.op_type == "MatMulNBits"}
    assert products == {
        f"{LAYER}.self_attn.q_proj+k_proj+v_proj", f"{LAYER}.mlp.gate_proj+up_proj", f"{LAYER}.mlp.down_proj",
        f"{HEAD}.fine", f"{HEAD}.coarse",
    }  # fmt: skip
    held = onnx.load(exported / "fast" / "model.onnx", load_external_data=False).graph.initializer
    assert not any(t.name.endswith("embed_tokens.weight") or t.name == f"{HEAD}.weight" for t in held)
    assert sum(n.op_type == "GatherBlockQuantized" for n in found) == 2, "the table is read in codes"
    assert sum(t.name == f"{HEAD}.coarse.codes" for t in held) == 1, "head and embedding share them"
    attention = next(n for n in found if n.op_type == "GroupQueryAttention")
    assert attention.input[1] == attention.input[2] == "", "queries, keys and values go in as one"


def test_notes_say_what_was_not_scored(exported: Path) -> None:
    def notes(name: str) -> list[str]:
        facts = onnx.load(exported / name / "model.onnx", load_external_data=False).metadata_props
        found: list[str] = json.loads({p.key: p.value for p in facts}["lowprec.notes"])
        return found

    fast, exact = notes("fast"), notes("exact")
    assert any("inputs are rounded to INT8 block by block" in note and "w8a16" in note for note in fast)
    assert not any("block by block" in note for note in exact)
    assert any("no kernel for INT8 weights" in note and "down_proj and 1 more" in note for note in exact)
    assert all(any("no kernel for FP8" in note and "o_proj" in note for note in form) for form in (fast, exact))


@pytest.mark.parametrize(
    "schemes",
    [{TABLE: "w8a16", HEAD: "w4a16-g32-asym"}, {TABLE: "w6a16"}, {TABLE: "w4a16-g32-asym"}, {TABLE: "w4a16-g64"}],
)
def test_tables_of_their_own(schemes: dict[str, str], tmp_path: Path) -> None:
    source = artefact(tmp_path / "artefact", schemes, small("llama-untied"))
    export_onnx(source, tmp_path / "onnx", target="onnxruntime")
    ids = tiny.batch(1, 12)
    found = Session(tmp_path / "onnx", threads=1).logits(ids)[0]
    torch.testing.assert_close(found, alone(loaded(source), ids[0]), rtol=0, atol=1e-4)


def test_conv1d_layers(tmp_path: Path) -> None:
    block = "transformer.h.0"
    mix = {f"{block}.attn.c_attn": "w4a16-g64", f"{block}.mlp.c_fc": "w4a16-g32", f"{block}.mlp.c_proj": "w8a16"}
    source = artefact(tmp_path / "artefact", mix, small("gpt2"))
    written = export_onnx(source, tmp_path / "onnx", target="onnxruntime")
    assert written.layers == 3
    assert not any("plain operators" in note for note in written.notes)
    model, session = loaded(source), Session(tmp_path / "onnx", threads=1)
    assert session.generate([[5, 6, 7], [9]], 6, stop=[]) == [greedy(model, row, 6) for row in ([5, 6, 7], [9])]


# Text


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """Torch's own continuation, without a cache."""
    row = torch.tensor(prompt)
    for _ in range(tokens):
        row = torch.cat([row, alone(model, row)[-1:].argmax(-1)])
    return row[len(prompt) :].tolist()


PROMPTS = [tiny.batch(1, length, seed=length)[0].tolist() for length in (9, 4, 1)]


@pytest.mark.parametrize("form", ["exact", "onnx"])
@pytest.mark.parametrize("chunk", [512, 2])
def test_greedy_text_is_torchs(exported: Path, form: str, chunk: int) -> None:
    model, session = loaded(exported / "artefact"), Session(exported / form, threads=1)
    expected = [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert session.generate(PROMPTS, 6, stop=[], chunk=chunk) == expected
    assert session.generate([torch.tensor(PROMPTS[0])], 6, stop=[], chunk=chunk) == expected[:1]
    assert session.generate(PROMPTS, 0) == [[], [], []]


def test_an_answer_ends_at_a_stop_token(exported: Path) -> None:
    session = Session(exported / "exact", threads=1)
    whole = session.generate(PROMPTS, 8, stop=[])
    stop = whole[0][2]
    found = session.generate(PROMPTS, 8, stop=[stop])
    for before, after in zip(whole, found, strict=True):
        end = before.index(stop) + 1 if stop in before else 8
        assert after == before[:end]
    steps = list(session.stream(PROMPTS, 8, stop=[stop]))
    assert [[s[i] for s in steps if s[i] is not None] for i in range(3)] == found
    assert session.stop == (2,), "the model's own, of its generation_config.json"


def test_sampling_is_by_seed_and_row(exported: Path) -> None:
    session = Session(exported / "exact", threads=1)

    def text(prompts: Sequence[Sequence[int]], **choice: Any) -> list[list[int]]:
        return session.generate(prompts, 6, stop=[], **{"temperature": 2.0, "seed": 3, **choice})

    assert text(PROMPTS) == text(PROMPTS)
    assert text(PROMPTS) != text(PROMPTS, seed=4)
    assert text(PROMPTS)[:1] == text(PROMPTS[:1]), "a row does not depend on those beside it"
    assert text(PROMPTS, top_p=1e-9) == session.generate(PROMPTS, 6, stop=[])
    logits = np.log(np.array([[0.5, 0.3, 0.2]], dtype=np.float32)).repeat(4000, 0)
    counts = np.bincount(Sampler(temperature=1.0, seed=1).choose(logits), minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)
    assert set(Sampler(temperature=1.0, top_p=0.7).choose(logits)) == {0, 1}


def test_the_tokenizer_is_the_artefacts(exported: Path) -> None:
    assert Session(exported / "fast").tokenizer("w1 w2")["input_ids"] == tiny.tokenizer()("w1 w2")["input_ids"]


# What is refused


def test_what_a_session_refuses(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match=r"has no model\.onnx; write one with lowprec export"):
        Session(exported / "artefact")
    session = Session(exported / "fast", threads=1)
    with pytest.raises(ConfigError, match="at least one token"):
        session.generate([[1], []])
    with pytest.raises(ConfigError, match="at least one token"):
        session.generate([])
    assert session.positions is not None
    with pytest.raises(ConfigError, match=f"{session.positions + 1} tokens are asked for"):
        session.generate([[1] * session.positions], 2)
    assert len(session.generate([[1] * session.positions], 1)[0]) == 1, "the last token is told, not read"
    for prompts in (["hello"], [1, 2], [[1.5]]):
        with pytest.raises(ConfigError, match="a prompt is a list of token ids"):
            session.generate(prompts)  # type: ignore[arg-type]
    ids = torch.ones(2, 3, dtype=torch.long)
    for wrong_ids in (ids[:0], ids[:, :0], ids[0], ids.float()):
        with pytest.raises(ConfigError, match="token ids are"):
            session.logits(wrong_ids)
    for mask in (ids[:, :2], 2 * ids):
        with pytest.raises(ConfigError, match="the mask is 0 or 1"):
            session.logits(ids, mask)
    with pytest.raises(ConfigError, match="tokens run from -1 to 300, the model has 300"):
        session.generate([[300, -1]])
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"tokens": -1}, {"chunk": 0}):
        with pytest.raises(ConfigError, match="give"):
            session.generate([[1]], **wrong)
    broken = tmp_path / "model.onnx"
    broken.write_bytes((exported / "fast" / "model.onnx").read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="does not load in onnxruntime"):
        Session(tmp_path)
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.0")
    with pytest.raises(ArtifactError, match=r"graphs for onnxruntime need 1\.32"):
        Session(tmp_path)


def test_logits_that_are_not_finite_are_no_token() -> None:
    logits = np.zeros((2, 5), dtype=np.float32)
    logits[1, 3] = np.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ModelError, match="row 1 are not finite"):
            Sampler(temperature=temperature).choose(logits)


def test_an_export_is_no_source_and_its_form_may_be_for_others(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is an export \(model\.onnx\)"):
        export_onnx(exported / "fast", tmp_path / "again")
    model = onnx.load(exported / "fast" / "model.onnx", load_external_data=False)
    onnx.helper.set_model_props(model, {p.key: p.value for p in model.metadata_props} | {"lowprec.target": "qnn"})
    shutil.copytree(exported / "fast", tmp_path / "qnn")
    onnx.save(model, tmp_path / "qnn" / "model.onnx")
    with pytest.raises(ArtifactError, match="is the form for qnn"):
        Session(tmp_path / "qnn")


def test_more_tokens_than_there_are_positions_for_are_refused_by_the_module(exported: Path) -> None:
    module = OnnxModule(exported / "fast", threads=1)
    assert module.positions is not None
    with pytest.raises(ConfigError, match="the model has positions for"):
        module(input_ids=torch.ones(1, module.positions + 1, dtype=torch.long))


def test_a_model_that_does_not_say_for_how_many_tokens_it_is_has_no_genai_config(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=tiny.WORDS, hidden_size=64, n_layer=1, n_head=4)
    model = transformers.BloomForCausalLM(config).eval().to(torch.bfloat16)
    layer = "transformer.h.0.mlp.dense_4h_to_h"
    written = export_onnx(
        artefact(tmp_path / "artefact", {layer: "w4a16-g64"}, model), tmp_path / "o", target="onnxruntime"
    )
    assert any("no genai_config.json" in note for note in written.notes)
    assert not (tmp_path / "o" / "genai_config.json").exists()


def test_accuracies_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown accuracy 'fats': did you mean 'fast'"):
        export_onnx(tmp_path, tmp_path / "o", target="onnxruntime", accuracy="fats")
    with pytest.raises(ConfigError, match="leaves it to the runtime"):
        export_onnx(tmp_path, tmp_path / "o", accuracy="fast")
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"onnxruntime": "1.31.0"}.get(name, "99"))
    with pytest.raises(ConfigError, match=r"onnxruntime is 1\.31\.0, 1\.32 is needed"):
        export_onnx(tmp_path, tmp_path / "o", target="onnxruntime")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = artefact(tmp_path / "artefact", {f"{LAYER}.mlp.down_proj": "w4a16-g64"})
    command = ["lowprec", "export", str(source), "--target", "onnxruntime", "--accuracy", "fast", "-o"]
    monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "onnx")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert "w4a16-g64: inputs are rounded to INT8" in " ".join(capsys.readouterr().out.split())
    config = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["num_hidden_layers"] == 1
    assert config["search"]["past_present_share_buffer"] is True
    assert not (tmp_path / "onnx" / "exact.onnx").exists()
