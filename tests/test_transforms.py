"""Merged scales: the model's function stays to the last bit, and what is rounded after them loses less."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowprec
import tiny
from lowprec.errors import ModelError
from lowprec.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS, QuantizedWeight, resolve, scheme_named
from lowprec.solvers import SOLVERS
from lowprec.steps.graph import find_groups
from lowprec.steps.load import decoder_forward, load, sentence_forward, wrap
from lowprec.steps.stream import Forward, Stream
from lowprec.steps.tokens import Batch
from lowprec.steps.transform import smooth
from lowprec.transforms import Merge, Smoothed, fit_exponents, keys_of, merged

NORMS_AND_MORE = {
    "llama": {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"},
    "qwen3": {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"},
    # Norms that add 1 to their weight cannot take a scale exactly.
    "gemma3": {"self_attn.v_proj", "mlp.up_proj"},
    # The value's rows of the joint layer; no scale passes a GELU.
    "gpt2": {"ln_1", "ln_2", "attn.c_attn"},
}


def batch(seed: int, length: int = 16) -> Batch:
    return Batch(ids=tiny.batch(2, length, seed), lengths=torch.tensor([length, length]), index=(0, 1))


def made_heavy(module: Any) -> Any:
    """The module with two heavy channels behind every norm and a heavy row in every layer of its blocks."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 and "weight" in name:
                parameter[[3, 7]] *= 50.0
            elif parameter.ndim == 2 and not any(part in name for part in ("embed", "head", "wte", "wpe")):
                parameter[5] *= 30.0
                parameter[:, 5] *= 30.0
    return module


def smoothed(module: nn.Module, forward: Forward = decoder_forward, name: str = "w8a8-int8") -> tuple[Smoothed, ...]:
    stream = Stream(module, forward, batch(0, 8))
    groups, _ = find_groups(stream)
    schemes = {g.name: (resolve(scheme_named(name), g.k),) for g in groups}
    return smooth(stream, groups, schemes, [batch(1), batch(2)], batch(0, 8))


def random(found: tuple[Smoothed, ...], seed: int) -> list[tuple[Merge, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(s.merge, torch.randint(-3, 4, (s.merge.channels,), generator=generator)) for s in found]


@pytest.mark.parametrize("name", tiny.DECODERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_function_stays_and_so_do_the_weights_afterwards(name: str, dtype: torch.dtype) -> None:
    model = made_heavy(tiny.decoder(name))
    before = copy.deepcopy(model.state_dict())
    found = smoothed(model)
    assert found
    model.to(dtype)
    with torch.no_grad():
        expected = model(tiny.batch()).logits
        with merged(model, random(found, 1)):
            assert any(not torch.equal(p.to(torch.bfloat16), before[n]) for n, p in model.state_dict().items())
            changed = model(tiny.batch()).logits
    # The bar is 1e-9 in float64; scales that are powers of two leave no difference at all.
    assert torch.equal(changed, expected)
    assert all(torch.equal(p.to(torch.bfloat16), before[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize("name", NORMS_AND_MORE)
def test_every_place_is_found(name: str) -> None:
    found = smoothed(made_heavy(tiny.decoder(name)))
    block = "transformer.h.1." if name == "gpt2" else "model.layers.1."
    assert {s.merge.source.removeprefix(block) for s in found if s.merge.source.startswith(block)} == (
        NORMS_AND_MORE[name]
    )


def test_what_feeds_a_residual_as_well_is_no_source() -> None:
    """BERT's norms stand behind the residual: a scale on one would reach what nothing divides again."""
    found = smoothed(made_heavy(tiny.encoder()), sentence_forward)
    assert not any("LayerNorm" in s.merge.source for s in found)
    assert {s.merge.source.rpartition(".")[2] for s in found} == {"value"}


def heavy_inputs(tokens: int = 256, k: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, k, generator=generator)
    x[:, [3, 17]] *= 60.0
    return x, torch.randn(32, k, generator=generator)


@pytest.mark.parametrize(("fmt", "gain"), [("int8", 0.25), ("int4-g32", 0.98)])
def test_heavy_channels_are_scaled_down_and_less_is_lost(fmt: str, gain: float) -> None:
    x, w = heavy_inputs()
    found = WEIGHT_FORMATS[fmt]
    exponents = fit_exponents(x, w, found, 64)
    scale, rounds = torch.exp2(exponents), ACTIVATION_FORMATS["int8-token"]
    truth = x @ w.T

    def error(s: Tensor) -> float:
        rounded = SOLVERS["rtn"].solve(w * s, found, None).dequantize()
        return float((rounds.fake_quantize(x / s) @ rounded.T - truth).square().mean())

    assert error(scale) < gain * error(torch.ones(64))
    assert int(exponents[[3, 17]].min()) >= int(exponents.median())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 100))
def test_inputs_without_heavy_channels_are_nearly_left_alone(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(128, 32, generator=generator), torch.randn(32, 32, generator=generator)
    assert int(fit_exponents(x, w, WEIGHT_FORMATS["int8"], 32).abs().max()) <= 1


def test_only_schemes_whose_inputs_are_rounded_by_token_are_smoothed() -> None:
    found = smoothed(made_heavy(tiny.decoder()))
    group = found[0].group
    assert keys_of(found, group, scheme_named("w8a8-int8")) == ("int8~", "int8-token~int8")
    assert keys_of(found, group, scheme_named("w8a16")) == ("int8", None)
    assert keys_of(found, group, scheme_named("w8a8-int8-static")) == ("int8", "int8-static")
    assert not smoothed(made_heavy(tiny.decoder()), name="w4a16")


def test_codes_of_scaled_columns_stand_for_the_unscaled_weight() -> None:
    w, exponents = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 5 - 2
    rounded = SOLVERS["rtn"].solve(w * torch.exp2(exponents), WEIGHT_FORMATS["int8"], None)
    back = QuantizedWeight(
        format="int8", codes=rounded.codes, scale=rounded.scale, exponents=exponents.to(torch.int8)
    ).dequantize()
    assert torch.equal(back * torch.exp2(exponents), rounded.dequantize())
    assert float((back - w).abs().max()) < 0.2


def test_scales_that_a_format_cannot_hold_are_refused_and_undone() -> None:
    model = tiny.decoder().to(torch.float16)
    before = copy.deepcopy(model.state_dict())
    good = Merge(source="model.layers.0.mlp.up_proj", consumers=("model.layers.0.mlp.down_proj",), channels=128)
    far = torch.full((128,), 30)
    with pytest.raises(ModelError, match=r"exactly in torch\.float16"), merged(model, [(good, far // 30), (good, far)]):
        pass
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_a_consumer_that_cannot_be_scaled_leaves_the_source_alone() -> None:
    model = tiny.decoder().to(torch.float16)
    merge = Merge(source="model.layers.0.mlp.up_proj", consumers=("model.layers.0.mlp.down_proj",), channels=128)
    with torch.no_grad():
        model.get_submodule(merge.source).weight.fill_(1.0)
        model.get_submodule(merge.consumers[0]).weight.fill_(6e4)
    with pytest.raises(ModelError, match="down_proj"):
        merge.apply(model, torch.full((128,), 3))
    assert bool((model.get_submodule(merge.source).weight == 1.0).all())


# In a run


def heavy(place: Path) -> Path:
    """A folder with a heavy model."""
    made_heavy(tiny.decoder()).save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


def optimised(place: Path, model: object, **changed: object) -> lowprec.Report:
    given: dict[str, object] = {
        "out": place / "out", "budget": "90%", "data": [str(tiny.text(place / "t.jsonl"))], "effort": tiny.EFFORT,
        "schemes": ["w8a8-int8"], "objective": "bytes", "embeddings": False,
    }  # fmt: skip
    return lowprec.optimize(model, **given | changed)  # type: ignore[arg-type]


def test_a_run_gives_the_weights_back_and_its_artefact_has_the_merged_ones(tmp_path: Path) -> None:
    model = load(str(heavy(tmp_path / "m")))
    before = copy.deepcopy(model.module.state_dict())
    effort = dataclasses.replace(tiny.EFFORT, compensated=True, healing_passes=1)
    report = optimised(tmp_path, model, effort=effort)
    assert "transform" in dict(report.seconds)
    assert {g.scheme for g in report.groups if g.block is not None} == {"w8a8-int8"}
    assert report.parity.codes_equal
    assert report.parity.kl_nats == 0.0, "what was scored unmerged is what was loaded merged"
    assert all(torch.equal(p, before[n]) for n, p in model.module.state_dict().items())
    loaded, _ = lowprec.load_artefact(tmp_path / "out" / "model")
    norms = {n: p for n, p in loaded.state_dict().items() if n.endswith("layernorm.weight")}
    assert any(not torch.equal(p.to(torch.bfloat16), before[n]) for n, p in norms.items())


def test_groups_with_scales_are_predicted_and_measured_to_lose_less(tmp_path: Path) -> None:
    heavy(tmp_path / "m")
    lost = []
    for smooth_ in (True, False):
        report = optimised(tmp_path, str(tmp_path / "m"), out=tmp_path / str(smooth_), smooth=smooth_)
        pairs = [pair for pair in report.sensitivity.pairs if pair.group != "lm_head"]
        lost.append((sum(p.predicted_kl_nats for p in pairs), sum(p.measured_kl_nats for p in pairs)))
    assert lost[0][0] < 0.8 * lost[1][0]
    assert lost[0][1] < 0.8 * lost[1][1]


def test_a_run_without_it_changes_nothing(tmp_path: Path) -> None:
    model = load(str(heavy(tmp_path / "m")))
    report = optimised(tmp_path, model, smooth=False)
    assert "transform" not in dict(report.seconds)
    loaded, _ = lowprec.load_artefact(tmp_path / "out" / "model")
    norms = {n: p for n, p in loaded.state_dict().items() if n.endswith("layernorm.weight")}
    assert all(torch.equal(p.to(torch.bfloat16), model.module.state_dict()[n]) for n, p in norms.items())


def test_a_whole_artefact_of_our_own_form_goes_into_an_unscaled_model(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    made_heavy(tiny.decoder("gpt2")).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    assert optimised(tmp_path, str(folder)).artefact_form == "lowprec"
    loaded, _ = lowprec.load_artefact(tmp_path / "out" / "model")
    placed = lowprec.apply_artefact(load(str(folder)).module, tmp_path / "out" / "model", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(placed(tiny.batch()).logits, loaded(tiny.batch()).logits, rtol=1e-4, atol=1e-4)


def test_a_module_whose_artefact_is_layers_alone_is_not_scaled(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.decoder().model

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids).last_hidden_state.float()

    model = wrap(Wrapper(), lambda module, b: module(b.ids), tokenizer=tiny.tokenizer())
    report = optimised(tmp_path, model, budget="0.9 abs", effort=dataclasses.replace(tiny.EFFORT, checked_pairs=2))
    assert "transform" not in dict(report.seconds)
    assert report.artefact_form == "lowprec-layers"
