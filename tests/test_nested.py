"""Nested weights: the format, the residual's solver, and what is written and read back."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowprec
from lowprec import cli
from lowprec.artifacts.compressed_tensors import write_artefact
from lowprec.artifacts.digests import verify_digests, write_digests
from lowprec.artifacts.loading import load_artefact
from lowprec.artifacts.nested import (
    RESIDUAL,
    add_residual,
    is_nested,
    load_nested,
    pack_ratios,
    read_nested,
    stored_bits_per_weight,
    unpack_ratios,
    with_residual,
)
from lowprec.artifacts.own_form import write_own_form
from lowprec.artifacts.safetensors_io import load_tensors, tensor_entries, write_safetensors
from lowprec.errors import ArtifactError, ConfigError, ModelError, UnsupportedError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight, scheme_named
from lowprec.formats.nested import (
    RATIOS,
    NestedWeight,
    base_reason,
    bits_per_weight,
    refuses,
    require_level,
    residual_bounds,
)
from lowprec.nesting import _check_belongs
from lowprec.runtime.convert import linear_layers
from lowprec.solvers import SOLVERS
from lowprec.solvers.gptq import output_error
from lowprec.solvers.residual import fit_residual
from lowprec.steps.stream import Stream
from tests import tiny
from tests.test_solvers import Layer, layer, trace_error

BASES = ("int4-g128", "int4-g64", "int4-g32", "int4-g64-asym", "int4-g128-asym")


def based(name: str = "int4-g64", solver: str = "gptq", seed: int = 0) -> tuple[Layer, QuantizedWeight]:
    found = layer(seed=seed)
    return found, SOLVERS[solver].solve(found.w, WEIGHT_FORMATS[name], found.statistics)


@pytest.mark.parametrize("solver", ["rtn", "gptq", "two-sided"])
@pytest.mark.parametrize("name", BASES)
def test_level_4_is_the_base_and_level_8_is_nearly_the_weight(name: str, solver: str) -> None:
    (w, statistics), base = based(name, solver)
    given = base.codes.clone(), base.scale.clone()
    found = fit_residual(w, base, statistics)
    assert refuses(found) is None
    assert found.base is base
    assert torch.equal(base.codes, given[0])
    assert torch.equal(base.scale, given[1])
    assert torch.equal(found.dequantize(4), base.dequantize())
    # By hand: what plane 1 stands for, and the residual in steps of s / m.
    step = (base.scale.double() / found.ratio).repeat_interleave(found.group_size, 1)
    by_hand = base.dequantize().double() + found.residual.double() * step
    torch.testing.assert_close(found.dequantize(8).double(), by_hand, rtol=1e-5, atol=1e-6)
    fine, coarse = (trace_error(w, as_weight(found, level), statistics.hessian) for level in (8, 4))
    assert fine < 0.1 * coarse
    again = fit_residual(w, base, statistics)
    assert torch.equal(again.residual, found.residual)


def as_weight(found: NestedWeight, level: int) -> Any:
    """A level as something that has a dense weight."""

    class Dense:
        def dequantize(self) -> Tensor:
            return found.dequantize(level)

    return Dense()


@pytest.mark.parametrize("name", BASES)
def test_an_error_state_of_its_own_beats_plain_rounding_and_int8(name: str) -> None:
    (w, statistics), base = based(name)
    fitted = output_error(w, as_weight(fit_residual(w, base, statistics), 8), statistics.hessian)
    plain = output_error(w, as_weight(fit_residual(w, base, None), 8), statistics.hessian)
    int8 = output_error(w, SOLVERS["rtn"].solve(w, WEIGHT_FORMATS["int8"], None), statistics.hessian)
    assert fitted < 0.5 * plain
    assert fitted < 1.1 * int8


def test_a_base_far_from_its_weights_is_within_reach() -> None:
    """Learned rounding takes the other of two codes for many weights: residuals of a whole step."""
    (w, statistics), base = based()
    other = torch.rand(base.codes.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    moved = (base.codes + torch.where(torch.rand(base.codes.shape) < 0.5, 1, -1).to(torch.int8)).clamp(-8, 7)
    far = QuantizedWeight(format=base.format, codes=torch.where(other, moved, base.codes), scale=base.scale)
    found = fit_residual(w, far, statistics)
    assert torch.equal(found.dequantize(4), far.dequantize())
    assert trace_error(w, as_weight(found, 8), statistics.hessian) < 0.01 * trace_error(w, far, statistics.hessian)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_residual_gives_a_code_that_fits_int8(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(BASES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    shape = (3, 256)
    w = torch.randn(shape, generator=generator) * 10.0 ** data.draw(st.integers(-6, 4))
    w *= 1 + 50 * (torch.rand(shape, generator=generator) < 0.02)
    base = SOLVERS["rtn"].solve(w, WEIGHT_FORMATS[name], None)
    found = fit_residual(w, base, None)
    assert refuses(found) is None
    codes = found.codes().to(torch.int32)
    assert -128 <= int(codes.min()) <= int(codes.max()) <= 127
    middle = base.codes.to(torch.int32) * found.ratio.repeat_interleave(found.group_size, 1)
    assert torch.equal(codes - middle, found.residual.to(torch.int32))


def test_ratio_8_always_has_a_residual() -> None:
    least, most = residual_bounds(torch.arange(-15, 16), torch.tensor(8))
    assert bool((least <= most).all())
    least, most = residual_bounds(torch.tensor(15), torch.tensor(12))
    assert bool((least > most).all()), "12 does not fit beside code 15, so it is never taken there"


def test_parts_that_do_not_fit_are_refused() -> None:
    (w, statistics), base = based()
    good = fit_residual(w, base, statistics)

    def reason(**changes: Tensor) -> str | None:
        return refuses(NestedWeight(**({"base": base, "residual": good.residual, "ratio": good.ratio} | changes)))

    assert reason() is None
    assert "residuals torch.int8 (48, 255)" in str(reason(residual=good.residual[:, 1:]))
    assert "residuals outside [-8, 7]" in str(reason(residual=good.residual + 16))
    assert "ratios other than (4, 6, 8, 12)" in str(reason(ratio=good.ratio + 1))
    widest = torch.full_like(base.codes, 15)
    asymmetric = QuantizedWeight(format="int4-g64-asym", codes=widest, scale=base.scale)
    twelve = torch.full_like(good.ratio, 12)
    assert "do not fit int8" in str(refuses(NestedWeight(base=asymmetric, residual=good.residual, ratio=twelve)))
    assert "not on int8" in str(base_reason("int8"))
    assert "not on int3-g64" in str(base_reason("int3-g64"))
    assert "not on int4-g64-rows25" in str(base_reason("int4-g64-rows25"))
    assert "did you mean 'int4-g64'" in str(base_reason("int4-g63"))
    with pytest.raises(ConfigError, match="level 5 does not exist: nested weights have the levels 4 and 8"):
        require_level(5)
    with pytest.raises(ConfigError, match="level 6 does not exist"):
        good.dequantize(6)
    with pytest.raises(ConfigError, match=r"the weight is \(47, 256\), its INT4 codes \(48, 256\)"):
        fit_residual(w[1:], base, statistics)
    with pytest.raises(UnsupportedError, match="not on int8"):
        fit_residual(w, SOLVERS["rtn"].solve(w, WEIGHT_FORMATS["int8"], None), statistics)
    with pytest.raises(ModelError, match="not finite"):
        fit_residual(w.clone().fill_(torch.nan), base, statistics)
    smoothed = QuantizedWeight(
        format=base.format, codes=base.codes, scale=base.scale, exponents=torch.zeros(256, dtype=torch.int8)
    )
    with pytest.raises(ConfigError, match="without smoothing"):
        fit_residual(w, smoothed, statistics)


@pytest.mark.parametrize(("name", "most"), [("int4-g128", 8.2), ("int4-g128-asym", 8.2), ("int4-g64", 8.35),
                                            ("int4-g64-asym", 8.35)])  # fmt: skip
def test_size(name: str, most: float) -> None:
    assert 8.0 < bits_per_weight(name, 1024) <= most


@given(count=st.integers(1, 70))
def test_ratios_are_packed_exactly(count: int) -> None:
    ratio = torch.tensor(RATIOS, dtype=torch.int8)[torch.randint(0, 4, (2, count))]
    packed = pack_ratios(ratio)
    assert packed.shape == (-(-2 * count // 4),)
    assert torch.equal(unpack_ratios(packed, 2, count), ratio)


def solved_llama(fmt: str = "int4-g32") -> tuple[Any, dict[str, QuantizedWeight], dict[str, NestedWeight]]:
    """A model, its linear layers (the head aside) in INT4, and both planes."""
    model = tiny.decoder("llama-untied")
    model.config.architectures = [type(model).__name__]
    layers = {name: m for name, m in linear_layers(model).items() if name != "lm_head"}
    solved = {name: tiny.rounded(m.weight.detach(), fmt) for name, m in layers.items()}
    nested = {name: fit_residual(m.weight.detach().float(), solved[name], None) for name, m in layers.items()}
    return model, solved, nested


def write(path: Path, fmt: str = "int4-g32") -> tuple[Any, dict[str, QuantizedWeight], dict[str, NestedWeight]]:
    model, solved, nested = solved_llama(fmt)
    schemes = dict.fromkeys(solved, scheme_named(fmt.replace("int4", "w4a16")))

    def finish(folder: Path) -> None:
        write_digests(folder)

    finished = with_residual(nested, finish)
    if fmt.endswith("-asym"):
        write_own_form(
            path, module=model, name="tiny", revision="0" * 16, solved=solved, schemes=schemes, finish=finished
        )
    else:
        write_artefact(
            path, config=model.config, tensors=model.state_dict(), solved=solved, schemes=schemes, finish=finished
        )
    return model, solved, nested


@pytest.mark.parametrize("fmt", ["int4-g32", "int4-g64", "int4-g32-asym"])
def test_what_is_written_is_what_is_read(fmt: str, tmp_path: Path) -> None:
    _, solved, nested = write(tmp_path / "a", fmt)
    assert is_nested(tmp_path / "a")
    assert verify_digests(tmp_path / "a") == ()
    found = read_nested(tmp_path / "a")
    assert found.keys() == nested.keys()
    for name, weight in found.items():
        assert torch.equal(weight.base.codes, solved[name].codes)
        assert torch.equal(weight.base.scale, solved[name].scale)
        assert torch.equal(weight.residual, nested[name].residual)
        assert torch.equal(weight.ratio, nested[name].ratio)
    expected = sum(bits_per_weight(fmt, w.residual.shape[1]) * w.residual.numel() for w in nested.values())
    expected /= sum(w.residual.numel() for w in nested.values())
    # What compressed-tensors says of shapes, and zero points that fill words, are beside it on so small a model.
    assert stored_bits_per_weight(tmp_path / "a") == pytest.approx(expected, abs=0.1)


def test_the_folder_is_an_ordinary_int4_artefact_for_everyone_else(tmp_path: Path) -> None:
    model, solved, _ = write(tmp_path / "a")
    alone = tmp_path / "b"
    write_artefact(
        alone, config=model.config, tensors=model.state_dict(), solved=solved,
        schemes=dict.fromkeys(solved, scheme_named("w4a16-g32")),
    )  # fmt: skip
    assert (tmp_path / "a/model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    ids = tiny.batch()
    with torch.no_grad():
        one, two = (load_artefact(path)[0](ids).logits for path in (tmp_path / "a", alone))
    assert torch.equal(one, two)


def test_one_plane_has_no_level_8(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / RESIDUAL).unlink()
    with pytest.raises(ArtifactError, match=r"one plane, so level 4 alone: residual.safetensors is missing; copy it"):
        read_nested(tmp_path / "a")
    with pytest.raises(ArtifactError, match="one plane"):
        load_nested(tmp_path / "a")
    assert verify_digests(tmp_path / "a") == (f"{RESIDUAL}: missing",)


def test_a_residual_of_other_weights_is_refused(tmp_path: Path) -> None:
    _, _, nested = write(tmp_path / "a")
    model = tiny.decoder("llama-untied", seed=1)
    model.config.architectures = [type(model).__name__]
    solved = {name: tiny.rounded(m.weight.detach(), "int4-g32") for name, m in linear_layers(model).items()}
    schemes = dict.fromkeys(solved, scheme_named("w4a16-g32"))
    other = tmp_path / "b"
    write_artefact(other, config=model.config, tensors=model.state_dict(), solved=solved, schemes=schemes)
    shutil.copy(tmp_path / "a" / RESIDUAL, other)
    with pytest.raises(ArtifactError, match="does not belong to the INT4 weights beside it"):
        read_nested(other)
    with pytest.raises(ArtifactError, match="does not hold the INT4 codes and scales of"):
        add_residual(other, nested)


def test_damage_is_found(tmp_path: Path) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / RESIDUAL
    whole, (mapped, metadata) = file.read_bytes(), load_tensors(file)
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    del mapped

    def rewritten(changes: dict[str, Tensor | None], words: dict[str, str]) -> None:
        kept = {k: v for k, v in (tensors | changes).items() if v is not None}
        with open(file, "wb") as out:
            write_safetensors(out, tensor_entries(kept), metadata | words)

    name = next(k for k in tensors if k.endswith("q_proj.residual"))
    rewritten({name: None}, {})
    with pytest.raises(ArtifactError, match=f"has no tensor {name}"):
        read_nested(tmp_path / "a")
    rewritten({name: tensors[name][:, :-1].contiguous()}, {})
    with pytest.raises(ArtifactError, match=f"has no tensor {name} in torch.int32"):
        read_nested(tmp_path / "a")
    rewritten({}, {"form": "nested-int2"})
    with pytest.raises(ArtifactError, match="'nested-int2', this version reads nested-int4-int8"):
        read_nested(tmp_path / "a")
    rewritten({}, {"layers": "["})
    with pytest.raises(ArtifactError, match="is no second plane"):
        read_nested(tmp_path / "a")
    for layers in ("5", "[]", "null", "[5]", '"q_proj"', "{}"):
        rewritten({}, {"layers": layers})
        with pytest.raises(ArtifactError, match=r"is no second plane of nested weights: its layers are .*, not a list"):
            read_nested(tmp_path / "a")
    rewritten({}, {"layers": '["nowhere"]'})
    with pytest.raises(ArtifactError, match="has a residual of nowhere"):
        read_nested(tmp_path / "a")
    file.write_bytes(whole[:-3])
    with pytest.raises(ArtifactError, match="truncated"):
        read_nested(tmp_path / "a")
    file.write_bytes(whole)
    assert read_nested(tmp_path / "a")


def test_parts_that_are_none_are_not_written() -> None:
    _, _, nested = solved_llama()
    name, weight = next(iter(nested.items()))
    bad = NestedWeight(base=weight.base, residual=weight.residual, ratio=weight.ratio + 1)
    with pytest.raises(ConfigError, match=f"{name} cannot be stored in two levels: it has ratios"):
        with_residual({name: bad})


def test_a_loaded_artefact_runs_at_both_levels(tmp_path: Path) -> None:
    _, _, nested = write(tmp_path / "a")
    model, tokenizer, switch = load_nested(tmp_path / "a", torch.float32)
    dense, _ = load_artefact(tmp_path / "a")
    ids = tiny.batch()
    assert tokenizer is None
    for level in (8, 4):
        for name, weight in nested.items():
            dense.get_submodule(name).weight.data = weight.dequantize(level)
        switch.set((4, 8).index(level))
        with torch.no_grad():
            found, expected = model(ids).logits, dense(ids).logits
        assert float((found - expected).norm() / expected.norm()) < 1e-3
    with pytest.raises(ConfigError, match="level 2 does not exist"):
        load_nested(tmp_path / "a", rungs=(2, 8))


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its text, and its INT4 artefact."""
    place = tmp_path_factory.mktemp("nest")
    tiny.folder(place / "model", "llama-untied")
    tiny.text(place / "text.jsonl", documents=480)
    model = tiny.decoder("llama-untied")
    model.config.architectures = [type(model).__name__]
    solved = {name: tiny.rounded(m.weight.detach(), "int4-g32") for name, m in linear_layers(model).items()}
    schemes = dict.fromkeys(solved, scheme_named("w4a16-g32"))

    def finish(folder: Path) -> None:
        write_digests(folder)

    write_artefact(
        place / "int4", config=model.config, tensors=model.state_dict(), solved=solved, schemes=schemes,
        finish=finish,
    )  # fmt: skip
    return place


def test_a_finished_artefact_gets_a_second_level(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(artefact / "text.jsonl")
    made = lowprec.nest_artefact(
        artefact / "int4", artefact / "model", artefact / "two", data=[text], calibration_tokens=1024
    )
    assert len(made.layers) == len(linear_layers(tiny.decoder("llama-untied")))
    assert made.single == ()
    for file in (artefact / "int4").iterdir():
        if file.name != "digests.json":
            assert (artefact / "two" / file.name).read_bytes() == file.read_bytes()
    assert verify_digests(artefact / "two") == ()
    found = read_nested(artefact / "two")
    model = tiny.decoder("llama-untied")
    for name, weight in found.items():
        lost = (weight.dequantize(8) - model.get_submodule(name).weight.float()).norm()
        assert lost < 0.2 * (weight.dequantize(4) - model.get_submodule(name).weight.float()).norm()
    with pytest.raises(ArtifactError, match="has two levels already"):
        lowprec.nest_artefact(artefact / "two", artefact / "model", artefact / "three")
    with pytest.raises(SystemExit) as ended:
        cli.app(["nest", str(artefact / "int4"), "--model", str(artefact / "model"), "--out", str(artefact / "cli"),
                 "--data", text])  # fmt: skip
    assert ended.value.code == 0
    assert "layers of two levels, 8." in capsys.readouterr().out
    assert read_nested(artefact / "cli").keys() == found.keys()


def test_a_layer_of_zeros_belongs_to_its_own_model_alone() -> None:
    up = tiny.decoder("llama-untied").model.layers[0].mlp.up_proj
    stream = cast(Stream, SimpleNamespace(weighted={"up_proj": up}))
    others = tiny.rounded(up.weight.detach(), "int4-g32")
    torch.nn.init.zeros_(up.weight)
    own = tiny.rounded(up.weight.detach(), "int4-g32")
    _check_belongs(stream, {"up_proj": own}, Path("artefact"))
    with pytest.raises(ModelError, match="up_proj: the codes in artefact are inf% of the weight's norm away from it"):
        _check_belongs(stream, {"up_proj": others}, Path("artefact"))
    assert not fit_residual(up.weight.detach().float(), own, None).dequantize(8).any()


def test_another_model_is_refused(artefact: Path, tmp_path: Path) -> None:
    other = tiny.decoder("llama-untied", seed=3)
    other.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="were made from another model"):
        lowprec.nest_artefact(
            artefact / "int4", tmp_path, tmp_path / "out", data=[str(artefact / "text.jsonl")], calibration_tokens=1024
        )
    assert not (tmp_path / "out").exists()
