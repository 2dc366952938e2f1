"""Merged scales: the model's function stays to the last bit, and what is rounded after them loses less."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowprec
import tiny
from lowprec.errors import ModelError
from lowprec.formats import ACTIVATION_FORMATS
from lowprec.steps.load import decoder_forward, load, sentence_forward, wrap
from lowprec.steps.stream import Stream
from lowprec.steps.tokens import Batch
from lowprec.steps.transform import Smoothed, smooth
from lowprec.transforms import Merge, fit_exponents, merged

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


def smoothed(module: nn.Module, forward: lowprec.steps.stream.Forward = decoder_forward) -> tuple[Smoothed, ...]:
    return smooth(Stream(module, forward, batch(0, 8)), [batch(1), batch(2)], batch(0, 8))


def random(found: tuple[Smoothed, ...], seed: int) -> list[tuple[Merge, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(s.merge, torch.randint(-3, 4, (s.merge.channels,), generator=generator)) for s in found]


@pytest.mark.parametrize("name", tiny.DECODERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_function_stays_and_so_do_the_weights_afterwards(name: str, dtype: torch.dtype) -> None:
    model = tiny.decoder(name)
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
    found = smoothed(tiny.decoder(name))
    block = "transformer.h.1." if name == "gpt2" else "model.layers.1."
    assert {s.merge.source.removeprefix(block) for s in found if s.merge.source.startswith(block)} == (
        NORMS_AND_MORE[name]
    )


def test_what_feeds_a_residual_as_well_is_no_source() -> None:
    """BERT's norms stand behind the residual: a scale on one would reach what nothing divides again."""
    model = tiny.encoder()
    found = smoothed(model, sentence_forward)
    assert not any("LayerNorm" in s.merge.source for s in found)
    assert {s.merge.source.rpartition(".")[2] for s in found} == {"value"}


def test_heavy_channels_are_scaled_down_and_rounded_tokens_lose_less() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    x[:, [3, 17]] *= 60.0
    w = torch.randn(32, 64, generator=generator)
    exponents = fit_exponents(x, w, 64)
    assert int(exponents[[3, 17]].min()) >= int(exponents.median()) + 2
    scale, fmt = torch.exp2(exponents), ACTIVATION_FORMATS["int8-token"]
    truth = x @ w.T

    def error(s: Tensor) -> float:
        return float((fmt.fake_quantize(x / s) @ (w * s).T - truth).square().mean())

    assert error(scale) < 0.25 * error(torch.ones(64))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 100))
def test_inputs_without_heavy_channels_are_nearly_left_alone(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    exponents = fit_exponents(torch.randn(128, 32, generator=generator), torch.randn(32, 32, generator=generator), 32)
    assert int(exponents.abs().max()) <= 1


def test_scales_that_a_format_cannot_hold_are_refused_and_undone() -> None:
    model = tiny.decoder().to(torch.float16)
    before = copy.deepcopy(model.state_dict())
    good = Merge(source="model.layers.0.mlp.up_proj", consumers=("model.layers.0.mlp.down_proj",), channels=128)
    far = torch.full((128,), 30)
    with pytest.raises(ModelError, match=r"exactly in torch\.float16"), merged(model, [(good, far // 30), (good, far)]):
        pass
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


# In a run


def heavy(place: Path) -> Path:
    """A folder with a model two of whose channels are heavy behind every norm."""
    model = tiny.decoder()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[[3, 17]] *= 50.0
    model.save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


def optimised(place: Path, model: object, **changed: object) -> lowprec.Report:
    given: dict[str, object] = {
        "out": place / "out", "budget": "90%", "data": [str(tiny.text(place / "t.jsonl"))], "effort": tiny.EFFORT,
        "schemes": ["int8"],
    }  # fmt: skip
    return lowprec.optimize(model, **given | changed)  # type: ignore[arg-type]


def test_a_run_gives_the_weights_back_and_its_artefact_has_the_merged_ones(tmp_path: Path) -> None:
    model = load(str(heavy(tmp_path / "m")))
    before = copy.deepcopy(model.module.state_dict())
    report = optimised(tmp_path, model)
    assert "transform" in dict(report.seconds)
    assert report.parity.holds
    assert all(torch.equal(p, before[n]) for n, p in model.module.state_dict().items())
    loaded, _ = lowprec.load_artefact(tmp_path / "out" / "model")
    assert any(
        not torch.equal(p.to(torch.bfloat16), before[n])
        for n, p in loaded.state_dict().items()
        if n.endswith("layernorm.weight")
    )


def test_a_run_without_it_changes_nothing(tmp_path: Path) -> None:
    model = load(str(heavy(tmp_path / "m")))
    report = optimised(tmp_path, model, smooth=False)
    assert "transform" not in dict(report.seconds)
    loaded, _ = lowprec.load_artefact(tmp_path / "out" / "model")
    norms = {n: p for n, p in loaded.state_dict().items() if n.endswith("layernorm.weight")}
    assert all(torch.equal(p.to(torch.bfloat16), model.module.state_dict()[n]) for n, p in norms.items())


def test_a_whole_artefact_of_our_own_form_goes_into_an_unscaled_model(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "m", "gpt2")
    optimised(tmp_path, str(folder), objective="bytes")
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
