"""The KV cache in a plan: its loss against autograd and against measurement, its cost, and whole runs with it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowprec
import tiny
from lowprec.api import optimize
from lowprec.artifacts.digests import verify_digests
from lowprec.artifacts.loading import load_artefact, read_back
from lowprec.artifacts.probe import check_probe
from lowprec.artifacts.safetensors_io import load_tensors
from lowprec.artifacts.stored_cache import read_cache
from lowprec.errors import UnsupportedError
from lowprec.formats import CACHE_FORMATS
from lowprec.pipeline.mixes import Tuning
from lowprec.records import CostSample, Workload
from lowprec.report import report_from_json
from lowprec.results import Report
from lowprec.runtime.kvcache import PARTS, cache_argument, fake_quantize
from lowprec.runtime.request_cache import RequestCache
from lowprec.runtime.serving_cache import tap_cache
from lowprec.settings import KV_CACHES
from lowprec.steps.allocate import Option, allocate
from lowprec.steps.caches import Caches, cache_bytes, find_caches, ranges, scales_of
from lowprec.steps.calibrate import calibrate
from lowprec.steps.cost import cache_costs, time_caches
from lowprec.steps.effects import LayerErrors
from lowprec.steps.load import decoder_forward
from lowprec.steps.measure import compare, compare_tokens, mean_kl, measure_pairs, run_through
from lowprec.steps.outcome import Tokens
from lowprec.steps.scratch import Scratch
from lowprec.steps.sensitivity import Effects, effects, rows_of
from lowprec.steps.stream import Stream
from lowprec.steps.tokens import Batch
from lowprec.targets import CacheTarget, target_for
from lowprec.transforms import Merge, merged

FORMATS = list(CACHE_FORMATS)
SEED = 3


def batches(count: int = 3, rows: int = 2, length: int = 16) -> list[Batch]:
    """Windows of which the second row of each batch is shorter."""
    lengths = torch.tensor([length, length - 4] + [length] * (rows - 2))
    return [
        Batch(ids=tiny.batch(rows, length, seed=i), lengths=lengths, index=tuple(range(rows * i, rows * (i + 1))))
        for i in range(count)
    ]


def prepared(name: str, fmt: str) -> tuple[Stream, Caches]:
    stream = Stream(tiny.decoder(name), decoder_forward, batches(1)[0])
    caches = find_caches(stream, tiny.batch(), fmt)
    scales = scales_of(ranges(stream, caches.groups, batches()), fmt)
    return stream, dataclasses.replace(caches, scales=scales)


def scored(
    stream: Stream, caches: Caches, path: Path, data: list[Batch], progress: Callable[[int, int], None] | None = None
) -> Effects:
    scratch = Scratch(path, "d")
    done = calibrate(stream, (), data, Tokens(), lambda _: None, scratch, probing=len(data))
    more = {} if progress is None else {"progress": progress}
    return effects(stream, (), {}, data, Tokens(), no_errors, done, scratch, SEED, caches=caches, **more)  # type: ignore[arg-type]


def no_errors(layer: str, formats: Any) -> LayerErrors:
    raise AssertionError("no group of weights was asked for")


def reference_effects(name: str, caches: Caches, data: list[Batch]) -> dict[str, Tensor]:
    """<dk, gradient of k> of every place by plain autograd through the whole model, sequence by sequence."""
    model = tiny.decoder(name).float()
    taken: dict[tuple[str, str], Tensor] = {}

    class Taking:
        def __init__(self, module: str) -> None:
            self.module = module

        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            for part, x in zip(PARTS, (keys, values), strict=True):
                x.retain_grad()
                taken[self.module, part] = x
            return keys, values

    for module in caches.modules:
        tap_cache(model.get_submodule(module), lambda _, module=module: Taking(module))
    places = [place for group in caches.groups for place in group.places]
    found: dict[str, list[float]] = {place.name: [] for place in places}
    for position, batch in enumerate(data):
        logp = Tokens().sampled_log_likelihood
        for row in range(len(batch.ids)):
            generator = torch.Generator().manual_seed(SEED * 1_000_003 + position)
            output = decoder_forward(model, batch)
            # Rows that are held constant draw their labels as well, so that this one draws the same as among all.
            only = torch.zeros(len(batch.ids), 1, 1)
            only[row] = 1.0
            logp(output * only + output.detach() * (1 - only), batch, generator).backward()
            for place in places:
                x = taken[place.module, place.part]
                cached = caches.at(place.module, place.part)
                assert cached is not None
                assert x.grad is not None
                change = fake_quantize(x.detach(), cached[1]) - x.detach()
                found[place.name].append(float((change * x.grad).sum()))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_effects_equal_autograd(name: str, fmt: str, tmp_path: Path) -> None:
    if name == "gemma3" and CACHE_FORMATS[fmt].largest is not None:
        pytest.skip("its windows stay as they are, which a format for all layers cannot say")
    stream, caches = prepared(name, fmt)
    data = batches()
    found = scored(stream, caches, tmp_path, data)
    reference = reference_effects(name, caches, data)
    assert set(found.columns) == {(place, "cache", fmt) for place in reference}
    for place, expected in reference.items():
        ours = found.values[:, found.columns.index((place, "cache", fmt))].double()
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3 * float(expected.std()))


@pytest.mark.parametrize("fmt", FORMATS)
def test_prediction_agrees_with_measurement(fmt: str, tmp_path: Path) -> None:
    stream, caches = prepared("llama", fmt)
    # As many as leave the finest format's sampling error below a quarter of what it loses.
    data = batches(24, 8, 32)
    found = scored(stream, caches, tmp_path, data)
    rows = {row.group: row for row in rows_of(found, (), {}, lambda *_: "", caches)}
    assert set(rows) == set(caches.names)
    overlays = {(group, fmt): caches.overlay({group: fmt}) for group in caches.names}
    measured = measure_pairs(stream, data, overlays, compare_tokens)
    reference, every = run_through(stream, data), caches.overlay(dict.fromkeys(caches.names, fmt))
    for group in caches.names:
        row, alone = rows[group], run_through(stream, data, overlays[group, fmt])
        whole = mean_kl(compare(reference, [alone], data, compare_tokens)[0])
        assert measured[group, fmt] == pytest.approx(whole, rel=1e-3, abs=1e-9), "also where it spans all blocks"
        assert row.predicted_kl_nats == pytest.approx(whole, rel=0.1, abs=3 * row.stderr + 2e-8), group
        assert row.stderr < 0.25 * row.predicted_kl_nats, "or the check would be one of nothing"
    table = compare(reference, [run_through(stream, data, every)], data, compare_tokens)[0]
    noise = sum(row.stderr**2 for row in rows.values()) ** 0.5
    assert sum(row.predicted_kl_nats for row in rows.values()) == pytest.approx(mean_kl(table), rel=0.1, abs=3 * noise)


def test_a_cut_pass_resumes_with_the_same_effects(tmp_path: Path) -> None:
    stream, caches = prepared("llama", "kv8-fp8")
    data = batches()
    whole = scored(stream, caches, tmp_path / "whole", data)

    def cut(done: int, total: int) -> None:
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        scored(stream, caches, tmp_path / "cut", data, cut)
    resumed = scored(stream, caches, tmp_path / "cut", data)
    assert resumed.columns == whole.columns
    assert len(whole.columns) == 6
    assert torch.equal(resumed.values, whole.values)


# Cost


@pytest.mark.parametrize("device", [None, "h100", "a100"])
def test_costs_are_those_of_the_workload(device: str | None) -> None:
    _, caches = prepared("llama", "kv8-int8")
    work, target = Workload(batch=3, prompt_tokens=20, output_tokens=10), target_for("torch", device)
    assert isinstance(target, CacheTarget)
    samples = time_caches(caches, work, target)
    assert {s.origin for s in samples} == {target.origin}
    costs = cache_costs(caches, work, samples)
    heads, width, tokens = 2, 16, 3 * 30
    for name in caches.names:
        assert costs[name, "bf16"].bytes == tokens * heads * width * 2
        assert costs[name, "kv8-int8"].bytes == tokens * heads * (width + 2)
    if device is not None:
        ratio = costs[name, "kv8-int8"].us / costs[name, "bf16"].us
        assert ratio == pytest.approx((width + 2) / (2 * width)), "a model reads what is stored and no more"


def test_time_is_prefill_once_and_decode_for_every_token() -> None:
    _, caches = prepared("llama", "kv8-int8")
    work = Workload(batch=2, prompt_tokens=8, output_tokens=4)

    def sample(scheme: str, m: int, n: int, us: float) -> CostSample:
        return CostSample(
            op="cache", m=m, n=n, k=32, scheme=scheme, kernel="", p20_us=us, p50_us=us, p80_us=us, bytes=0,
            origin="measured",
        )  # fmt: skip

    samples = [sample("bf16", 16, 8, 5.0), sample("bf16", 2, 11, 1.0)]
    samples += [sample("kv8-int8", 16, 8, 7.0), sample("kv8-int8", 2, 11, 0.5)]
    costs = cache_costs(caches, work, samples)
    assert costs[caches.names[0], "bf16"].us == 5.0 + 4 * 1.0
    assert costs[caches.names[0], "kv8-int8"].us == 7.0 + 4 * 0.5


def test_the_allocation_rounds_where_it_pays_and_keeps_what_cannot_stand_it() -> None:
    _, caches = prepared("llama", "kv8-int8")
    work = Workload(batch=1, prompt_tokens=64, output_tokens=0)
    # Keys of the first layer, as those of some models are.
    losses = dict.fromkeys(caches.names, 1e-5) | {caches.names[0]: 0.3}
    places = {group.name: group.places for group in caches.groups}
    options = {
        name: [
            Option(scheme="bf16", loss=0.0, cost=cache_bytes(places[name], None, work, 2)),
            Option(scheme="kv8-int8", loss=loss, cost=cache_bytes(places[name], "kv8-int8", work, 2)),
        ]
        for name, loss in losses.items()
    }
    found = allocate(caches.names, options, 0.01).scheme_of()
    assert found == dict.fromkeys(caches.names, "kv8-int8") | {caches.names[0]: "bf16"}


def test_targets_that_keep_caches_of_their_own_are_refused(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model")
    arguments: dict[str, Any] = {"out": tmp_path / "out", "effort": tiny.EFFORT, "schemes": ["w8a8-int8"]}
    with pytest.raises(UnsupportedError, match=r"form of its own[\s\S]*--target torch"):
        optimize(tmp_path / "model", kv_cache="8", target="openvino", **arguments)
    with pytest.raises(UnsupportedError, match=r"cannot keep a KV cache in kv8-int8[\s\S]*--kv-cache int8-channel"):
        optimize(tmp_path / "model", kv_cache="8", target="onnxruntime", **arguments)
    with pytest.raises(UnsupportedError, match=r"cannot keep a KV cache in kv8-fp8[\s\S]*Hopper and Ada"):
        optimize(tmp_path / "model", kv_cache="fp8", device="a100", **arguments)


def test_a_model_without_such_a_cache_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model", "mistral")
    with pytest.raises(UnsupportedError, match=r"sliding window of 4096[\s\S]*give --kv-cache none"):
        run(tmp_path, tmp_path / "out", kv_cache="8")
    assert not (tmp_path / "out" / "calibration.json").exists()


# Whole runs


def run(place: Path, out: Path, **changed: Any) -> Report:
    tiny.text(place / "text.jsonl")
    settings: dict[str, Any] = {
        "budget": "30%",
        "objective": "bytes",
        "embeddings": False,
        "effort": tiny.EFFORT,
        "data": [place / "text.jsonl"],
        "schemes": ["w8a8-int8", "w4a16"],
        "workload": Workload(prompt_tokens=48, output_tokens=16),
    }
    return optimize(place / "model", out=out, **settings | changed)


def stored(out: Path, name: str) -> Any:
    return json.loads((out / f"{name}.json").read_text())["record"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "asked"), [("llama", "8"), ("llama", "fp8"), ("llama", "int8-channel"), ("gpt2", "8"), ("gemma3", "8")]
)
def test_a_run_with_the_cache_is_judged_written_and_loaded_with_it(name: str, asked: str, tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model", name)
    out = tmp_path / "out"
    report = run(tmp_path, out, kv_cache=asked)
    fmt = KV_CACHES[asked]
    plan = dict(stored(out, "plan")["groups"])
    rounded = [group for group, scheme in plan.items() if scheme == fmt]
    assert rounded, "bytes of the cache are worth it within 30 %"
    parts = read_cache(out / "model")
    assert {f"{p.module}.{p.part}" for p in parts} == set(rounded) or rounded == ["kv_cache"]
    assert report.parity.holds
    assert report.cost.cache_bytes_before is not None
    assert report.cost.cache_bytes_after is not None
    each = {"8": 18, "fp8": 16, "int8-channel": 16}[asked]
    assert report.cost.cache_bytes_after == pytest.approx(report.cost.cache_bytes_before * each / 32)
    before = report.cost.weight_bytes_before + report.cost.cache_bytes_before
    assert report.cost.before == before
    # Every packed layer also stores its shape, two int64, and every static scale of the cache two bytes.
    extra = 16 * len(read_back(out / "model")) + 2 * len(parts)
    left = report.cost.weight_bytes_after + report.cost.cache_bytes_after
    assert report.cost.after == pytest.approx(left, abs=extra)
    assert report_from_json((out / "report.json").read_text()) == report
    assert "KV cache" in (out / "report.html").read_text()
    assert any(pair.scheme == fmt and pair.measured_kl_nats > 0 for pair in report.sensitivity.pairs)
    assert verify_digests(out / "model") == ()
    check_loaded(out / "model", parts)
    if report.artefact_form == "compressed-tensors":
        check_words(out / "model", fmt, parts)
    if asked == "8":
        check_exported(out, tmp_path / "onnx")


def check_exported(out: Path, to: Path) -> None:
    """A graph has no rounded cache, and says so."""
    pytest.importorskip("onnxruntime")
    written = lowprec.export_onnx(out, to)
    assert any("KV cache is not rounded" in note for note in written.notes)
    assert written.largest_error < 1e-3


def check_loaded(path: Path, parts: Any) -> None:
    model, _ = load_artefact(path)
    ids, name = tiny.batch(2, 20), cache_argument(model)
    assert check_probe(model, path) < 1e-2
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
        cache = getattr(generated, name)
        assert isinstance(cache, RequestCache)
        assert cache.parts == parts
        exact = model(input_ids=ids, use_cache=True, **{name: lowprec.request_cache(model, 16)}).logits
        step = model(input_ids=ids[:, :9], use_cache=True)
        last = model(input_ids=ids[:, 9:], use_cache=True, **{name: getattr(step, name)})
    torch.testing.assert_close(last.logits, whole[:, 9:], rtol=1e-3, atol=1e-3)
    assert not torch.equal(whole, exact), "what is judged without a cache has it rounded"


def check_words(path: Path, fmt: str, parts: Any) -> None:
    """A checkpoint says that its cache is in FP8, and of INT8 nothing."""
    said = json.loads((path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    tensors, _ = load_tensors(path / "model.safetensors")
    scales = {name: float(value) for name, value in tensors.items() if name.endswith(("k_scale", "v_scale"))}
    card = (path / "README.md").read_text()
    if fmt != "kv8-fp8":
        assert (said, scales) == (None, {})
        assert "other runtimes keep it in 16 bits" in card
    else:
        assert (said["num_bits"], said["type"], said["strategy"], said["dynamic"]) == (8, "float", "tensor", False)
        assert scales == {f"{p.module}.{p.part[0]}_scale": p.scale for p in parts}
        assert "kv_cache_scheme" in card


@pytest.mark.slow
def test_the_same_command_again_does_nothing_new_and_off_is_as_before(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model")
    first = run(tmp_path, tmp_path / "out", kv_cache="8")
    plan = (tmp_path / "out" / "plan.json").read_bytes()
    again = run(tmp_path, tmp_path / "out", kv_cache="8")
    assert (tmp_path / "out" / "plan.json").read_bytes() == plan
    assert again.unread_data
    assert again.loss == first.loss
    off = run(tmp_path, tmp_path / "out")
    assert off.cost.cache_bytes_before is None
    assert not (tmp_path / "out" / "model" / "kv_cache.json").exists()
    assert not off.unread_data, "another artefact looks at data that was read"
    assert {choice.scheme for choice in off.groups}.isdisjoint(CACHE_FORMATS)


@pytest.mark.slow
def test_every_rounding_of_a_mix_is_measured_with_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.folder(tmp_path / "model")
    seen: list[set[str]] = []
    measure = Tuning.measure

    def noting(self: Tuning, overlay: Any) -> Any:
        seen.append({name for name, override in overlay.items() if override.cache})
        return measure(self, overlay)

    monkeypatch.setattr(Tuning, "measure", noting)
    effort = dataclasses.replace(tiny.EFFORT, compensated=True, healing_passes=1, rounds=1)
    run(tmp_path, tmp_path / "out", kv_cache="8", effort=effort, schemes=["w4a16"])
    modules = {f"model.layers.{i}.self_attn" for i in range(3)}
    # Compensated and healed at least, of a mix whose cache is worth its bytes.
    assert len(seen) >= 2
    assert all(rounded == modules for rounded in seen)
    assert {p.module for p in read_cache(tmp_path / "out" / "model")} == modules


@pytest.mark.parametrize("fmt", ["kv8-channel-int8", "kv8-fp8"])
def test_scales_follow_what_is_merged_into_the_values(fmt: str) -> None:
    stream, caches = prepared("llama", fmt)
    attention, data = "model.layers.1.self_attn", batches(2, 4, 24)
    merge = Merge(source=f"{attention}.v_proj", consumers=(f"{attention}.o_proj",), channels=32, head=16, repeat=2)
    exponents = torch.randint(-3, 4, (32,), generator=torch.Generator().manual_seed(0))
    plan = dict.fromkeys(caches.names, fmt)

    def outputs(found: Caches) -> Tensor:
        run = run_through(stream, data, found.overlay(plan))
        return torch.cat([hidden.flatten() for hidden in run.hidden])

    expected, plain = outputs(caches), outputs(Caches())
    rounding = (expected - plain).norm()
    with merged(stream.module, [(merge, exponents)]):
        assert (outputs(Caches()) - plain).norm() < 1e-4 * rounding, "merging itself changes nothing"
        behind, stale = outputs(caches.behind([(merge, exponents)])), outputs(caches)
    error = float((behind - expected).norm() / rounding)
    # A scale for each channel moves with it; one for all of FP8's floats has to hold the channel that grew most.
    assert error < (1e-4 if fmt == "kv8-channel-int8" else 1.0)
    if fmt == "kv8-channel-int8":
        assert float((stale - expected).norm() / rounding) > 0.5, "and it would be seen if they did not"


@pytest.mark.slow
def test_a_folder_keeps_the_scales_of_each_format_apart(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model")
    tiny.text(tmp_path / "text.jsonl")
    for asked in ("fp8", "int8-channel", "fp8"):
        settings = lowprec.Settings(
            out=tmp_path / "out", effort=tiny.EFFORT, data=(str(tmp_path / "text.jsonl"),), kv_cache=asked
        )
        with lowprec.begin(tmp_path / "model", settings, "30%") as context:
            caches = lowprec.prepare(context).caches
        assert caches.format == KV_CACHES[asked]
        assert {len(scales) for _, _, scales in caches.scales} == {1 if asked == "fp8" else 32}
