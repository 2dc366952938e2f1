"""Targets by one contract, the roofline's arithmetic, the end-to-end clock, and money."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lowprec import economics
from lowprec.errors import ConfigError, ModelError, UnsupportedError
from lowprec.formats import SCHEMES, resolve, scheme_named
from lowprec.formats.schemes import TWO_LEVEL
from lowprec.records import Workload
from lowprec.runtime import measure
from lowprec.runtime.dispatch import automatic
from lowprec.targets import DEVICES, TARGETS, Target, device_target, target_for, weight_bytes
from lowprec.targets.torch import TorchTarget, measure_end_to_end


def _targets() -> list[Target]:
    quick: list[Any] = [type(TARGETS[name])(seconds_per_sample=0.0) for name in TARGETS]
    return [*quick, *(device_target(name) for name in DEVICES)]


@pytest.mark.parametrize("target", _targets(), ids=lambda t: t.name)
def test_target_contract(target: Target) -> None:
    shapes, ms = [(32, 128), (48, 96)], [1, 5]
    schemes = list(SCHEMES.values())
    seen: list[tuple[int, int]] = []
    samples = target.time(shapes, schemes, ms, lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 4) for i in range(4)]
    expected = {(n, k, m, s.name) for n, k in shapes for m in ms for s in schemes if target.supports(s, n, k) is None}
    assert {(s.n, s.k, s.m, s.scheme) for s in samples} == expected
    assert len(samples) == len(expected)
    least = {"bf16", "w8a8-block64", "w4a8-block64"} if target.name == "openvino" else {"bf16", "w8a8-int8", "w4a16"}
    assert least <= {s.scheme for s in samples}
    for sample in samples:
        assert sample.origin == target.origin
        assert 0 < sample.p20_us <= sample.p50_us <= sample.p80_us
        held = [sample.scheme, *(["w8a8-int8"] if target.name == "onnxruntime" and TWO_LEVEL in sample.scheme else [])]
        assert sample.bytes == sum(weight_bytes(scheme_named(name), sample.n, sample.k) for name in held)
        assert sample.kernel != "reference"
    struck = [s for s in schemes if (reason := target.supports(s, 48, 96)) is not None and len(reason) > 10]
    assert {"w4a16-g128", "w4a16-g64"} <= {s.name for s in struck}


def test_bytes_count_scales() -> None:
    assert weight_bytes(scheme_named("bf16"), 64, 256) == 2 * 64 * 256
    assert weight_bytes(scheme_named("w8a8-int8"), 64, 256) == 64 * (256 + 2)
    assert weight_bytes(scheme_named("w4a16"), 64, 256) == 64 * (128 + 2 * 2)
    assert weight_bytes(scheme_named("w4a16-g32"), 64, 256) == 64 * (128 + 2 * 8)
    with pytest.raises(UnsupportedError, match="33"):
        weight_bytes(scheme_named("w4a16"), 64, 33)


def test_roofline_arithmetic() -> None:
    target = device_target("h100")
    n = k = 4096
    decode = target.microseconds(scheme_named("bf16"), n, k, 1)
    assert decode == pytest.approx((2 * n * k + 4 * n) / 3.35e12 * 1e6)
    prefill = target.microseconds(scheme_named("bf16"), n, k, 8192)
    assert prefill == pytest.approx(2 * 8192 * n * k / 989.4e12 * 1e6)
    w4 = target.microseconds(resolve(scheme_named("w4a16"), k), n, k, 1)
    assert 3.5 < decode / w4 < 4.0
    fp8 = target.microseconds(scheme_named("w8a8-fp8"), n, k, 8192)
    assert fp8 == pytest.approx(2 * 8192 * n * k / 1978.9e12 * 1e6 + 3 * 8192 * k / 3.35e12 * 1e6)
    weight_only = target.microseconds(scheme_named("w8a16"), n, k, 8192)
    assert weight_only == pytest.approx(prefill)


@pytest.mark.parametrize("name", ["a100", "ascend-910b"])
def test_devices_without_fp8_strike_it_out(name: str) -> None:
    target = device_target(name)
    for scheme in ("w8a8-fp8", "w8a8-fp8-static", "w4a8-fp8", "w4a8-fp8-g64"):
        assert "no FP8" in str(target.supports(scheme_named(scheme), 64, 128))
    assert target.supports(scheme_named("w8a8-int8"), 64, 128) is None
    assert device_target("h200").supports(scheme_named("w8a8-fp8"), 64, 128) is None


def test_unknown_names_are_answered_with_neighbours() -> None:
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        device_target("h1000")
    with pytest.raises(ConfigError, match="did you mean 'torch'"):
        target_for("torhc")
    assert target_for("torch").name == "torch"
    assert target_for("torch", "cpu").origin == "measured"
    assert target_for("torch", "a100").origin == "modelled"
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="no CUDA device") as refused:
            target_for("torch", "cuda")
        assert refused.value.reasons == ("torch finds no CUDA device here",)


def test_random_operands_are_fit_to_time() -> None:
    for scheme in SCHEMES.values():
        operands = measure.random_operands(resolve(scheme, 128), 32, 128)
        assert (operands.n, operands.k) == (32, 128)
        assert operands.scale is None or bool(operands.scale.isfinite().all())
        values = operands.codes.to(torch.float32)
        assert bool(values.isfinite().all())
        assert float(values.std()) > 0


def test_copies_share_nothing_that_a_kernel_reads() -> None:
    for name in ("w8a16", "w8a8-int8", "w4a16-g32", "w8a8-fp8", "bf16"):
        scheme = scheme_named(name)
        operands = measure.random_operands(scheme, 32, 64)
        x = torch.randn(2, 64)
        for kernel in automatic(scheme, 32, 64):
            states = measure.independent_states(kernel, operands, 2)
            expected = kernel.run(kernel.prepare(operands), x)
            assert all(torch.equal(kernel.run(state, x), expected) for state in states)
            read = [state.tensors[0] for state in states]
            assert read[0] is not read[1]
            if read[0].layout is torch.strided:
                assert len({t.data_ptr() for t in (*read, operands.codes)}) == 3


def test_fp8_loses_on_this_cpu_by_its_measured_time() -> None:
    schemes = [scheme_named(s) for s in ("bf16", "w8a8-fp8")]
    samples = TorchTarget(seconds_per_sample=0.02).time([(512, 512)], schemes, [1])
    by_scheme = {s.scheme: s.p50_us for s in samples}
    assert by_scheme["w8a8-fp8"] > by_scheme["bf16"]


class Causal(nn.Module):
    """A causal model that only keeps time, on a clock of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=11)
        self.now = 0.0
        self.cached = True

    def forward(
        self, input_ids: torch.Tensor, past_key_values: object, use_cache: bool, logits_to_keep: int = 0
    ) -> SimpleNamespace:
        assert use_cache
        assert logits_to_keep == 1
        self.now += 0.5 if past_key_values is None else 0.1
        logits = torch.zeros(input_ids.shape[0], 1, 11)
        return SimpleNamespace(logits=logits, past_key_values="cache" if self.cached else None)


def test_end_to_end_counts_tokens_and_keeps_to_its_time() -> None:
    model = Causal()
    prefill, decode = measure_end_to_end(model, 20, 3, batch=2, clock=lambda: model.now)
    assert prefill == pytest.approx(2 * 20 / 0.5)
    assert decode == pytest.approx(2 / 0.1)
    slow = Causal()
    measure_end_to_end(slow, 20, 1000, seconds=1.0, clock=lambda: slow.now)
    assert slow.now < 3.5
    model.cached = False
    with pytest.raises(ModelError, match="past_key_values"):
        measure_end_to_end(model, 4, 1)
    with pytest.raises(ModelError, match="vocab_size"):
        measure_end_to_end(nn.Linear(2, 2), 4, 1)


class Renamed(Causal):
    """The same with the cache under its newer name."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, cache: object, use_cache: bool, logits_to_keep: int = 0
    ) -> SimpleNamespace:
        found = super().forward(input_ids, cache, use_cache, logits_to_keep)
        return SimpleNamespace(logits=found.logits, cache=found.past_key_values)


def test_end_to_end_knows_both_names_of_the_cache() -> None:
    model = Renamed()
    assert measure_end_to_end(model, 20, 3, batch=2, clock=lambda: model.now)[1] == pytest.approx(2 / 0.1)


def test_end_to_end_on_a_tiny_transformer() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
        max_position_embeddings=64,
    )  # fmt: skip
    prefill, decode = measure_end_to_end(transformers.LlamaForCausalLM(config).eval(), 8, 4, seconds=0.5)
    assert prefill > 0
    assert decode > 0


def test_dollars_per_million_tokens() -> None:
    workload = Workload(batch=4, prompt_tokens=500, output_tokens=100)
    price = economics.price_of("h100", 3.6)
    # A dollar per 1e9 us.
    assert economics.dollars_per_million_output_tokens(workload, 1e6, price) == pytest.approx(1e-3 / 400 * 1e6)


def test_every_device_has_a_price_or_says_that_it_has_none() -> None:
    for device in DEVICES:
        assert device in economics.LIST_PRICES or device in economics.UNPRICED
    with pytest.raises(ConfigError, match="no list price is known"):
        economics.price_of("cpu")
    with pytest.raises(ConfigError, match="did you mean"):
        economics.price_of("h10")
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="positive"):
            economics.price_of("h100", bad)
