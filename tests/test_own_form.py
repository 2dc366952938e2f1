"""lowprec's own form: codes come back bit for bit, into the model they were made from and no other."""

import copy
import errno
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowprec
import tiny
from lowprec.artifacts import own_form
from lowprec.artifacts.card import load_snippet, model_card
from lowprec.artifacts.digests import verify_digests, write_digests
from lowprec.artifacts.loading import RoundInput, read_back
from lowprec.artifacts.own_form import read_manifest, write_own_form
from lowprec.artifacts.source import weights_digest
from lowprec.errors import ArtifactError, ConfigError, ModelError, UnsupportedError
from lowprec.formats import ACTIVATION_FORMATS, SCHEMES, WEIGHT_FORMATS, QuantizedWeight
from lowprec.records import Budget, PrecisionPlan, Workload
from lowprec.runtime import QuantLinear
from lowprec.runtime.convert import linear_layers, stored_weight, weight_of

STORED = sorted(name for name, s in SCHEMES.items() if s.weight in WEIGHT_FORMATS)
SCALE = 0.03125
ATTN, FC = "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"
MIX = {ATTN: "w4a16-g64", FC: "w8a8-int8-static", "transformer.h.2.mlp.c_proj": "w8a8-fp8"}
PLAIN_MIX = {"layers.0": "w4a8-int8-g32", "layers.2": "w8a8-int8-static"}


class Plain(nn.Module):
    """A module of nobody's library: K of 64 and 128, a tied head, a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(tiny.WORDS, 64)
        self.layers = nn.ModuleList([nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64, bias=False)])
        self.head = nn.Linear(64, tiny.WORDS, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.ones(64))

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V]."""
        x = self.embedding(ids) + self.shift
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def parts(module: nn.Module, schemes: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `write_own_form`."""
    planned = {layer: SCHEMES[name] for layer, name in schemes.items()}
    layers = linear_layers(module)
    return {
        "module": module,
        "name": "org/model",
        "revision": weights_digest(module),
        "solved": {layer: tiny.rounded(weight_of(layers[layer]), str(s.weight)) for layer, s in planned.items()},
        "schemes": planned,
        "input_scales": {layer: SCALE for layer, s in planned.items() if s.name.endswith("-static")},
    }


def scored(module: nn.Module, given: Mapping[str, Any]) -> nn.Module:
    """A float32 copy that computes as the plan says, made without the loader."""
    module = copy.deepcopy(module).float()
    layers = linear_layers(module)
    for layer, weight in given["solved"].items():
        layers[layer].weight = nn.Parameter(stored_weight(layers[layer], weight.dequantize()))
        activation = given["schemes"][layer].activation
        if activation is not None:
            form = ACTIVATION_FORMATS[activation]
            scale = None if form.dynamic else torch.tensor(SCALE)
            layers[layer].register_forward_pre_hook(lambda m, x, f=form, s=scale: (f.fake_quantize(x[0], s),))
    return module


def answer(module: nn.Module) -> Tensor:
    with torch.no_grad():
        out = module(tiny.batch())
    return out if isinstance(out, Tensor) else out.logits


def assert_same_codes(found: Mapping[str, QuantizedWeight], expected: Mapping[str, QuantizedWeight]) -> None:
    assert set(found) == set(expected)
    for layer, weight in expected.items():
        assert found[layer].format == weight.format
        assert torch.equal(found[layer].codes.view(torch.uint8), weight.codes.view(torch.uint8))
        assert torch.equal(found[layer].scale, weight.scale)


@pytest.mark.parametrize("name", STORED)
def test_every_scheme_of_a_conv1d_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    model = tiny.decoder("gpt2")
    size = WEIGHT_FORMATS[str(SCHEMES[name].weight)].group_size or 32
    layer = "transformer.h.0.mlp.c_proj" if size > 64 else ATTN
    given = parts(model, {layer: name})
    written = write_own_form(tmp_path / "a", **given)
    assert_same_codes(read_back(tmp_path / "a"), given["solved"])
    stored = load_file(tmp_path / "a" / "lowprec.safetensors")
    n, k = given["solved"][layer].codes.shape
    per_row = WEIGHT_FORMATS[given["solved"][layer].format].bytes_per_row(k)
    held = sum(tensor.nbytes for name, tensor in stored.items() if name.startswith(f"{layer}.") and "bias" not in name)
    assert held == pytest.approx(n * per_row, rel=0.01), "4-bit codes are packed, also those for INT8 inputs"
    assert written.weight_bytes == sum(t.nbytes for t in stored.values())
    loaded, _ = lowprec.load_artefact(tmp_path / "a")
    torch.testing.assert_close(answer(loaded), answer(scored(model, given)), rtol=1e-5, atol=1e-6)


def test_gpt2_loads_on_its_own(tmp_path: Path) -> None:
    model = tiny.decoder("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = parts(model, MIX)
    write_own_form(
        tmp_path / "a",
        **given,
        tokenizer=tiny.tokenizer(),
        generation_config=model.generation_config,
        finish=write_digests,
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "it is only read"
    assert verify_digests(tmp_path / "a") == ()
    loaded, tokenizer = lowprec.load_artefact(tmp_path / "a")
    assert type(loaded) is type(model)
    assert tokenizer("w1 w2")["input_ids"] == tiny.tokenizer()("w1 w2")["input_ids"]
    assert loaded.lm_head.weight is loaded.transformer.wte.weight, "a tie that holds is stored once"
    torch.testing.assert_close(answer(loaded), answer(scored(model, given)), rtol=1e-5, atol=1e-6)
    half, _ = lowprec.load_artefact(tmp_path / "a", torch.bfloat16)
    assert half.dtype == torch.bfloat16
    manifest = read_manifest(tmp_path / "a")
    assert (manifest.form, manifest.model, manifest.module) == ("lowprec", "org/model", "GPT2LMHeadModel")
    assert manifest.revision == weights_digest(model)
    with pytest.raises(ConfigError, match="own form"):
        lowprec.load_artefact(tmp_path / "a", activations="library")


def test_who_drops_each_weight_as_it_is_made_never_holds_them_all(tmp_path: Path) -> None:
    given = parts(tiny.decoder("gpt2"), MIX)
    write_own_form(tmp_path / "a", **given)
    dense, seen = {}, []

    def made(model: nn.Module, layer: str) -> None:
        weights = {name: model.get_submodule(name).weight for name in MIX}
        held = [name for name, weight in weights.items() if weight.untyped_storage().nbytes() > weight.itemsize]
        assert held == [layer], "the others are not made yet, or dropped"
        seen.append(layer)
        dense[layer] = weights[layer]
        model.get_submodule(layer).weight = nn.Parameter(torch.zeros(()).expand(weights[layer].shape))

    dropped, _ = lowprec.load_artefact(tmp_path / "a", made=made)
    assert seen == list(MIX)
    whole, _ = lowprec.load_artefact(tmp_path / "a")
    for name in MIX:
        assert torch.equal(dense[name], whole.get_submodule(name).weight)
        assert not dropped.get_submodule(name).weight.any()


def test_plain_transformers_refuses_the_folder(tmp_path: Path) -> None:
    write_own_form(tmp_path / "a", **parts(tiny.decoder("gpt2"), MIX))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", local_files_only=True)


def test_a_quantised_head_parts_from_the_tied_embedding(tmp_path: Path) -> None:
    model = tiny.decoder("gpt2")
    given = parts(model, {"lm_head": "w4a16-g32", ATTN: "w8a16"})
    write_own_form(tmp_path / "a", **given)
    loaded, _ = lowprec.load_artefact(tmp_path / "a")
    assert torch.equal(loaded.lm_head.weight, given["solved"]["lm_head"].dequantize())
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight.float())
    assert model.config.tie_word_embeddings
    torch.testing.assert_close(answer(loaded), answer(scored(model, given)), rtol=1e-5, atol=1e-6)
    own = lowprec.apply_artefact(copy.deepcopy(model), tmp_path / "a", dtype=torch.float32)
    assert torch.equal(answer(own), answer(loaded))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_models_of_nn_linear_come_back_too(tmp_path: Path, name: str) -> None:
    model = tiny.decoder(name) if name == "llama" else tiny.encoder()
    layer = next(layer for layer in linear_layers(model) if "layers.0" in layer or "layer.0" in layer)
    given = parts(model, {layer: "w4a16-g64"})
    write_own_form(tmp_path / "a", **given)
    assert read_manifest(tmp_path / "a").form == "lowprec", (
        "the class tells the architecture, where the config does not"
    )
    loaded, _ = lowprec.load_artefact(tmp_path / "a")
    assert torch.equal(loaded.get_submodule(layer).weight, given["solved"][layer].dequantize())


def test_a_changed_transformers_model_is_stored_as_layers(tmp_path: Path) -> None:
    model = tiny.decoder("gpt2")
    model.extra = nn.Linear(64, 64)
    write_own_form(tmp_path / "a", **parts(model, MIX))
    assert read_manifest(tmp_path / "a").form == "lowprec-layers"
    assert not (tmp_path / "a" / "config.json").exists()


def test_a_plain_module_gets_its_layers(tmp_path: Path) -> None:
    module = Plain()
    given = parts(module, PLAIN_MIX)
    written = write_own_form(tmp_path / "a", **given, finish=write_digests)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["digests.json", "lowprec.json", "lowprec.safetensors"]
    codes = sum(t.nbytes for t in load_file(tmp_path / "a" / "lowprec.safetensors").values())
    stays = module.embedding.weight.nbytes + module.layers[0].bias.nbytes
    assert written.weight_bytes == codes + stays, "the tied head's weight counts once"
    with pytest.raises(ArtifactError, match=r"only the quantised layers of a Plain.*apply_artefact"):
        lowprec.load_artefact(tmp_path / "a")
    expected = answer(scored(module, given))
    dense = lowprec.apply_artefact(Plain(), tmp_path / "a")
    assert torch.equal(answer(dense), expected)
    assert dense.head.weight is dense.embedding.weight


def test_the_kernels_run_what_the_dense_weights_are(tmp_path: Path) -> None:
    given = parts(Plain(), PLAIN_MIX)
    write_own_form(tmp_path / "a", **given)
    fast = lowprec.apply_artefact(Plain(), tmp_path / "a", runtime=True)
    assert {name for name, m in fast.named_modules() if isinstance(m, QuantLinear)} == set(PLAIN_MIX)
    assert fast.layers[0].codes.dtype == torch.int32
    truth = answer(scored(Plain(), given))
    assert float((answer(fast) - truth).norm() / truth.norm()) < 2e-2
    with pytest.raises(ModelError, match=r"no layer layers\.0.*unconverted"):
        lowprec.apply_artefact(fast, tmp_path / "a")


def test_what_an_artefact_changed_takes_the_same_one_again_and_no_other(tmp_path: Path) -> None:
    given = parts(Plain(), PLAIN_MIX)
    write_own_form(tmp_path / "a", **given)
    write_own_form(tmp_path / "b", **parts(Plain(), {"layers.0": "w8a16"}))
    module = lowprec.apply_artefact(Plain(), tmp_path / "a")
    again = lowprec.apply_artefact(module, tmp_path / "a")
    hooks = [h for m in again.modules() for h in m._forward_pre_hooks.values() if isinstance(h, RoundInput)]
    assert len(hooks) == 2, "inputs are rounded once"
    assert torch.equal(answer(again), answer(scored(Plain(), given)))
    # The other leaves a layer alone that this one has changed.
    with pytest.raises(ModelError, match="have the digest"):
        lowprec.apply_artefact(module, tmp_path / "b")
    assert isinstance(lowprec.apply_artefact(module, tmp_path / "a", runtime=True).layers[0], QuantLinear)
    model = tiny.decoder("gpt2")
    write_own_form(tmp_path / "c", **parts(model, MIX))
    loaded, _ = lowprec.load_artefact(tmp_path / "c")
    fast = lowprec.apply_artefact(copy.deepcopy(loaded), tmp_path / "c", runtime=True)
    assert float((answer(fast) - answer(loaded)).norm() / answer(loaded).norm()) < 5e-2


def test_other_models_are_refused_and_left_alone(tmp_path: Path) -> None:
    write_own_form(tmp_path / "a", **parts(Plain(), PLAIN_MIX))
    other, cast, narrow, renamed = Plain(seed=1), Plain().bfloat16(), Plain(), Plain()
    narrow.layers[2] = nn.Linear(128, 32)
    renamed.layer, renamed.layers = renamed.layers, nn.ModuleList()
    for module, words in (
        (other, r"digest \w+, .* was made from \w+ \(org/model\)"),
        (cast, "same precision"),
        (narrow, r"layers\.2 is \[32, 128\], .* has codes for \[64, 128\]"),
        (renamed, r"no layer layers\.0.*did you mean 'layer\.0'"),
    ):
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(ModelError, match=words):
            lowprec.apply_artefact(module, tmp_path / "a", dtype=torch.float32)
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        assert {t.dtype for t in module.state_dict().values()} == {t.dtype for t in before.values()}


def edited(place: Path, change: Any) -> None:
    stored = json.loads((place / "lowprec.json").read_text())
    change(stored)
    (place / "lowprec.json").write_text(json.dumps(stored))


def test_damage_is_named(tmp_path: Path) -> None:
    place = tmp_path / "a"
    write_own_form(place, **parts(Plain(), PLAIN_MIX))
    manifest, weights = ((place / name).read_bytes() for name in ("lowprec.json", "lowprec.safetensors"))

    def refused(words: str) -> None:
        with pytest.raises(ArtifactError, match=words):
            lowprec.apply_artefact(Plain(), place)
        (place / "lowprec.json").write_bytes(manifest)
        (place / "lowprec.safetensors").write_bytes(weights)

    for text, words in (
        ("{", "is not JSON"),
        ("[]", "schema version"),
        ("\ufffd\x00", "cannot be used"),
        (manifest.decode().replace('"schema_version": 1', '"schema_version": 2'), "schema version 2.*update lowprec"),
        (manifest.decode().replace("w4a8-int8-g32", "w3a8-int8-g32"), "does not know"),
        (manifest.decode().replace('"n": 128', '"n": -1'), "does not know"),
        (manifest.decode().replace('"n": 128', '"n": "x"'), "cannot be used"),
    ):
        (place / "lowprec.json").write_text(text)
        refused(words)
    edited(place, lambda stored: stored.update(layers=[[]]))
    refused("cannot be used")
    edited(place, lambda stored: stored.update(model="another"))
    refused("does not belong to the lowprec.json beside it")
    (place / "lowprec.safetensors").write_bytes(weights[:-1])
    refused("is truncated")
    (place / "lowprec.safetensors").write_bytes(pickle.dumps({"layers.0.codes": 1}))
    refused("not a safetensors file")
    tensors, key = load_file(place / "lowprec.safetensors"), {own_form.BOUND: read_manifest(place).key}
    save_file({n: t for n, t in tensors.items() if n != "layers.0.scale"}, place / "lowprec.safetensors", key)
    refused(r"has no tensor layers\.0\.scale in torch\.bfloat16 \[128, 2\]")
    save_file({**tensors, "layers.0.scale": -tensors["layers.0.scale"]}, place / "lowprec.safetensors", key)
    refused(r"is damaged: layers\.0 has scales that are not positive")
    (place / "lowprec.safetensors").unlink()
    refused("is missing")
    (place / "lowprec.json").unlink()
    refused(r"is missing; it is no artefact of lowprec's own form")
    assert_same_codes(read_back(place), parts(Plain(), PLAIN_MIX)["solved"])


def test_a_whole_model_that_lost_a_tensor_does_not_load(tmp_path: Path) -> None:
    place = tmp_path / "a"
    write_own_form(place, **parts(tiny.decoder("gpt2"), MIX))
    tensors, key = load_file(place / "lowprec.safetensors"), {own_form.BOUND: read_manifest(place).key}
    save_file({n: t for n, t in tensors.items() if "ln_f.bias" not in n}, place / "lowprec.safetensors", key)
    with pytest.raises(ArtifactError, match=r"missing_keys.*ln_f\.bias"):
        lowprec.load_artefact(place)
    (place / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"config\.json"):
        lowprec.load_artefact(place)


def test_a_compressed_tensors_folder_is_told_apart(tmp_path: Path) -> None:
    model = tiny.decoder()
    model.config.architectures = ["LlamaForCausalLM"]
    lowprec.write_artefact(tmp_path / "a", config=model.config, tensors=model.state_dict(), solved={}, schemes={})
    with pytest.raises(ArtifactError, match=r"lowprec\.load_artefact"):
        lowprec.apply_artefact(model, tmp_path / "a")


def test_what_cannot_be_stored_is_not_written(tmp_path: Path) -> None:
    good = parts(Plain(), PLAIN_MIX)
    weight = good["solved"]["layers.0"]
    odd = QuantizedWeight(format=weight.format, codes=weight.codes, scale=weight.scale * 1.001)
    for changed, words in (
        ({"schemes": {"layers.9": SCHEMES["w8a16"]}, "solved": {}}, r"layers\.9: the model has no such layer"),
        ({"solved": {}}, "but not solved"),
        ({"schemes": {}}, "no scheme quantises it"),
        ({"input_scales": {}}, "needs an input scale"),
        ({"solved": {**good["solved"], "layers.0": odd}}, "bfloat16 cannot hold"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            write_own_form(tmp_path / "a", **{**good, **changed})
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_keeps_the_earlier_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, old = tmp_path / "a", parts(Plain(), PLAIN_MIX)
    write_own_form(place, **old)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ArtifactError, match="disk is full"):
            write_own_form(place, **parts(Plain(), {"layers.0": "w8a16"}))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert_same_codes(read_back(place), old["solved"])
    os.replace(place, tmp_path / ".a.old")
    lowprec.apply_artefact(Plain(), place)
    write_own_form(place, **parts(Plain(), {"layers.0": "w8a16"}))
    assert set(read_back(place)) == {"layers.0"}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match="no earlier artefact"):
        write_own_form(tmp_path / "theirs", **old)


def test_a_mix_without_a_quantised_layer_is_an_artefact_too(tmp_path: Path) -> None:
    write_own_form(tmp_path / "a", **parts(Plain(), {}))
    for runtime in (False, True):
        assert torch.equal(answer(lowprec.apply_artefact(Plain(), tmp_path / "a", runtime=runtime)), answer(Plain()))


def test_the_card_tells_how_to_load_each_form() -> None:
    plan = PrecisionPlan(
        model="org/gpt2", revision="x", groups=(("a", "w8a16"),), budget=Budget(), workload=Workload(), target="torch",
        objective="bytes", solver="gptq", predicted_loss=0.0, predicted_cost=1.0, input_digests=(),
    )  # fmt: skip
    whole, layers = model_card(plan, form="lowprec"), model_card(plan, form="lowprec-layers", decoder=False)
    for text, words in ((whole, "lowprec.load_artefact(folder)"), (layers, "lowprec.apply_artefact(module, folder)")):
        assert words in text
        assert "library_name: lowprec" in text
        assert "compressed-tensors" not in text
        assert "vllm" not in text
    assert "from_pretrained" in load_snippet("compressed-tensors", '"x"', decoder=True)
