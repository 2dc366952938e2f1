"""The OpenVINO target: its products are those that were scored, and its graph is the model's."""

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import openvino
import openvino.opset13 as ops
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lowprec
import tiny
from lowprec.artifacts.own_form import write_own_form
from lowprec.artifacts.source import weights_digest
from lowprec.errors import ArtifactError, ConfigError, ModelError, UnsupportedError
from lowprec.formats import SCHEMES, WEIGHT_FORMATS, resolve, scheme_named
from lowprec.onnx.session import left_padded
from lowprec.openvino import deploy
from lowprec.openvino.form import block_of
from lowprec.openvino.layers import block_for
from lowprec.openvino.module import MODEL, OpenVinoModule
from lowprec.targets import TARGETS, RuntimeTarget
from lowprec.targets.exporting import export_for

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
TOLERANCE = 1e-4
SCORED = ("w4a8-block64-g64", "w4a8-block64-g128", "w8a8-block64", "bf16")
SLOW = pytest.mark.slow


def tiny_artefact(path: Path) -> Path:
    """An artefact in lowprec's own form, one product of it as OpenVINO computes it."""
    model, scheme = tiny.decoder().to(torch.bfloat16), scheme_named("w4a8-block64-g64")
    layer = "model.layers.0.mlp.down_proj"
    weight = tiny.rounded(model.get_submodule(layer).weight.detach(), str(scheme.weight))
    write_own_form(
        path, module=model, name="org/m", revision=weights_digest(model), solved={layer: weight},
        schemes={layer: scheme}, tokenizer=tiny.tokenizer(), generation_config=None,
    )  # fmt: skip
    return path


def target() -> Any:
    found = TARGETS["openvino"]
    assert isinstance(found, RuntimeTarget), "also where packages are missing"
    return found


@pytest.mark.parametrize("name", SCORED[:3])
@pytest.mark.parametrize(("n", "k", "m"), [(96, 128, 1), (24, 1536, 5), (64, 256, 33)])
def test_a_product_is_what_was_scored(name: str, n: int, k: int, m: int) -> None:
    scheme = scheme_named(name)
    torch.manual_seed(n + k)
    weight = tiny.rounded(torch.randn(n, k), str(scheme.weight))
    x = torch.randn(m, k)
    x[0, 3] = 40.0  # An outlier, which only its block may feel.
    assert target().layer_error(scheme, weight, x) < 1e-6
    unrounded = dataclasses.replace(scheme, activation=None)
    assert target().layer_error(unrounded, weight, x) > 1e-4, "the error sees how inputs are rounded"


def test_what_openvino_would_compute_otherwise_is_refused() -> None:
    for name, scheme in SCHEMES.items():
        fits = scheme.weight is None or (
            scheme.weight in WEIGHT_FORMATS and WEIGHT_FORMATS[scheme.weight].fits(256) is None
        )
        if fits:
            assert (target().supports(scheme, 64, 256) is None) == (
                scheme.weight is None or scheme.activation == "int8-block64"
            ), name
    assert "in blocks of one size" in target().supports(scheme_named("w4a16"), 64, 256)
    assert "FP8 in float32" in target().supports(scheme_named("w8a8-fp8"), 64, 256)
    assert "do not divide 96" in target().supports(scheme_named("w8a8-block64"), 64, 96)


def test_groups_of_sixty_four_where_larger_ones_do_not_fit() -> None:
    assert resolve(scheme_named("w4a8-block64"), 576).name == "w4a8-block64-g64"
    assert resolve(scheme_named("w4a8-block64"), 1536).name == "w4a8-block64-g128"
    with pytest.raises(UnsupportedError, match=r"\(128, 64\) divides 96"):
        resolve(scheme_named("w4a8-block64"), 96)


def test_times_are_of_every_supported_scheme_and_measured() -> None:
    clock = type(target())(seconds_per_sample=0.01)
    samples = clock.time([(64, 128)], [scheme_named(n) for n in ("bf16", "w8a8-block64", "w4a16")], [1, 8])
    assert {(s.scheme, s.m) for s in samples} == {(n, m) for n in ("bf16", "w8a8-block64") for m in (1, 8)}
    assert all(0.0 < s.p20_us <= s.p50_us <= s.p80_us and s.origin == "measured" for s in samples)


@pytest.mark.parametrize(
    ("version", "said"), [(None, "openvino is missing"), ("2024.6.0", "openvino is 2024.6.0, 2025.1 is needed")]
)
def test_a_missing_or_old_package_is_named(version: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    with pytest.raises(ConfigError, match=said):
        target().require()


@pytest.fixture(
    scope="module", params=["llama", "gpt2", *(pytest.param(name, marks=SLOW) for name in ("qwen3", "gemma3"))]
)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, OpenVinoModule]:
    """A model in torch, and its unquantised form in OpenVINO."""
    model = tiny.decoder(request.param).float()
    place = tmp_path_factory.mktemp("openvino") / "model"
    written = target().deploy_unquantised(model, place)
    assert written.notes == (), "attention was found"
    return model, target().load(place, 0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 109), min_size=1, max_size=5), cuts=st.lists(st.integers(1, 108), max_size=4))
@example(lengths=[101, 3, 100, 50, 1], cuts=[100])
@example(lengths=[40, 33], cuts=[1, 2, 20, 39])
def test_any_batch_past_padding_and_chunks(
    decoder: tuple[Any, OpenVinoModule], lengths: list[int], cuts: list[int]
) -> None:
    model, found = decoder
    rows = [tiny.batch(1, length, seed=i)[0] for i, length in enumerate(lengths)]
    ids, mask = left_padded(rows)
    width = ids.shape[1]
    ends = [*sorted({cut for cut in cuts if 0 < cut < width}), width]
    past, parts = None, []
    for start, end in zip([0, *ends], ends, strict=False):
        answer = found(ids[:, start:end], mask[:, :end], past_key_values=past, use_cache=True)
        past = answer.past_key_values
        parts.append(answer.logits)
    whole = torch.cat(parts, 1)
    for row, logits in zip(rows, whole, strict=True):
        with torch.no_grad():
            alone = model(input_ids=row[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[-len(row) :], alone, rtol=0, atol=TOLERANCE)


def test_a_text_starts_afresh_and_an_old_cache_is_refused(decoder: tuple[Any, OpenVinoModule]) -> None:
    model, found = decoder
    ids = tiny.batch(2, 9)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    first = found(ids[:, :4], use_cache=True)
    found(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    with pytest.raises(ModelError, match="one text at a time"):
        found(ids[:, 4:], past_key_values=first.past_key_values)
    last = found(ids, logits_to_keep=1).logits
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=TOLERANCE)


def test_what_is_no_such_file_says_so(decoder: tuple[Any, OpenVinoModule], tmp_path: Path) -> None:
    decoder[0].config.save_pretrained(tmp_path)
    (tmp_path / MODEL).write_text("<net/>")
    with pytest.raises(ArtifactError, match="does not load in OpenVINO"):
        target().load(tmp_path, 0)


def test_only_its_own_folders_are_replaced(tmp_path: Path) -> None:
    artefact = tiny_artefact(tmp_path / "artefact")
    with pytest.raises(ConfigError, match="the artefact's own folder"):
        export_for("openvino", artefact, artefact)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (tmp_path / "other" / "precious.safetensors").write_text("mine")
    with pytest.raises(ArtifactError, match="no earlier export"):
        export_for("openvino", artefact, tmp_path / "other")
    assert (tmp_path / "other" / "precious.safetensors").read_text() == "mine"
    with pytest.raises(ConfigError, match="takes whole models"):
        export_for("openvino", artefact, tmp_path / "new", module=torch.nn.Linear(2, 2))
    for _ in range(2):
        assert export_for("openvino", artefact, tmp_path / "out").largest_error < 1e-4
    assert (tmp_path / "out" / MODEL).exists()


def test_what_openvino_computes_is_held_to_the_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = deploy.to_openvino

    def broken(model: Any, block: int) -> Any:
        notes = original(model, block)
        norm = next(op for op in model.get_ops() if op.get_type_name() == "Constant" and op.data.size == 64)
        wrong = ops.constant(norm.data * 1.5)
        for reader in norm.output(0).get_target_inputs():
            reader.replace_source_output(wrong.output(0))
        return notes

    monkeypatch.setattr(deploy, "to_openvino", broken)
    with pytest.raises(ArtifactError, match="computes something else in OpenVINO"):
        export_for("openvino", tiny_artefact(tmp_path / "artefact"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@SLOW
def test_a_whole_run_is_judged_as_openvino_runs_it(tmp_path: Path) -> None:
    """The plan keeps to what OpenVINO computes, and its file says how inputs are rounded."""
    tiny.folder(tmp_path / "m")
    report = lowprec.optimize(
        str(tmp_path / "m"),
        out=tmp_path / "run",
        budget="90%",
        target="openvino",
        data=[str(tiny.text(tmp_path / "t.jsonl"))],
        effort=tiny.EFFORT,
    )
    assert report.artefact_form == "openvino"
    assert {g.scheme for g in report.groups} <= {*SCORED, "w4a8-block64"}
    assert report.parity.codes_equal
    folder = Path(report.artefact)
    model = openvino.Core().read_model(str(folder / MODEL))
    assert block_of(model) == ("64" if any(g.scheme != "bf16" for g in report.groups) else "0")


def test_one_rule_of_rounding_for_the_whole_model() -> None:
    rounds, exact = scheme_named("w4a8-block64-g64"), scheme_named("w4a16-g64")
    assert block_for({"a": rounds, "b": rounds}) == 64
    assert block_for({"a": exact}) == block_for({}) == 0
    with pytest.raises(UnsupportedError, match="a: w4a16-g64") as caught:
        block_for({"a": exact, "b": rounds})
    assert "lowprec calibrate --target openvino" in caught.value.reasons[-1]
