"""Phases in our runtime: prefill rounds inputs, decode may leave them as they are, of the same codes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowprec
import tiny
from lowprec.errors import ConfigError
from lowprec.formats import QuantizedWeight, resolve, scheme_named
from lowprec.records import CostSample, Scheme, Workload
from lowprec.results import Report
from lowprec.runtime import KernelTable, QuantLinear
from lowprec.runtime.dispatch import BUCKET_M, FEW, UNROUNDED, automatic, kernel_named
from lowprec.steps.load import wrap
from lowprec.targets.torch import TorchTarget

ROUNDED = ("w8a8-int8", "w8a8-int8-static", "w4a8-int8")


def _weight(scheme: Scheme, n: int = 48, k: int = 128) -> QuantizedWeight:
    return tiny.rounded(torch.randn(n, k, generator=torch.Generator().manual_seed(0)), str(scheme.weight))


def _in_phases(scheme: Scheme, n: int = 48, k: int = 128) -> QuantLinear:
    """A layer whose fastest forms, by samples that say so, leave few rows unrounded."""
    samples = [_sample(scheme, m, _names(scheme, n, k, m)[-1], n, k) for m in BUCKET_M]
    static = torch.tensor(0.03) if scheme.name.endswith("static") else None
    return QuantLinear.from_quantized(
        _weight(scheme, n, k), scheme, kernels=KernelTable(samples), activation_scale=static
    )


def _names(scheme: Scheme, n: int, k: int, m: int) -> list[str]:
    return [form.name for form in automatic(scheme, n, k, rows=m)]


def _sample(scheme: Scheme, m: int, kernel: str, n: int, k: int) -> CostSample:
    return CostSample(
        op="linear", m=m, n=n, k=k, scheme=scheme.name, kernel=kernel,
        p20_us=1.0, p50_us=1.0, p80_us=1.0, bytes=1, origin="measured",
    )  # fmt: skip


@pytest.mark.parametrize("name", ROUNDED)
def test_few_rows_may_also_be_computed_unrounded(name: str) -> None:
    scheme = resolve(scheme_named(name), 128)
    own = [form.name for form in automatic(scheme, 48, 128)]
    assert not any(form.endswith(UNROUNDED) for form in own)
    assert _names(scheme, 48, 128, FEW + 1) == own, "many rows are what is scored"
    few = _names(scheme, 48, 128, FEW)
    assert few[: len(own)] == own
    assert few[len(own) :]
    assert all(form.endswith(UNROUNDED) for form in few[len(own) :])
    assert "reference" not in "".join(few)


def test_forms_for_few_rows_are_not_asked_for_by_name_and_are_one_object_each() -> None:
    scheme = scheme_named("w8a8-int8")
    names = [form for form in _names(scheme, 48, 128, 1) if form.endswith(UNROUNDED)]
    with pytest.raises(ConfigError, match="computes few rows alone"):
        kernel_named(names[0], scheme, 48, 128)
    layer = _in_phases(scheme)
    assert layer.kernels[0] is layer.kernels[1]


@pytest.mark.parametrize("name", ["bf16", "w8a16", "w4a16"])
def test_a_scheme_that_rounds_nothing_has_one_phase(name: str) -> None:
    scheme = resolve(scheme_named(name), 128)
    assert _names(scheme, 48, 128, 1) == _names(scheme, 48, 128, 256)


@pytest.mark.parametrize("name", ROUNDED)
def test_each_phase_computes_what_it_says_of_the_same_codes(name: str) -> None:
    scheme = resolve(scheme_named(name), 128)
    layer, weight = _in_phases(scheme), _weight(scheme).dequantize()
    for rows in (1, FEW, FEW + 1, 200):
        x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows))
        exact = x.double() @ weight.double().t()
        unrounded = layer.kernel_for(rows).activation is None
        assert unrounded == (rows <= FEW)
        assert layer.relative_error(x) <= layer.tolerance, "against the reference of the form that ran"
        off = float((layer.reference(x) - exact).norm() / exact.norm())
        assert (off < 1e-6) if unrounded else (off > 1e-3)


def test_the_target_times_the_forms_that_will_run() -> None:
    target, scheme = TorchTarget(seconds_per_sample=0.01), scheme_named("w8a8-int8")
    samples = {s.m: s for s in target.time([(96, 128)], [scheme], [1, 256])}
    assert samples[1].kernel in _names(scheme, 96, 128, 1)
    assert samples[256].kernel in _names(scheme, 96, 128, 256)
    layer = QuantLinear.from_quantized(_weight(scheme, 96), scheme, kernels=KernelTable(samples.values()))
    assert layer.kernel_for(1).name == samples[1].kernel
    assert layer.kernel_for(256).name == samples[256].kernel


@pytest.fixture
def unrounded_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says that few rows are fastest unrounded."""
    told = TorchTarget.time

    def time(self: TorchTarget, shapes: Any, schemes: Any, ms: Any, progress: Any = None) -> list[CostSample]:
        samples = told(self, shapes, schemes, ms, progress)
        return [
            dataclasses.replace(s, kernel=_names(resolve(scheme_named(s.scheme), s.k), s.n, s.k, s.m)[-1])
            for s in samples
        ]

    monkeypatch.setattr(TorchTarget, "time", time)


def _run(model: Any, out: Path, data: Any, **changed: Any) -> Report:
    workload = Workload(prompt_tokens=32, output_tokens=8)
    settings = {"budget": "30%", "effort": tiny.EFFORT, "workload": workload, "schemes": ["w8a8-int8"]}
    return lowprec.optimize(model, out=out, data=[data], **settings | changed)


@pytest.mark.slow
@pytest.mark.usefixtures("unrounded_decode")
def test_a_run_holds_both_phases_against_what_was_scored(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model")
    tiny.text(tmp_path / "text.jsonl")
    text = tmp_path / "text.jsonl"
    report = _run(tmp_path / "model", tmp_path / "out", text, embeddings=False, objective="bytes")
    rounded = [group for group in report.groups if group.scheme == "w8a8-int8" and group.block is not None]
    assert rounded
    assert all(group.decode_kernel.endswith(UNROUNDED) for group in rounded)
    assert not any(group.prefill_kernel.endswith(UNROUNDED) for group in rounded)
    assert rounded[0].decode_kernel in (tmp_path / "out" / "report.html").read_text()
    parity = report.parity
    assert parity.holds
    assert parity.decode_kl_nats is not None
    assert parity.scored_kl_nats is not None
    assert parity.decode_kl_nats < parity.scored_kl_nats + 2.0 * parity.noise_kl_nats


class Pooled(nn.Module):
    """Its layers are given a row for each text: so few that all of them are few."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(tiny.WORDS, 64)
        self.inner, self.outer = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, 64]."""
        y: Tensor = self.outer(torch.relu(self.inner(self.embedding(ids).mean(1))))
        return y


@pytest.mark.slow
@pytest.mark.usefixtures("unrounded_decode")
def test_few_rows_are_held_against_the_scored_model_without_the_rounding(tmp_path: Path) -> None:
    def embed(module: Any, batch: Any) -> Tensor:
        assert len(batch.ids) <= FEW
        out: Tensor = module(batch.ids)
        return out

    model = wrap(Pooled(), embed, tokenizer=tiny.tokenizer())
    report = _run(model, tmp_path / "out", tiny.text(tmp_path / "text.jsonl"), budget="0.05 abs", objective="bytes")
    assert "w8a8-int8" in {share.scheme for share in report.schemes}
    # Against the model with rounded inputs it is most of the noise.
    assert report.parity.runtime_kl_nats <= 0.5 * report.parity.noise_kl_nats
    assert report.parity.holds


@pytest.mark.slow
def test_what_a_modelled_device_plans_for_needs_no_kv_cache(tmp_path: Path) -> None:
    module = tiny.decoder()
    plain = wrap(Uncached(module), lambda m, b: m(b.ids), tokenizer=tiny.tokenizer(), kind="decoder")
    report = _run(plain, tmp_path / "out", tiny.text(tmp_path / "text.jsonl"), device="h100", objective="bytes")
    assert report.parity.holds
    assert report.parity.decode_kl_nats is None


class Uncached(nn.Module):
    """A decoder that is called in its own way and keeps no cache."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V]."""
        logits: Tensor = self.inner(ids).logits
        return logits
