"""QuantLinear against float64, kernel choice, and conversion of models."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from lowprec.errors import ConfigError, ModelError, UnsupportedError
from lowprec.formats import (
    ACTIVATION_FORMATS,
    SCHEMES,
    WEIGHT_FORMATS,
    QuantizedWeight,
    per_block,
    resolve,
    scheme_named,
)
from lowprec.records import CostSample, Scheme
from lowprec.runtime import KernelTable, QuantLinear, convert_
from lowprec.runtime.dispatch import automatic, bucket_of, choose, fewest_rows, kernel_named, kinds, usable
from lowprec_kernels.kernel import kernels_for

QUANTISED = [s for s in SCHEMES.values() if s.weight is not None and not per_block(s)]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantize(w: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round to nearest, by the format's own functions."""
    weight = resolve(scheme, w.shape[1]).weight
    assert weight is not None
    fmt = WEIGHT_FORMATS[weight]
    slabs = w.reshape(w.shape[0], -1, fmt.group_size or w.shape[1])
    scale = fmt.store_scales(fmt.fit_scale(slabs).squeeze(-1)).unsqueeze(-1)
    codes = fmt.round(slabs, scale, fmt.fit_lowest(slabs, scale)).reshape(w.shape).to(fmt.code_dtype)
    return QuantizedWeight(format=weight, codes=codes, scale=scale.squeeze(-1))


def static_scale(scheme: Scheme) -> Tensor | None:
    return torch.tensor(0.03) if scheme.name.endswith("-static") else None


def _layer(scheme: Scheme, kernels: KernelTable | str = "reference", n: int = 48, k: int = 128) -> QuantLinear:
    return QuantLinear.from_quantized(
        quantize(_random(n, k), scheme),
        scheme,
        _random(n, seed=2),
        kernels=kernels,
        activation_scale=static_scale(scheme),
    )


def _sample(
    scheme: str, m: int, kernel: str, us: float, n: int = 48, k: int = 128, origin: str = "measured"
) -> CostSample:
    return CostSample(
        op="linear", m=m, n=n, k=k, scheme=scheme, kernel=kernel,
        p20_us=us, p50_us=us, p80_us=us, bytes=1, origin=origin,
    )  # fmt: skip


@pytest.mark.parametrize("scheme", QUANTISED, ids=lambda s: s.name)
def test_every_form_of_every_scheme_meets_its_tolerance(scheme: Scheme) -> None:
    resolved = resolve(scheme, 128)
    for name in usable(resolved, 48, 128)[0]:
        layer = _layer(scheme, name)
        for lead in ((1,), (3,), (2, 5), (), (0,)):
            for dtype in (torch.float32, torch.bfloat16):
                x = _random(*lead, 128, seed=3).to(dtype)
                y = layer(x)
                assert (y.shape, y.dtype) == ((*lead, 48), dtype)
                assert layer.relative_error(x) <= layer.tolerance


@pytest.mark.parametrize("scheme", QUANTISED, ids=lambda s: s.name)
def test_reference_is_what_the_formats_say(scheme: Scheme) -> None:
    """What is scored (fake quantisation by the formats) is what runs."""
    layer = _layer(scheme)
    x = _random(7, 128, seed=4)
    seen = x
    if scheme.activation is not None:
        seen = ACTIVATION_FORMATS[scheme.activation].fake_quantize(x, static_scale(scheme))
    weight = quantize(_random(48, 128), scheme).dequantize()
    truth = seen.double() @ weight.double().t() + _random(48, seed=2).double()
    assert float((layer.reference(x) - truth).norm() / truth.norm()) < 1e-6
    assert torch.equal(layer.unpacked_codes(), quantize(_random(48, 128), scheme).codes) or scheme.family == "fp8"


def test_codes_survive_dtype_changes_copies_and_state_dicts() -> None:
    for name in ("w8a8-int8", "w8a8-fp8", "w4a16", "w8a8-int8-static"):
        layer = _layer(scheme_named(name), "dequantize-fp32")
        x = _random(3, 128)
        before, codes, scale = layer(x), layer.codes.clone(), layer.scale
        assert scale is not None
        layer.to(torch.bfloat16)
        assert layer.codes.dtype == codes.dtype
        assert layer.scale is not None
        assert layer.scale.dtype == torch.float32
        assert torch.equal(layer.codes.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(copy.deepcopy(layer)(x), before)
        other = QuantLinear.from_quantized(
            quantize(_random(48, 128, seed=8), scheme_named(name)), scheme_named(name), torch.zeros(48),
            kernels="dequantize-fp32", activation_scale=static_scale(scheme_named(name)),
        )  # fmt: skip
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), before)


def test_a_layer_refuses_what_does_not_fit() -> None:
    int8 = quantize(_random(48, 128), scheme_named("w8a16"))
    with pytest.raises(ConfigError, match="wants weights in fp8"):
        QuantLinear.from_quantized(int8, scheme_named("w8a8-fp8"), kernels="reference")
    with pytest.raises(ConfigError, match="calibrated activation scale"):
        QuantLinear.from_quantized(int8, scheme_named("w8a8-int8-static"), kernels="reference")
    with pytest.raises(ConfigError, match="scales activations itself"):
        QuantLinear.from_quantized(
            int8, scheme_named("w8a8-int8"), kernels="reference", activation_scale=torch.tensor(1.0)
        )
    with pytest.raises(ValueError, match="127 features"):
        _layer(scheme_named("w8a16"))(_random(2, 127))


def test_an_explicit_kernel_never_falls_back() -> None:
    with pytest.raises(ConfigError, match="did you mean 'int8pack'"):
        _layer(scheme_named("w8a16"), "int8packs")
    with pytest.raises(UnsupportedError, match="multiple of 16") as caught:
        _layer(scheme_named("w4a16"), "int4pack", n=17)
    assert len(caught.value.reasons) == 1
    layer = _layer(scheme_named("w4a16"), "int4pack")
    assert {k.name for k in layer.kernels} == {"int4pack"}
    assert kernel_named("int8pack", scheme_named("w8a16"), 48, 128).name == "int8pack"


def test_buckets() -> None:
    assert [bucket_of(m) for m in (0, 1, 2, 16, 17, 128, 129, 5000)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [fewest_rows(m) for m in (1, 2, 16, 100, 129, 5000)] == [1, 2, 2, 17, 129, 129]


def test_table_takes_the_fastest_measured_kernel_of_the_nearest_shape() -> None:
    scheme = scheme_named("w8a16")
    rows = [_sample("w8a16", m, "int8pack", 1.0) for m in (1, 8, 64)]
    rows += [_sample("w8a16", 256, "dequantize-fp32", 2.0), _sample("w8a16", 512, "int8pack", 9.0)]
    rows += [_sample("w8a16", m, "dequantize-bf16", 0.1, n=4800) for m in (1, 8, 64, 256)]
    rows += [_sample("w8a16", 1, "dequantize-bf16", 0.001, origin="modelled")]
    table = KernelTable(rows)
    assert [k.name for k in table.select(scheme, 48, 128)] == ["int8pack"] * 3 + ["dequantize-fp32"]
    assert [k.name for k in table.select(scheme, 96, 128)] == ["int8pack"] * 3 + ["dequantize-fp32"]
    assert {k.name for k in table.select(scheme, 9600, 128)} == {"dequantize-bf16"}
    layer = _layer(scheme, table)
    assert layer.kernel_for(1).name == "int8pack"
    assert layer.kernel_for(300).name == "dequantize-fp32"


def test_table_passes_over_a_kernel_that_cannot_run_the_shape() -> None:
    table = KernelTable([_sample("w4a16-g128", m, "int4pack", 1.0) for m in (1, 8, 64, 256)])
    chosen = table.select(scheme_named("w4a16"), 17, 128)
    assert all(k.name in ("dequantize-fp32", "dequantize-bf16") for k in chosen)


def test_table_measures_what_nobody_measured_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lowprec.runtime.dispatch"):
        chosen = KernelTable().select(scheme_named("w8a16"), 32, 64)
    assert len(chosen) == 4
    assert all(k.name != "reference" for k in chosen)
    assert len(caplog.records) == 4


def test_the_reference_is_never_chosen_automatically() -> None:
    for scheme in SCHEMES.values():
        if not per_block(scheme):
            assert all(k.name != "reference" for k in automatic(resolve(scheme, 128), 48, 128))
    with pytest.raises(UnsupportedError, match="no kernel runs scheme w8a8-fp8"):
        automatic(scheme_named("w8a8-fp8"), 48, 128, device="meta")
    assert kinds(scheme_named("w4a8-int8-g64")) == ("int4", "int8")
    assert len(choose("reference", scheme_named("bf16"), 48, 128)) == 4
    assert set(kernels_for("int8", "int8", "meta")) == {"reference"}


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if per_block(s)], ids=lambda s: s.name)
def test_inputs_in_blocks_are_left_to_the_runtimes_that_round_them(scheme: Scheme) -> None:
    with pytest.raises(UnsupportedError, match=f"no kernel on cpu computes {resolve(scheme, 128).name}"):
        automatic(resolve(scheme, 128), 48, 128)


class Tied(nn.Module):
    """Two linears and an lm_head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.block = nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64, bias=False)})
        self.lm_head = nn.Linear(64, 40, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        logits: Tensor = self.lm_head(h + self.block["down"](torch.relu(self.block["up"](h))))
        return logits


def _solve(model: nn.Module, schemes: dict[str, Scheme]) -> dict[str, QuantizedWeight]:
    return {
        name: quantize(model.get_submodule(name).weight.detach().float(), scheme)
        for name, scheme in schemes.items()
        if scheme.weight is not None
    }


def test_convert_replaces_layers_and_leaves_the_tied_embedding() -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = model(ids)
    embedding = model.embed.weight.detach().clone()
    schemes = {
        "block.up": scheme_named("w8a8-int8"),
        "block.down": scheme_named("w4a16"),
        "lm_head": scheme_named("w8a16"),
    }
    kernels = "dequantize-fp32"
    assert convert_(model, _solve(model, schemes), schemes, kernels=kernels) is model
    assert all(isinstance(model.get_submodule(name), QuantLinear) for name in schemes)
    assert torch.equal(model.embed.weight, embedding)
    assert not model.lm_head.training
    with torch.no_grad():
        after = model(ids)
    assert 0 < float((after - before).norm() / before.norm()) < 0.1


def test_convert_runs_dense_layers_by_the_measured_form() -> None:
    model = Tied().to(torch.bfloat16)
    table = KernelTable(_sample("bf16", m, "linear-fp32-copy", 1.0) for m in (1, 8, 64, 256))
    convert_(model, {}, {"block.up": scheme_named("bf16")}, kernels=table)
    layer = model.block["up"]
    assert isinstance(layer, QuantLinear)
    assert layer.kernel_for(1).name == "linear-fp32-copy"
    x = _random(3, 64).to(torch.bfloat16)
    assert layer.relative_error(x) <= layer.tolerance
    plain = Tied()
    convert_(plain, {}, {"block.up": scheme_named("bf16")}, kernels=table)
    assert type(plain.block["up"]) is nn.Linear


def test_convert_takes_the_transposed_layers_of_gpt2() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(48, 64))
    x = _random(5, 64)
    with torch.no_grad():
        before = model(x)
        scheme = scheme_named("w8a16")
        solved = {"0": quantize(model[0].weight.detach().t().contiguous(), scheme)}
        convert_(model, solved, {"0": scheme}, kernels="dequantize-fp32")
        assert float((model(x) - before).norm() / before.norm()) < 0.02


def test_convert_fails_before_it_changes_anything() -> None:
    model = Tied()
    schemes = {"block.up": scheme_named("w8a16"), "block.down": scheme_named("w8a16")}
    solved = _solve(model, schemes)
    with pytest.raises(ConfigError, match=r"did you mean 'block\.up'"):
        convert_(model, solved, {"block.upp": scheme_named("w8a16")}, kernels="reference")
    with pytest.raises(ConfigError, match="no solved weight"):
        convert_(model, {}, schemes, kernels="reference")
    wrong = {**solved, "block.down": solved["block.up"]}
    with pytest.raises(ModelError, match=r"block\.down: codes are \(96, 64\)"):
        convert_(model, wrong, schemes, kernels="reference")
    assert type(model.block["up"]) is nn.Linear
