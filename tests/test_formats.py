"""Contracts of every weight format, activation format and scheme that is registered."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats import (
    ACTIVATION_FORMATS,
    SCHEMES,
    WEIGHT_FORMATS,
    ActivationFormat,
    QuantizedWeight,
    WeightFormat,
    resolve,
    scheme_named,
    schemes_of_family,
)
from lowprec.formats.base import as_bfloat16
from lowprec.formats.rows import MixedRows

WEIGHTS = list(WEIGHT_FORMATS)
ACTIVATIONS = list(ACTIVATION_FORMATS)
K = 256
FAMILIES = ("bf16", "fp8", "int8", "int4", "int4-asym", "int4-two-level", "int3", "int6")


def slabs(fmt: WeightFormat, seed: int = 0, rows: int = 6) -> Tensor:
    """[rows, groups, g] heavy-tailed weights of unlike magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, K, generator=generator) * torch.randn(rows, K, generator=generator).abs()
    w *= torch.logspace(-6, 3, rows)[:, None]
    return w.view(rows, -1, fmt.group_size or K)


def nearest(fmt: WeightFormat, x: Tensor, scale: Tensor) -> Tensor:
    """Codes of slabs, in the windows that fit them where the format has windows."""
    return fmt.round(x, scale, fmt.fit_lowest(x, scale))


def encode(fmt: WeightFormat, x: Tensor, scale: Tensor) -> QuantizedWeight:
    """Codes of [rows, groups, g] slabs as a weight."""
    codes = nearest(fmt, x, scale).reshape(len(x), -1)
    return QuantizedWeight(format=fmt.name, codes=codes.to(fmt.code_dtype), scale=scale[..., 0])


def lowest_of(fmt: WeightFormat) -> Tensor | None:
    """Where some window begins, for formats that have windows."""
    return None if fmt.symmetric else torch.tensor([-6.0])


def grid(fmt: WeightFormat) -> Tensor:
    """All codes that the format has (those of the window of `lowest_of`), rising."""
    if not fmt.symmetric:
        return torch.arange(-6, -6 + 2**fmt.bits, dtype=torch.float32)
    if fmt.code_dtype == torch.float8_e4m3fn:
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
        return every[every.isfinite()].sort().values
    half = 2 ** (fmt.bits - 1)
    # -128 is left out so that both signs clip alike.
    return torch.arange(-half if fmt.bits < 8 else 1 - half, half, dtype=torch.float32)


@pytest.mark.parametrize("name", WEIGHTS)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4), st.floats(-30, 10))
def test_rounds_to_the_nearest_code(name: str, values: list[float], exponent: float) -> None:
    fmt, scale = WEIGHT_FORMATS[name], as_bfloat16(torch.tensor([2.0**exponent]))
    w = torch.tensor(values, dtype=torch.float32)
    codes = fmt.round(w, scale, lowest_of(fmt))
    assert bool(torch.isin(codes, grid(fmt)).all())
    distance = (w / scale - codes).abs()
    least = (w[:, None] / scale - grid(fmt)).abs().amin(-1)
    assert torch.equal(distance, least)
    assert torch.equal(fmt.round(codes * scale, scale, lowest_of(fmt)), codes), "rounding is idempotent"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_round_trip(name: str, weighted: bool) -> None:
    fmt = WEIGHT_FORMATS[name]
    x = slabs(fmt)
    importance = torch.linspace(0.1, 10, K).view(-1, x.shape[-1]) if weighted else None
    scale = fmt.fit_scale(x, importance)
    assert scale.shape == (*x.shape[:-1], 1)
    assert scale.dtype == torch.float32
    assert torch.equal(as_bfloat16(scale), scale)
    quantized = encode(fmt, x, scale)
    assert quantized.codes.dtype == fmt.code_dtype
    codes, lowest = nearest(fmt, x, scale), fmt.fit_lowest(x, scale)
    assert torch.equal(quantized.codes.to(torch.float32), codes.reshape(len(x), -1)), "codes are exact"
    back = quantized.dequantize()
    assert back.dtype == torch.float32
    again = fmt.round(back.view_as(x), scale, lowest)
    assert torch.equal(again, codes), "what is stored rounds to itself"
    # Inside the grid half a step is the largest error; a step is 1/8 of the value at most in E4M3.
    low = grid(fmt)[0] if lowest is None else lowest
    inside = (x > low * scale) & (x < (low + grid(fmt)[-1] - grid(fmt)[0]) * scale)
    step = torch.maximum(x.abs() / 8, scale * 2.0**-9) if fmt.code_dtype == torch.float8_e4m3fn else scale
    assert bool(((back.view_as(x) - x).abs() <= 0.501 * step)[inside].all())


@pytest.mark.parametrize("name", WEIGHTS)
def test_scale_is_no_worse_than_the_absolute_maximum(name: str) -> None:
    fmt = WEIGHT_FORMATS[name]
    x = slabs(fmt)
    importance = torch.rand(K, generator=torch.Generator().manual_seed(1)).view(-1, x.shape[-1])
    plain = as_bfloat16(x.abs().amax(-1, keepdim=True) / float(grid(fmt)[-1]))

    def error(scale: Tensor) -> Tensor:
        return ((encode(fmt, x, scale).dequantize().view_as(x) - x).square() * importance).sum(-1)

    assert bool((error(fmt.fit_scale(x, importance)).sum(-1) <= error(plain).sum(-1) * 1.0001).all())


@pytest.mark.parametrize("shift", [0.0, 1.0, -2.0])
def test_zero_points_pay_where_weights_lie_on_one_side(shift: float) -> None:
    x = torch.randn(8, K // 32, 32, generator=torch.Generator().manual_seed(0)) + shift

    def error(name: str) -> float:
        fmt = WEIGHT_FORMATS[name]
        return float((encode(fmt, x, fmt.fit_scale(x)).dequantize().view_as(x) - x).square().sum())

    assert error("int4-g32-asym") < (0.95 if shift == 0 else 0.6) * error("int4-g32")


@pytest.mark.parametrize("name", WEIGHTS)
def test_scale_follows_the_weights(name: str) -> None:
    fmt = WEIGHT_FORMATS[name]
    x = slabs(fmt)
    assert torch.equal(fmt.fit_scale(x * 4), fmt.fit_scale(x) * 4)
    assert torch.equal(fmt.fit_scale(x)[2:3], fmt.fit_scale(x[2:3])), "slabs are independent"


@pytest.mark.parametrize("importance", [None, torch.zeros(1), torch.ones(1)])
@pytest.mark.parametrize("name", WEIGHTS)
def test_zeros(name: str, importance: Tensor | None) -> None:
    fmt = WEIGHT_FORMATS[name]
    x = torch.zeros(2, K // (fmt.group_size or K), fmt.group_size or K)
    scale = fmt.fit_scale(x, importance)
    assert bool((scale > 0).all())
    assert torch.equal(as_bfloat16(scale), scale)
    assert not encode(fmt, x, scale).dequantize().any()


@pytest.mark.parametrize("name", WEIGHTS)
def test_saturates(name: str) -> None:
    fmt = WEIGHT_FORMATS[name]
    beyond = torch.tensor([-1e6, 1e6, -torch.inf, torch.inf])
    low, high = float(grid(fmt)[0]), float(grid(fmt)[-1])
    assert fmt.round(beyond, torch.ones(1), lowest_of(fmt)).tolist() == [low, high, low, high]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", WEIGHTS)
def test_values_that_are_not_finite_show(name: str, bad: float) -> None:
    fmt = WEIGHT_FORMATS[name]
    x = slabs(fmt)
    expected = fmt.fit_scale(x)
    x[1, 0, 3] = bad
    scale = fmt.fit_scale(x)
    assert not bool(scale[1, 0].isfinite())
    hit = torch.zeros_like(scale, dtype=torch.bool)
    hit[1, 0] = True
    assert torch.equal(scale[~hit], expected[~hit]), "no other slab is touched"
    assert bool((nearest(fmt, x, scale) * scale)[1, 0, 3].isnan())


@pytest.mark.parametrize("name", WEIGHTS)
def test_bytes_and_fit(name: str) -> None:
    fmt = WEIGHT_FORMATS[name]
    assert WEIGHT_FORMATS[name].name == name
    assert isinstance(fmt, WeightFormat)
    assert 0 < fmt.tolerance < 0.1
    assert fmt.fits(K) is None
    groups = K // fmt.group_size if fmt.group_size else 1
    share = fmt.share if isinstance(fmt, MixedRows) else 0.0
    mark = 1 / 8 if isinstance(fmt, MixedRows) else 0.0
    coarse, fine = K * fmt.bits / 8 + (2 if fmt.symmetric else 2 + fmt.bits / 8) * groups, K + 2
    assert fmt.bytes_per_row(K) == pytest.approx(share * fine + (1 - share) * coarse + mark)
    if fmt.group_size:
        reason = fmt.fits(fmt.group_size + 1)
        assert reason is not None
        assert str(fmt.group_size) in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, dtype: torch.dtype) -> None:
    fmt = ACTIVATION_FORMATS[name]
    assert isinstance(fmt, ActivationFormat)
    assert fmt.name == name
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 5, 64, generator=generator) * torch.logspace(-2, 2, 5)[:, None]).to(dtype)
    largest = 448.0 if name.startswith("fp8") else 127.0
    scale = None if fmt.dynamic else x.abs().amax().to(torch.float32) / largest
    y = fmt.fake_quantize(x, scale)
    assert y.shape == x.shape
    assert y.dtype == dtype
    s = x.abs().amax(-1, keepdim=True).to(torch.float32) / largest if scale is None else scale
    # Half a step, plus the rounding of the result to its own dtype.
    step = s if largest == 127 else torch.maximum(x.abs().to(torch.float32) / 8, s * 2.0**-9)
    slack = torch.finfo(dtype).eps * x.abs().to(torch.float32) + torch.finfo(dtype).smallest_normal
    assert bool(((y.to(torch.float32) - x.to(torch.float32)).abs() <= 0.501 * step + slack).all())
    if dtype == torch.float32:
        assert torch.allclose(fmt.fake_quantize(y, scale), y, rtol=1e-5, atol=0), "rounding is idempotent"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_extremes(name: str) -> None:
    fmt = ACTIVATION_FORMATS[name]
    scale = None if fmt.dynamic else torch.tensor(0.5)
    assert not fmt.fake_quantize(torch.zeros(3, 8), scale).any()
    x = torch.ones(3, 8)
    x[1, 2] = torch.nan
    y = fmt.fake_quantize(x, scale)
    assert bool(y[1, 2].isnan())
    assert torch.equal(y[[0, 2]], fmt.fake_quantize(x[[0, 2]], scale)), "no other token is touched"
    if not fmt.dynamic:
        beyond = fmt.fake_quantize(torch.tensor([[-1e6, 1e6]]), scale)
        assert beyond[0, 0] == -beyond[0, 1]
        assert float(beyond[0, 1]) == 0.5 * (448 if name.startswith("fp8") else 127)
        with pytest.raises(ConfigError, match="calibrate"):
            fmt.fake_quantize(x)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if ACTIVATION_FORMATS[name].dynamic])
def test_dynamic_scale_is_per_token(name: str) -> None:
    fmt = ACTIVATION_FORMATS[name]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    loud = x.clone()
    loud[0] *= 1e3
    assert torch.equal(fmt.fake_quantize(loud)[1:], fmt.fake_quantize(x)[1:])


@pytest.mark.parametrize("name", list(SCHEMES))
def test_scheme_names_registered_formats(name: str) -> None:
    scheme = scheme_named(name)
    assert scheme.name == name
    assert scheme.activation is None or scheme.activation in ACTIVATION_FORMATS
    assert scheme.weight is None or scheme.weight in WEIGHT_FORMATS or "-g" not in name
    settled = resolve(scheme, 1024)
    assert settled.weight is None or settled.weight in WEIGHT_FORMATS
    assert settled.activation == scheme.activation
    assert settled.family == scheme.family
    assert resolve(settled, 1024) == settled


@pytest.mark.parametrize(("k", "size"), [(1024, 128), (576, 64), (96, 32)])
def test_group_size_is_the_largest_that_divides(k: int, size: int) -> None:
    for prefix in ("w4a16", "w4a8-int8", "w4a8-fp8", "w4a8-block", "w3a16"):
        assert resolve(scheme_named(prefix), k) == scheme_named(f"{prefix}-g{size}")
    assert resolve(scheme_named("w4a16-asym"), k) == scheme_named(f"w4a16-g{size}-asym")


def test_schemes_that_do_not_fit() -> None:
    with pytest.raises(UnsupportedError, match="divides 100"):
        resolve(scheme_named("w4a16"), 100)
    with pytest.raises(UnsupportedError, match="multiple of 128"):
        resolve(scheme_named("w4a16-g128"), 576)
    assert resolve(scheme_named("w8a16"), 100) == scheme_named("w8a16")


def test_families() -> None:
    names = {family: [s.name for s in schemes_of_family(family)] for family in FAMILIES}
    assert names["bf16"] == ["bf16"]
    assert names["fp8"] == ["w8a8-fp8"]
    assert sorted(names["int8"]) == ["w8a16", "w8a8-block", "w8a8-block64", "w8a8-int8"]
    rows = [f"w4a16-rows{percent}" for percent in (12, 25, 50, 6)]
    assert sorted(names["int4"]) == ["w4a16", *rows, "w4a8-block", "w4a8-block64", "w4a8-fp8", "w4a8-int8"]
    assert sorted(names["int4-asym"]) == ["w4a16-asym", "w4a8-block-asym"]
    assert names["int3"] == ["w3a16"]
    assert names["int6"] == ["w6a16"]
    assert names["int4-two-level"] == ["w4a8-two-level"]
    assert {s.family for s in SCHEMES.values()} == set(names)


@pytest.mark.parametrize(("asked", "meant"), [("w8a8_int8", "w8a8-int8"), ("w4a16g128", "w4a16-g128")])
def test_did_you_mean(asked: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        scheme_named(asked)
    with pytest.raises(
        ConfigError, match=r"did you mean 'int8'.*known: bf16, fp8, int3, int4, int4-asym, int4-two-level, int6, int8"
    ):
        schemes_of_family("int9")


def test_formats_are_immutable() -> None:
    for name in WEIGHTS:
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
            WEIGHT_FORMATS[name].bits = 3  # type: ignore[misc]
