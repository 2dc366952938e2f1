"""The onnxruntime target: what it rounds, what it times, and whole runs whose verdict is taken in that runtime."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import lowprec
import tiny
from lowprec.api import optimize
from lowprec.artifacts.digests import verify_digests, write_digests
from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats import ACTIVATION_FORMATS, SCHEMES, scheme_named
from lowprec.onnx import layers
from lowprec.onnx.forms import product_of, refuses
from lowprec.onnx.layers import layer_model, random_weight, run_layer, saturates
from lowprec.onnx.module import OnnxModule
from lowprec.onnx.token import matmul_token
from lowprec.pipeline.prove import Proved
from lowprec.records import PrecisionPlan, Scheme, Workload
from lowprec.report import report_from_json
from lowprec.results import Report
from lowprec.steps import judge
from lowprec.targets import RuntimeTarget, target_for
from lowprec.targets.base import weight_bytes
from lowprec.targets.onnxruntime import OnnxRuntimeTarget

TARGET = OnnxRuntimeTarget(seconds_per_sample=0.0)
RUN = sorted(name for name, s in SCHEMES.items() if TARGET.supports(s, 64, 384) is None and s.weight is not None)


def wild(rows: int, k: int, seed: int = 0) -> torch.Tensor:
    """Inputs with outliers, a block of zeros and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator) * torch.randn(rows, k, generator=generator).exp()
    x[:, 7] *= 40.0
    x[0, 32:64] = 0.0
    x[-1] = 0.0
    return x


@pytest.mark.parametrize("rows", [2, 17])
@pytest.mark.parametrize("name", [name for name in RUN if "-g" in name or SCHEMES[name].family == "int8"])
def test_the_scored_model_rounds_as_the_runtime_does(name: str, rows: int) -> None:
    scheme, x = scheme_named(name), wild(rows, 384)
    weight = random_weight(str(scheme.weight), 64, 384)
    assert TARGET.layer_error(scheme, weight, x) < 2e-6
    if scheme.activation is not None:
        unrounded = dataclasses.replace(scheme, activation=None)
        dense = run_layer(product_of(scheme)[1], weight, x) - (x.double() @ weight.dequantize().double().T)
        assert float(dense.norm()) > 1e-3, "rounding is seen, so the check above is one"
        assert refuses(unrounded) is None or scheme.family == "int8"


@pytest.mark.parametrize("k", [600, 129, 40])
@pytest.mark.parametrize("name", ["w8a8-block", "w8a8-int8"])
def test_rows_that_are_no_whole_number_of_blocks(name: str, k: int) -> None:
    assert TARGET.layer_error(scheme_named(name), random_weight("int8", 24, k), wild(3, k)) < 2e-6


def test_two_levels_are_timed_as_they_run_and_held_twice() -> None:
    name = "w4a8-two-level-g64"
    few, many = TARGET.time([(64, 384)], [scheme_named(name)], [1, 64])
    assert (few.kernel, many.kernel) == ("MatMulNBits level 4", "MatMulIntegerToFloat")
    held = {s: weight_bytes(scheme_named(s), 64, 384) for s in (name, "w8a8-int8")}
    assert few.bytes == many.bytes == sum(held.values())


def test_blocks_are_rounded_apart() -> None:
    x = torch.ones(1, 64)
    x[0, 0] = 1000.0
    found = ACTIVATION_FORMATS["int8-block32"].fake_quantize(x)
    assert torch.equal(found[0, 32:], x[0, 32:])
    assert float(found[0, 1:32].abs().max()) == 0.0
    assert torch.equal(ACTIVATION_FORMATS["int8-block64"].fake_quantize(x)[0, 1:], torch.zeros(63))


def test_what_the_runtime_cannot_compute_has_a_reason() -> None:
    words = {
        "w8a8-fp8": "no product of FP8",
        "w8a16": "writes INT8 weights out",
        "w4a8-int8-g64": "block by block",
        "w8a8-int8-static": "no product with fixed ones",
        "w4a16-g64-rows25": "INT8 weights",
    }
    for name, pattern in words.items():
        reason = TARGET.supports(scheme_named(name), 64, 384)
        assert reason is not None
        assert re.search(pattern, reason), reason
    assert "multiple of 128" in str(TARGET.supports(scheme_named("w4a8-block-g128"), 64, 96))
    odd = Scheme(name="odd", family="int4", weight="int4-g64", activation="int8-block32")
    assert "block by block" in str(refuses(odd))


def test_a_processor_without_vnni_refuses_products_that_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert saturates() is False
    monkeypatch.setattr("lowprec.onnx.forms.saturates", lambda: True)
    assert "overflow" in str(TARGET.supports(scheme_named("w8a8-int8"), 64, 384))


def test_times_rank_what_is_far_apart() -> None:
    target = OnnxRuntimeTarget(seconds_per_sample=0.02)
    names = ["bf16", "w8a8-int8", "w4a8-block-g128", "w4a16-g128"]
    samples = target.time([(512, 1024)], [scheme_named(name) for name in names], [1])
    found = {s.scheme: s for s in samples}
    assert set(found) == set(names)
    assert found["bf16"].kernel == "MatMul"
    assert found["w4a8-block-g128"].kernel == "MatMulNBits level 4"
    # An eighth of the bytes, weights cold.
    assert found["w4a8-block-g128"].p20_us < found["bf16"].p80_us


def test_layers_that_share_an_input_are_one_product() -> None:
    assert TARGET.products(scheme_named("w8a8-int8"), (64, 16, 16)) == (96,)
    assert TARGET.products(scheme_named("bf16"), (64, 16, 16)) == (64, 16, 16)


def test_missing_packages_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"onnxruntime is missing.*pip install --upgrade 'lowprec\[onnx\]'"):
        target_for("onnxruntime")


def test_other_devices_and_other_modules_are_refused(tmp_path: Path) -> None:
    assert isinstance(target_for("onnxruntime"), RuntimeTarget)
    assert not isinstance(target_for("torch"), RuntimeTarget)
    with pytest.raises(UnsupportedError, match="measured on this CPU"):
        target_for("onnxruntime", "h100")
    model = lowprec.wrap(torch.nn.Linear(8, 8), lambda module, batch: module(batch), tokenizer=tiny.tokenizer())
    with pytest.raises(UnsupportedError, match="whole models of transformers"):
        optimize(model, out=tmp_path, target="onnxruntime", budget="0.1 abs")


@pytest.mark.parametrize("name", ["bf16", "w8a8-int8", "w4a8-block-g32"])
def test_every_copy_that_is_timed_is_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, made = scheme_named(name), []
    original = layers.open_layers

    def opened(model: Any, threads: int) -> Any:
        made.append(tmp_path / f"{len(made)}.onnx")
        return original(model, threads, made[-1])

    monkeypatch.setattr(layers, "open_layers", opened)
    monkeypatch.setattr(layers, "copies_for", lambda size: 3)
    OnnxRuntimeTarget(seconds_per_sample=0.0).time([(16, 64)], [scheme], [2])
    graph = onnx.load(made[0], load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    product = {"bf16": "MatMul", "w8a8-int8": "MatMulIntegerToFloat"}.get(name, "MatMulNBits")
    assert kinds.count(product) == 3
    assert kinds.count("QuantizeLinear") == (3 if name == "w8a8-int8" else 0)


def test_products_of_one_input_are_valid_onnx(tmp_path: Path) -> None:
    import onnx_ir as ir

    ir.save(layer_model(matmul_token, [random_weight("int8", 8, 16)] * 2), tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"))


MIX = ("w8a8-int8", "w4a8-block", "w4a16", "w8a8-block")


def asked(place: Path, **changed: Any) -> dict[str, Any]:
    return {
        "target": "onnxruntime",
        "objective": "bytes",
        "schemes": MIX,
        "effort": tiny.EFFORT,
        "data": (str(place / "text.jsonl"),),
        "workload": Workload(prompt_tokens=32, output_tokens=8),
    } | changed


def run(place: Path, out: Path, budget: str = "30%", **changed: Any) -> Report:
    return optimize(place / "model", out=out, budget=budget, **asked(place, **changed))


def proved(place: Path, out: Path) -> tuple[PrecisionPlan, Proved]:
    """A run up to its verdict: what was found before is taken from the folder, and no speed is measured."""
    with lowprec.begin(place / "model", lowprec.Settings(out=out, **asked(place)), "30%") as context:
        prepared = lowprec.prepare(context)
        chosen = lowprec.choose(lowprec.score(prepared), lowprec.price(prepared))
        return chosen.plan, lowprec.prove(chosen, lowprec.export(chosen))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its text and a finished run."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("runtime")
    tiny.folder(path / "model", "llama-untied")
    tiny.text(path / "text.jsonl")
    run(path, path / "out")
    return path


@pytest.mark.slow
def test_a_run_is_judged_in_the_runtime(place: Path) -> None:
    report = report_from_json((place / "out" / "report.json").read_text())
    assert report.target == "onnxruntime"
    assert report.artefact_form == "onnxruntime"
    assert report.parity.holds
    assert report.parity.token_match == 1.0
    assert report.parity.runtime_kl_nats < report.parity.noise_kl_nats
    assert report.parity.max_layer_error < 1e-3
    assert "onnxruntime" in report.cost.device
    assert "float32" in report.cost.baseline
    assert report.cost.decode_tokens_per_s_before
    assert report.cost.decode_tokens_per_s_after
    out = Path(report.artefact)
    assert verify_digests(out) == ()
    assert report.cost.weight_bytes_after == sum((out / f"model.onnx{end}").stat().st_size for end in ("", ".data"))
    card = (out / "README.md").read_text()
    assert "for the target `onnxruntime`" in card
    assert "library_name: onnx" in card
    assert report.verdict in card
    assert "scored to onnxruntime" in (place / "out" / "report.html").read_text()
    struck = {s.scheme for s in report.struck_out}
    assert not struck & set(MIX)


@pytest.mark.slow
def test_a_run_of_two_levels_says_what_decode_loses(place: Path, tmp_path: Path) -> None:
    report = run(place, tmp_path / "out", schemes=("int4-two-level",))
    assert {share.scheme for share in report.schemes} >= {"w4a8-two-level-g64", "w4a8-two-level-g128"}
    graph = onnx.load(Path(report.artefact) / "model.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node] == ["Size", "Less", "If"]
    assert report.parity.holds
    decode, scored = report.parity.decode_kl_nats, report.parity.scored_kl_nats
    assert decode is not None
    assert scored is not None
    # Not the same rounding of inputs, but the same weights, whose error is most of the loss.
    assert decode != scored
    assert decode == pytest.approx(scored, rel=0.5)
    assert "decode there" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_a_run_keeps_its_cache_in_codes(place: Path, tmp_path: Path) -> None:
    report = run(place, tmp_path / "out", kv_cache="int8-channel")
    (cache,) = [group for group in report.groups if group.group == "kv_cache"]
    assert cache.scheme == "kv8-channel-int8", "half of its bytes is worth it within 30 %"
    inputs = onnx.load(Path(report.artefact) / "model.onnx", load_external_data=False).graph.input
    assert {i.type.tensor_type.elem_type for i in inputs if "past" in i.name} == {onnx.TensorProto.INT8}
    assert report.parity.holds
    # Text is scored in steps that see codes, as the scored model does; what is left are codes that lie halfway.
    assert report.parity.runtime_kl_nats < report.parity.noise_kl_nats
    assert report.parity.decode_kl_nats == pytest.approx(report.parity.scored_kl_nats, rel=0.1)
    assert "before they are rounded" in (Path(report.artefact) / "README.md").read_text()


@pytest.mark.slow
def test_codes_beside_weights_of_two_levels(place: Path, tmp_path: Path) -> None:
    report = run(place, tmp_path / "out", schemes=("int4-two-level",), kv_cache="int8-channel")
    assert {share.scheme for share in report.schemes} >= {"w4a8-two-level-g64", "kv8-channel-int8"}
    # Prompts are held to the scored model without the rounding of their own keys, decode to what it loses.
    assert report.parity.holds
    assert report.parity.runtime_kl_nats < report.parity.noise_kl_nats


def offered(place: Path, out: Path, model: str = "model", **changed: Any) -> str | None:
    """The format that a run may keep the cache in, once it has seen the model."""
    with lowprec.begin(place / model, lowprec.Settings(out=out, **asked(place, **changed)), "30%") as context:
        caches = lowprec.prepare(context).caches
        return caches.format if caches.groups else None


@pytest.mark.slow
def test_where_time_counts_the_cache_may_be_kept_in_codes(place: Path, tmp_path: Path) -> None:
    assert offered(place, tmp_path / "0", objective="time") == "kv8-channel-int8"
    assert offered(place, tmp_path / "1", objective="time", kv_cache="none") is None
    assert offered(place, tmp_path / "2") is None
    # Attention over a window keeps what it has in float32; that is said, and no error unless codes were asked for.
    tiny.folder(place / "mistral", "mistral")
    assert offered(place, tmp_path / "3", "mistral", objective="time") is None
    with pytest.raises(UnsupportedError, match="sliding window"):
        offered(place, tmp_path / "4", "mistral", objective="time", kv_cache="int8-channel")


@pytest.mark.slow
def test_the_loaded_model_goes_on_from_its_cache(place: Path) -> None:
    model = OnnxModule(place / "out" / "onnxruntime", threads=1, room=4)
    ids = tiny.batch(2, 12)
    whole = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :8], use_cache=True, logits_to_keep=1)
    rest = model(input_ids=ids[:, 8:], use_cache=True, past_key_values=first.past_key_values)
    assert first.logits.shape == (2, 1, tiny.WORDS)
    # Inputs are rounded, so a last digit may move a code.
    assert torch.allclose(rest.logits, whole[:, 8:], atol=1e-3)
    with pytest.raises(ConfigError, match="room for 12"):
        model(input_ids=ids[:, :1], use_cache=True, past_key_values=rest.past_key_values)


def broken(path: Path) -> None:
    """Turns codes of one layer around in a deployed folder, as a wrong layout would."""
    model = onnx.load(path / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if "down_proj" in t.name and t.name.endswith(("codes", "across")))
    place = {entry.key: entry.value for entry in tensor.external_data}
    start, length = int(place["offset"]), int(place["length"])
    data = bytearray((path / "model.onnx.data").read_bytes())
    data[start : start + length] = data[start : start + length][::-1]
    (path / "model.onnx.data").write_bytes(data)
    write_digests(path)


@pytest.mark.slow
def test_a_broken_export_changes_the_verdict(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "MINIMUM_TOKENS", 500)
    monkeypatch.setattr(judge, "MINIMUM_UNITS", 10)
    for name in ("good", "bad"):
        shutil.copytree(place / "out", tmp_path / name)
    plan, good = proved(place, tmp_path / "good")
    assert good.judgement.verdict == "within"
    broken(tmp_path / "bad" / "onnxruntime")
    # Not noticed as damage: its digests are those of the broken file, which is judged anew.
    record = json.loads((tmp_path / "bad" / "deployed.json").read_text())
    record["record"]["digest"] = "another"
    (tmp_path / "bad" / "deployed.json").write_text(json.dumps(record))
    same, bad = proved(place, tmp_path / "bad")
    assert same.groups == plan.groups
    assert not bad.parity.holds
    assert bad.parity.runtime_kl_nats > 100 * bad.parity.noise_kl_nats
    assert bad.parity.kl_nats == good.parity.kl_nats, "the artefact itself is whole"
    assert bad.parity.token_match is not None
    assert bad.parity.token_match < 0.9
    assert bad.judgement.verdict == "inconclusive"
    assert "is not what was scored" in bad.judgement.reason
    # The loss is the broken file's, not the artefact's.
    before, after = good.judgement.loss.kl_nats, bad.judgement.loss.kl_nats
    assert before is not None
    assert after is not None
    assert after > 5 * before


@pytest.mark.slow
def test_a_damaged_folder_is_written_anew(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    data = tmp_path / "out" / "onnxruntime" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert proved(place, tmp_path / "out")[1].parity.holds
    assert verify_digests(tmp_path / "out" / "onnxruntime") == ()


CHILD = """
import sys; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from pathlib import Path
import test_target_onnxruntime as t
t.proved(Path({place!r}), Path({out!r}))
"""


@pytest.mark.slow
def test_killed_while_it_deploys_it_goes_on(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(place / "out", out)
    shutil.rmtree(out / "onnxruntime")
    (out / "deployed.json").unlink()
    code = CHILD.format(tests=str(Path(__file__).parent), place=str(place), out=str(out))
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        while not (out / ".onnxruntime.new").exists():
            assert child.poll() is None, "ended before it deployed"
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (out / "onnxruntime").exists()
    found = proved(place, out)[1]
    assert found.parity.holds
    assert (out / "plan.json").read_bytes() == (place / "out" / "plan.json").read_bytes()
    assert not found.reused, "the same artefact on the same data is the same look"
    assert not (out / ".onnxruntime.new").exists()


@pytest.mark.slow
def test_an_encoder_is_judged_in_the_runtime_as_well(place: Path, tmp_path: Path) -> None:
    tiny.encoder().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    shutil.copy(place / "text.jsonl", tmp_path / "text.jsonl")
    report = run(tmp_path, tmp_path / "out", budget="0.2 abs")
    assert report.artefact_form == "onnxruntime"
    assert report.parity.token_match is None
    assert report.parity.holds
