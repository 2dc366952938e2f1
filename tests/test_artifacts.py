"""The compressed-tensors folder: what is written is what is loaded, and what would not load is not written."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from lowprec.artifacts import compressed_tensors as ct
from lowprec.artifacts.card import licence_of, model_card, write_card
from lowprec.artifacts.compressed_tensors import plan_artefact, write_artefact
from lowprec.artifacts.ct_schemes import runtime_notes, unsupported
from lowprec.artifacts.digests import verify_digests, write_digests
from lowprec.artifacts.loading import load_artefact, read_back, schemes_of
from lowprec.artifacts.probe import check_probe, make_probe, save_probe
from lowprec.artifacts.safetensors_io import load_tensors, read_header
from lowprec.artifacts.source import (
    check_gguf,
    check_model_folder,
    check_shapes,
    finite_tensors,
)
from lowprec.errors import ArtifactError, LowprecError, ModelError, UnsupportedError
from lowprec.formats import ACTIVATION_FORMATS, SCHEMES, WEIGHT_FORMATS, QuantizedWeight, for_tables, per_block
from lowprec.formats.schemes import TWO_LEVEL
from lowprec.records import Budget, PrecisionPlan, Scheme, Workload
from lowprec.results import CostResult, LossResult, SchemeShare, SourceLoss

STORED = sorted(
    name
    for name, s in SCHEMES.items()
    if s.weight in WEIGHT_FORMATS
    and WEIGHT_FORMATS[s.weight].symmetric
    and not (for_tables(s) or per_block(s) or TWO_LEVEL in s.name)
)
INPUT_SCALE = 0.03125
Q, K, V, O = (f"model.layers.0.self_attn.{x}_proj" for x in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down"))


def llama(tied: bool = True, kind: str = "Llama") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=tied,
        architectures=[f"{kind}ForCausalLM"],
        bos_token_id=1,
        eos_token_id=2,
    )
    return rounded(getattr(transformers, f"{kind}ForCausalLM")(config))


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=96,
        max_position_embeddings=32,
        architectures=["BertModel"],
    )
    return rounded(transformers.BertModel(config))


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=32, architectures=["GPT2LMHeadModel"]
    )
    return rounded(transformers.GPT2LMHeadModel(config))


def rounded(model: Any) -> Any:
    """The model in float32, with the bfloat16 values that a folder stores."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model.eval()


def rtn(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    assert scheme.weight is not None
    form = WEIGHT_FORMATS[scheme.weight]
    n, k = weight.shape
    slab = weight.detach().float().view(n, -1, form.group_size or k)
    scale = form.fit_scale(slab)
    codes = form.round(slab, scale, form.fit_lowest(slab, scale)).view(n, k).to(form.code_dtype)
    return QuantizedWeight(format=form.name, codes=codes, scale=scale[..., 0])


def solve(model: Any, schemes: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `write_artefact` for a model and its layers' schemes."""
    planned = {layer: SCHEMES[name] for layer, name in schemes.items()}
    quantized = {layer: s for layer, s in planned.items() if s.weight is not None}
    return {
        "config": model.config,
        "tensors": model.state_dict(),
        "solved": {layer: rtn(model.get_submodule(layer).weight, s) for layer, s in quantized.items()},
        "schemes": planned,
        "input_scales": {layer: INPUT_SCALE for layer, s in quantized.items() if s.name.endswith("-static")},
    }


def scored(model: Any, parts: dict[str, Any]) -> Any:
    """The model as it is scored: dense weights of the codes, inputs rounded; a tied head parts from the embedding."""
    for layer, weight in parts["solved"].items():
        module = model.get_submodule(layer)
        module.weight = nn.Parameter(weight.dequantize())
        activation = parts["schemes"][layer].activation
        if activation is not None:
            form = ACTIVATION_FORMATS[activation]
            scale = None if form.dynamic else torch.tensor(INPUT_SCALE)
            module.register_forward_pre_hook(lambda m, x, f=form, s=scale: (f.fake_quantize(x[0], s),))
    return model


def answer(model: Any) -> Tensor:
    tokens = torch.arange(24).view(2, 12) * 3 % 96
    with torch.no_grad():
        result = model(input_ids=tokens)
    return (
        result.logits
        if "logits" in result
        else torch.cat([result.last_hidden_state.flatten(), result.pooler_output.flatten()])
    )


def assert_same_codes(found: dict[str, QuantizedWeight], expected: dict[str, QuantizedWeight]) -> None:
    assert set(found) == set(expected)
    for layer, weight in expected.items():
        assert found[layer].format == weight.format
        assert found[layer].codes.dtype == weight.codes.dtype
        assert torch.equal(found[layer].codes.view(torch.uint8), weight.codes.view(torch.uint8))
        assert torch.equal(found[layer].scale, weight.scale)


@pytest.mark.parametrize("name", STORED)
def test_every_scheme_comes_back_bit_for_bit_and_answers_as_scored(tmp_path: Path, name: str) -> None:
    model = llama()
    parts = solve(model, dict.fromkeys((Q, K, V, O, DOWN, "lm_head"), name))
    written = write_artefact(tmp_path / "a", **parts, generation_config=model.generation_config)
    assert_same_codes(read_back(tmp_path / "a"), parts["solved"])
    assert schemes_of(tmp_path / "a") == parts["schemes"]
    loaded, tokenizer = load_artefact(tmp_path / "a")
    assert tokenizer is None
    for layer, weight in parts["solved"].items():
        assert torch.equal(loaded.get_submodule(layer).weight, weight.dequantize())
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    torch.testing.assert_close(answer(loaded), answer(scored(model, parts)), rtol=1e-5, atol=1e-6)
    assert written.weight_bytes + 8 < os.path.getsize(tmp_path / "a" / "model.safetensors")


def test_zero_points_are_refused_with_the_reason(tmp_path: Path) -> None:
    given = solve(llama(), {O: "w4a16-g32-asym"})
    with pytest.raises(UnsupportedError, match="zero points, which are packed in files but not in the modules"):
        write_artefact(tmp_path / "a", **given)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_mixed_models_load_with_their_ties(tmp_path: Path, kind: str, tied: bool) -> None:
    model = llama(tied, kind)
    parts = solve(
        model, {Q: "w8a8-int8", K: "w8a8-int8", V: "w8a8-int8", GATE: "w4a16-g64", UP: "w4a16-g64", O: "w8a8-fp8"}
    )
    write_artefact(tmp_path / "a", **parts)
    loaded, _ = load_artefact(tmp_path / "a")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "a" / "model.safetensors")) != tied
    stored = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert stored["format"] == "mixed-precision"
    assert set(stored["ignore"]) == {DOWN, "lm_head"}
    assert {g["format"] for g in stored["config_groups"].values()} == {
        "int-quantized",
        "pack-quantized",
        "float-quantized",
    }
    torch.testing.assert_close(answer(loaded), answer(scored(model, parts)), rtol=1e-5, atol=1e-6)


def test_a_quantised_head_parts_from_the_tied_embedding(tmp_path: Path) -> None:
    model = llama(tied=True)
    parts = solve(model, {"lm_head": "w4a16-g32"})
    written = write_artefact(tmp_path / "a", **parts)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.config.tie_word_embeddings is True
    assert any("lm_head" in note for note in written.runtime_notes)
    loaded, _ = load_artefact(tmp_path / "a")
    assert torch.equal(loaded.lm_head.weight, parts["solved"]["lm_head"].dequantize())
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("w4a16-g64", "VLLM_CPU_INT4_W4A8=0"),
        ("w8a16", "vLLM on a CPU does not load it"),
        ("w6a16", "no kernel for six bits"),
        ("w4a8-int8-g128", "on CPUs only"),
        ("w4a8-fp8-g64", "only with groups of 128"),
        ("w8a8-int8", "plain transformers"),
    ],
)
def test_what_runtimes_do_differently_is_told(scheme: str, words: str) -> None:
    assert any(words in note for note in runtime_notes([SCHEMES[scheme]], quantized_head=False))


def test_an_encoder_comes_back(tmp_path: Path) -> None:
    model = bert()
    base = "encoder.layer.0."
    names = {f"{base}attention.self.{x}": "w4a8-int8-g32" for x in ("query", "key", "value")}
    parts = solve(model, {**names, f"{base}intermediate.dense": "w8a16", "pooler.dense": "w8a8-int8"})
    write_artefact(tmp_path / "a", **parts)
    assert_same_codes(read_back(tmp_path / "a"), parts["solved"])
    loaded, _ = load_artefact(tmp_path / "a")
    torch.testing.assert_close(answer(loaded), answer(scored(model, parts)), rtol=1e-5, atol=1e-6)


def test_plain_transformers_takes_the_same_codes(tmp_path: Path) -> None:
    model = llama()
    parts = solve(model, {O: "w8a8-fp8", DOWN: "w8a8-int8", "lm_head": "w4a16-g128"})
    write_artefact(tmp_path / "a", **parts)
    plain, _ = load_artefact(tmp_path / "a", activations="library")
    for layer, weight in parts["solved"].items():
        assert torch.equal(plain.get_submodule(layer).weight, weight.dequantize())
    direct = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    assert torch.equal(answer(direct), answer(plain))
    # The library rounds INT8 activations to another grid: near, but not what was scored.
    expected = answer(scored(model, parts))
    assert not torch.equal(answer(plain), expected)
    torch.testing.assert_close(answer(plain), expected, rtol=0.0, atol=0.1)


def test_bfloat16_copies_round_the_product_once(tmp_path: Path) -> None:
    parts = solve(llama(), {DOWN: "w4a16-g32"})
    write_artefact(tmp_path / "a", **parts)
    loaded, _ = load_artefact(tmp_path / "a", dtype=torch.bfloat16)
    assert torch.equal(loaded.get_submodule(DOWN).weight, parts["solved"][DOWN].dequantize().bfloat16())


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    model = llama(tied=False)
    parts = solve(model, {O: "w4a16-g32", DOWN: "w8a8-int8"})
    write_artefact(tmp_path / "one", **parts)
    written = write_artefact(tmp_path / "many", **parts, shard_bytes=40_000)
    assert written.shards > 2
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    merged = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert set(merged) == set(whole)
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    assert_same_codes(read_back(tmp_path / "many"), parts["solved"])
    assert torch.equal(answer(load_artefact(tmp_path / "many")[0]), answer(load_artefact(tmp_path / "one")[0]))


def test_the_same_parts_give_the_same_bytes_one_tensor_at_a_time(tmp_path: Path) -> None:
    parts = solve(llama(), {Q: "w4a16-g32", K: "w4a16-g32", V: "w4a16-g32"})
    asked: list[str] = []

    class Lazy(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            asked.append(name)
            return super().__getitem__(name)

    write_artefact(tmp_path / "a", **{**parts, "tensors": Lazy(parts["tensors"])})
    assert "lm_head.weight" in asked
    write_artefact(tmp_path / "b", **parts)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert read_header(tmp_path / "a" / "model.safetensors").metadata == {"format": "pt"}


def changed(parts: dict[str, Any], layer: str, **changes: Any) -> dict[str, Any]:
    weight = parts["solved"][layer]
    values = {"format": weight.format, "codes": weight.codes, "scale": weight.scale, **changes}
    return {**parts, "solved": {**parts["solved"], layer: QuantizedWeight(**values)}}


def violations() -> dict[str, tuple[dict[str, Any], str]]:
    model = llama()
    int8, int4, static = (solve(model, {DOWN: name}) for name in ("w8a8-int8", "w4a16-g32", "w8a8-int8-static"))
    qkv = dict.fromkeys((Q, K, V), "w8a8-int8-static")
    codes, scale = int4["solved"][DOWN].codes, int4["solved"][DOWN].scale
    return {
        "fused in two schemes": (solve(model, {Q: "w8a8-int8", K: "w8a8-int8", V: "w8a16"}), "need one scheme"),
        "fused, one left out": (solve(model, {GATE: "w8a16"}), r"need one scheme \(gate_proj w8a16, up_proj bf16\)"),
        "fused by the caller": ({**int8, "fused": [(DOWN, O)]}, "need one scheme"),
        "fused input scales": (
            {**solve(model, qkv), "input_scales": {Q: 0.5, K: 0.25, V: 0.5}},
            "need one input scale",
        ),
        "unknown layer": (
            {**int8, "schemes": {DOWN + "s": SCHEMES["w8a8-int8"]}, "solved": {}},
            f"no such layer; did you mean '{DOWN}'",
        ),
        "not solved": ({**int8, "solved": {}}, "but not solved"),
        "solved for nothing": ({**int8, "schemes": {}}, "no scheme quantises it"),
        "another format": ({**int8, "solved": int4["solved"]}, "solved as int4-g32"),
        "a code out of range": (changed(int4, DOWN, codes=codes + 8), r"codes outside \[-8, 7\]"),
        "minus 128": (changed(int8, DOWN, codes=torch.full((128, 128), -128, dtype=torch.int8)), "-127, 127"),
        "codes of another type": (changed(int4, DOWN, codes=codes.int()), "not torch.int8"),
        "codes of another shape": (changed(int4, DOWN, codes=codes[:, :64]), r"not torch.int8 \[128, 128\]"),
        "scales of another shape": (changed(int4, DOWN, scale=scale[:, :2]), "scales are"),
        "a scale of zero": (changed(int4, DOWN, scale=torch.zeros_like(scale)), "not positive"),
        "a scale of NaN": (changed(int4, DOWN, scale=scale * float("nan")), "not positive"),
        "scales beyond bfloat16": (changed(int4, DOWN, scale=scale * 1.001), "bfloat16 cannot hold"),
        "no input scale": ({**static, "input_scales": {}}, "needs an input scale"),
        "an odd input scale": ({**static, "input_scales": {DOWN: 0.1}}, "bfloat16 cannot hold"),
        "a zero input scale": ({**static, "input_scales": {DOWN: 0.0}}, "not positive"),
        "a useless input scale": ({**int8, "input_scales": {DOWN: 0.5}}, "takes no input scale"),
        "an embedding": (
            {**int8, "schemes": {"model.embed_tokens": SCHEMES["w8a16"]}, "solved": {}},
            "Embedding is not nn.Linear",
        ),
        "rows of two widths": ({**int8, "schemes": {DOWN: SCHEMES["w4a16-g64-rows25"]}}, "one width for a tensor"),
        "inputs in blocks": ({**int8, "schemes": {DOWN: SCHEMES["w4a8-block-g64"]}}, "rounds inputs block by block"),
        "an unresolved scheme": ({**int8, "schemes": {DOWN: SCHEMES["w4a16"]}}, "no group size yet"),
    }


VIOLATIONS = violations()


@pytest.mark.parametrize("case", sorted(VIOLATIONS))
def test_what_would_not_load_is_not_written(tmp_path: Path, case: str) -> None:
    parts, words = VIOLATIONS[case]
    with pytest.raises(UnsupportedError, match=words):
        write_artefact(tmp_path / "a", **parts)
    assert not list(tmp_path.iterdir())


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    model = bert()
    name = "encoder.layer.0.output.dense"
    good = solve(model, {name: "w4a16-g32"})
    bad = QuantizedWeight(format="int4-g64", codes=good["solved"][name].codes, scale=torch.ones(64, 2))
    with pytest.raises(UnsupportedError, match="multiple of 64, it is 96"):
        plan_artefact(**{**good, "solved": {name: bad}, "schemes": {name: SCHEMES["w4a16-g64"]}})


def test_conv1d_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = gpt2()
    layer = "transformer.h.0.attn.c_attn"
    weight = rtn(model.get_submodule(layer).weight.T, SCHEMES["w8a16"])
    parts = {**solve(model, {}), "schemes": {layer: SCHEMES["w8a16"]}, "solved": {layer: weight}}
    with pytest.raises(UnsupportedError, match=r"lowprec\.load"):
        write_artefact(tmp_path / "a", **parts)
    assert "Conv1D" in str(unsupported(model.get_submodule(layer), SCHEMES["w8a16"]))
    assert unsupported("Conv1D", SCHEMES["bf16"]) is None
    assert unsupported(nn.Linear, SCHEMES["w8a16"]) is None
    # The rest of such a model is fine: its head is nn.Linear.
    parts = solve(model, {"lm_head": "w4a16-g64"})
    write_artefact(tmp_path / "a", **parts)
    torch.testing.assert_close(
        answer(load_artefact(tmp_path / "a")[0]), answer(scored(model, parts)), rtol=1e-5, atol=1e-6
    )


def test_wrong_tensors_are_refused(tmp_path: Path) -> None:
    parts = solve(llama(), {DOWN: "w8a16"})
    tensors = parts["tensors"]
    for broken, words in (
        ({n: t for n, t in tensors.items() if "norm" not in n}, "tensors are missing"),
        ({**tensors, "model.norms.weight": tensors["model.norm.weight"]}, "unknown tensor model.norms.weight"),
        ({**tensors, "model.norm.weight": torch.ones(3)}, r"is \[3\], the configuration says \[128\]"),
    ):
        with pytest.raises(ModelError, match=words):
            write_artefact(tmp_path / "a", **{**parts, "tensors": broken})
    untold = transformers.LlamaConfig(hidden_size=64)
    with pytest.raises(UnsupportedError, match="names no architecture"):
        write_artefact(tmp_path / "a", **{**parts, "config": untold})


def test_a_write_that_fails_in_the_middle_keeps_the_earlier_artefact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a"
    old = solve(llama(), {DOWN: "w8a16"})
    write_artefact(place, **old)
    new = solve(llama(), {DOWN: "w4a16-g32"})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ArtifactError, match="disk is full"):
            write_artefact(place, **new)
    with pytest.raises(KeyboardInterrupt):
        write_artefact(place, **new, finish=interrupted)
    with monkeypatch.context() as patched:
        patched.setattr(ct, "CONFIG_BYTES", 10**18)
        with pytest.raises(ArtifactError, match="are free"):
            write_artefact(place, **new)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert_same_codes(read_back(place), old["solved"])
    write_artefact(place, **new)
    assert_same_codes(read_back(place), new["solved"])
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_run_killed_between_the_renames_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a"
    parts = solve(llama(), {DOWN: "w8a16"})
    write_artefact(place, **parts)
    os.replace(place, tmp_path / ".a.old")
    (tmp_path / ".a.new").mkdir()
    load_artefact(place)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    real = os.replace

    def refuse_the_new(source: Path, target: Path) -> None:
        if Path(source).name == ".a.new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse_the_new)
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_artefact(place, **parts)
    assert_same_codes(read_back(place), parts["solved"])


def test_files_of_others_are_never_replaced(tmp_path: Path) -> None:
    parts = solve(llama(), {DOWN: "w8a16"})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match="no earlier artefact"):
        write_artefact(tmp_path / "a", **parts)
    (tmp_path / "b").write_text("x")
    with pytest.raises(ArtifactError, match="not a folder"):
        write_artefact(tmp_path / "b", **parts)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "thesis.tex"]


def test_a_damaged_artefact_is_not_loaded(tmp_path: Path) -> None:
    place = tmp_path / "a"
    write_artefact(place, **solve(llama(), {DOWN: "w8a8-int8"}), shard_bytes=100_000)
    write_digests(place)
    assert verify_digests(place) == ()
    shard = place / json.loads((place / ct.INDEX).read_text())["weight_map"][f"{DOWN}.weight"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    for read in (read_back, load_artefact):
        with pytest.raises(ArtifactError, match="is truncated"):
            read(place)
    assert verify_digests(place) == (f"{shard.name}: {len(whole) - 2} bytes, not {len(whole)}",)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert verify_digests(place) == (f"{shard.name}: content has changed",)
    shard.unlink()
    assert verify_digests(place) == (f"{shard.name}: missing",)
    with pytest.raises(ArtifactError, match="is missing"):
        load_artefact(place)
    (place / "digests.json").write_text("[]")
    with pytest.raises(ArtifactError, match="not a digest file"):
        verify_digests(place)
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        load_artefact(tmp_path)


def test_the_probe_tells_copies_from_changed_ones(tmp_path: Path) -> None:
    model = llama()
    parts = solve(model, {DOWN: "w8a8-int8", "lm_head": "w4a16-g32"})
    tokens = torch.arange(32).view(2, 16)

    def finish(folder: Path) -> None:
        save_probe(folder, make_probe(scored(model, parts).eval(), tokens))
        write_digests(folder)

    write_artefact(tmp_path / "a", **parts, finish=finish)
    assert verify_digests(tmp_path / "a") == ()
    loaded, _ = load_artefact(tmp_path / "a")
    assert check_probe(loaded, tmp_path / "a") < 1e-6
    with torch.no_grad():
        loaded.lm_head.weight[5] += 0.3
    assert check_probe(loaded, tmp_path / "a") > 1e-4
    with pytest.raises(ArtifactError, match="another kind of model"):
        check_probe(bert(), tmp_path / "a")
    encoder = bert()
    save_probe(tmp_path, make_probe(encoder, tokens))
    assert check_probe(encoder, tmp_path) < 1e-12
    (tmp_path / "probe.safetensors").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        check_probe(encoder, tmp_path)


def plan() -> PrecisionPlan:
    return PrecisionPlan(
        model="org/model-1b",
        revision="main",
        groups=(("a", "w8a16"), ("b", "w4a16-g64"), ("c", "w8a16")),
        budget=Budget(),
        workload=Workload(),
        target="torch",
        objective="bytes",
        solver="gptq",
        predicted_loss=0.02,
        predicted_cost=1.0,
        input_digests=(),
    )


def test_the_card_states_the_evidence(tmp_path: Path) -> None:
    loss = LossResult(
        metric="perplexity", budget=0.05, relative=0.031, lower=0.02, upper=0.0451, confidence=0.975, looks=1, units=60,
        tokens=41000, kl_nats=0.04, top1_agreement=0.9, perplexity_before=20.0, perplexity_after=20.62,
        per_source=(SourceLoss(source="topics", relative=0.03, lower=0, upper=0, kl_nats=0, units=30, tokens=20000),),
    )  # fmt: skip
    cost = CostResult(
        workload=Workload(), objective="bytes", unit="bytes", origin="measured", device="cpu", baseline="bfloat16",
        before=100.0, after=40.0, reduction_predicted=0.6, reduction_measured=0.6, effective_bits=5.5,
        weight_bytes_before=100, weight_bytes_after=40, decode_tokens_per_s_before=None,
        decode_tokens_per_s_after=None, prefill_tokens_per_s_before=None, prefill_tokens_per_s_after=None,
    )  # fmt: skip
    shares = (SchemeShare(scheme="w4a16-g64", groups=1, parameters=1234),)
    text = model_card(plan(), verdict="within", loss=loss, cost=cost, schemes=shares, notes=("a limit",))
    front = text.split("---")[1]
    assert "base_model: org/model-1b" in front
    assert "quantization: compressed-tensors" in front
    for words in ("**within**", "+3.10%", "+4.51%", "60.0% less", "1,234", "a limit", "vllm serve", "topics", "5.50"):
        assert words in text
    assert write_card(tmp_path, text).read_text() == text
    assert "indicative only" not in text
    again = model_card(plan(), verdict="within", reused=True, loss=loss, cost=cost)
    assert "**within**: The loss stays within the budget. The held-out data had been read by an earlier run" in again
    early = model_card(plan(), decoder=False)
    assert "| w8a16 | 2 |" in early
    assert "vllm" not in early
    assert "AutoModel.from_pretrained" in early


def test_the_card_names_a_base_model_of_the_hub_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "base_model: org/model-1b\n" in model_card(plan())
    (tmp_path / "org" / "model-1b").mkdir(parents=True)
    assert "base_model" not in model_card(plan())


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\ntags:\n- x\nlicense: apache-2.0\n---\n# Model\n", "apache-2.0"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("---\nlicense:\n- mit\n- other\n---\n", None),
        ("---\ntags: x\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
    ],
)
def test_the_licence_is_read_from_the_front_matter(tmp_path: Path, readme: str, licence: str | None) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text(readme)
    assert licence_of(tmp_path) == licence
    assert ("license: apache-2.0\n" in model_card(plan(), licence=licence)) == (licence == "apache-2.0")


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


def test_a_healthy_folder_is_read_as_it_is(healthy: Path) -> None:
    files = check_model_folder(healthy)
    assert len(set(files.values())) > 1
    model = llama()
    check_shapes(files, model)
    tensors = {name: load_tensors(file, [name])[0][name] for name, file in files.items()}
    assert dict(finite_tensors(tensors.items())).keys() == tensors.keys()
    assert all(torch.equal(tensors[name], model.state_dict()[name]) for name in files)
    parts = solve(model, {DOWN: "w8a16"})
    assert plan_artefact(**{**parts, "tensors": tensors}).bytes == plan_artefact(**parts).bytes


def test_damaged_weights_are_named(healthy: Path) -> None:
    shard = sorted(healthy.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    for content, words in (
        (whole[:-1], "is truncated"),
        (whole + b"x", "its header promises"),
        (b"", "is truncated"),
        (struct.pack("<Q", 40) + b"{" * 40, "unreadable safetensors header"),
        (b"version https://git-lfs.github.com/spec/v1", "is truncated or not a safetensors file"),
    ):
        shard.write_bytes(content)
        with pytest.raises(ArtifactError, match=words):
            check_model_folder(healthy)
    shard.unlink()
    with pytest.raises(ArtifactError, match=f"{shard.name}: is missing"):
        check_model_folder(healthy)


def test_a_damaged_index_is_named(healthy: Path) -> None:
    index = healthy / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    stored["weight_map"]["model.extra"] = next(iter(stored["weight_map"].values()))
    index.write_text(json.dumps(stored))
    with pytest.raises(ArtifactError, match=r"1 tensors that no file has, such as model\.extra"):
        check_model_folder(healthy)
    for content, words in (("{}", "not an index"), ('{"weight_map": {"a": "../b"}}', "outside the folder")):
        index.write_text(content)
        with pytest.raises(ArtifactError, match=words):
            check_model_folder(healthy)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "config.json: is missing"),
        ("{", "is not JSON"),
        ("[1]", "no model_type"),
        ("{}", "no model_type"),
        ('{"model_type": "lama"}', "no architecture 'lama'; did you mean 'llama'"),
        ('{"model_type": "zzzzzzzzz"}', "update transformers"),
        ('{"model_type": "zzzzzzzzz", "auto_map": {"AutoConfig": "x.Y"}}', "--trust-remote-code"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', r"quantised already \(gptq\)"),
        ('{"model_type": "llama", "quantization_config": 4}', "quantization_config is no object"),
        ('{"model_type": "llama"}', r'has no architectures; set it .* example \["LlamaForCausalLM"\] or'),
        ('{"model_type": "bert", "architectures": []}', r"has the architectures \[\]; set it"),
        ('{"model_type": "bert", "architectures": "BertModel"}', r'has the architectures "BertModel"; set it'),
        ('{"model_type": "llama", "architectures": ["LlamaXForCausalLM"]}', "did you mean 'LlamaForCausalLM'"),
        ('{"model_type": "llama", "architectures": ["LlamaConfig"]}', "no class 'LlamaConfig'"),
    ],
)
def test_bad_configurations_are_named(healthy: Path, config: str | None, words: str) -> None:
    (healthy / "config.json").unlink()
    if config is not None:
        (healthy / "config.json").write_text(config)
    with pytest.raises(LowprecError, match=words):
        check_model_folder(healthy)


def test_remote_code_needs_the_flag(healthy: Path) -> None:
    config = '{"model_type": "zzzzzzzzz", "architectures": ["Zz"], "auto_map": {"AutoConfig": "x.Y"}}'
    (healthy / "config.json").write_text(config)
    assert check_model_folder(healthy, trust_remote_code=True)


def test_pickles_are_refused_and_never_opened(healthy: Path) -> None:
    for file in healthy.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ArtifactError, match="is missing; get the model's safetensors"):
        check_model_folder(healthy)
    (healthy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ModelError, match="convert it to safetensors"):
        check_model_folder(healthy)
    with pytest.raises(ArtifactError, match="is not a folder"):
        check_model_folder(healthy / "nothing")


def test_weights_of_another_model_are_refused(healthy: Path) -> None:
    files = check_model_folder(healthy)
    other = llama().config
    other.intermediate_size = 96
    with pytest.raises(ModelError, match=r"the configuration says \[.*96.*\]; config.json and weights"):
        check_shapes(files, type(llama())(other))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    tensor = torch.zeros(4, 5, dtype=torch.bfloat16)
    tensor[2, 3] = value
    large = torch.full((4,), 3e38)
    with pytest.raises(ModelError, match=r"tensor w has 1 values .* the first at \[2, 3\]"):
        list(finite_tensors([("large", large), ("ids", torch.ones(2, dtype=torch.int64)), ("w", tensor)]))


def test_gguf_files_are_checked(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", torch.ones(64, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_gguf(path)
    whole = path.read_bytes()
    for content, words in (
        (whole[: len(whole) // 2], "truncated or damaged"),
        (whole[:10], "is truncated"),
        (b"PK" + whole, "no GGUF file"),
        (whole[:4] + struct.pack("<I", 9) + whole[8:], "GGUF version 9"),
        (whole[:8] + struct.pack("<Q", 2**60) + whole[16:], "file is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=words):
            check_gguf(path)
    path.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        check_gguf(path)


def test_a_copy_of_the_folder_is_still_the_artefact(tmp_path: Path) -> None:
    parts = solve(llama(), {DOWN: "w8a16"})
    write_artefact(tmp_path / "a", **parts)
    write_digests(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert verify_digests(tmp_path / "b") == ()
    assert_same_codes(read_back(tmp_path / "b"), parts["solved"])
