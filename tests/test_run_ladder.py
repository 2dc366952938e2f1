"""calibrate --ladder: whole runs on a tiny model, what is written, resumed, served, simulated, and refused."""

import dataclasses
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lowprec
import tiny
from lowprec import cli
from lowprec.api import begin, optimize
from lowprec.artifacts.digests import verify_digests
from lowprec.artifacts.loading import load_artefact, read_back
from lowprec.artifacts.nested import load_nested, read_nested, stored_digest
from lowprec.errors import UnsupportedError
from lowprec.formats.nested import LEVEL_NAMES
from lowprec.ladder import PassTime, read_ladder
from lowprec.pipeline import ladder as stage
from lowprec.pipeline import levels
from lowprec.pipeline.mixes import OF_A_MIX, Mixes, lower_level
from lowprec.records import CostSample, Workload
from lowprec.report import report_from_json
from lowprec.report.html import report_html
from lowprec.report.terminal import print_summary
from lowprec.results import Report
from lowprec.settings import Settings
from lowprec.steps.load import wrap
from lowprec.targets.passes import level_name, measure_passes, time_levels

pytestmark = pytest.mark.slow


class Cut(Exception):
    """Ends a run in the middle."""


def cut(*_: Any, **__: Any) -> Any:
    raise Cut


def timed(fmt: str, n: int, k: int, ms: Sequence[int]) -> list[CostSample]:
    """INT4 takes two thirds of INT8's time: what is tested here hangs on no machine."""
    return [
        CostSample(
            op="linear", m=m, n=n, k=k, scheme=level_name(fmt, level), kernel="none", p20_us=us, p50_us=us, p80_us=us,
            bytes=n * k, origin="measured",
        )
        for m in ms
        for level, us in ((4, n * k / 1e3), (8, n * k / 667))
    ]  # fmt: skip


def passed(model: Any, set_rung: Any, rungs: int, *, batches: Any, prompts: Any, **_: Any) -> list[Any]:
    """Each rung takes a tenth longer than the one below."""

    def times(sizes: Sequence[int], us: float) -> tuple[PassTime, ...]:
        return tuple(PassTime(tokens=n, p20_us=us * n, p50_us=us * n, p80_us=us * n, origin="measured") for n in sizes)

    for rung in range(rungs):
        set_rung(rung)
    return [{"decode": times(batches, 500.0 * 1.1**r), "prefill": times(prompts, 100.0)} for r in range(rungs)]


def run(place: Path, out: Path, **changed: Any) -> Report:
    settings: dict[str, Any] = {
        "budget": "30%",
        "objective": "bytes",
        "embeddings": False,
        "effort": tiny.EFFORT,
        "data": [place / "text.jsonl"],
        "workload": Workload(prompt_tokens=32, output_tokens=8),
        "ladder": True,
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(levels, "time_levels", timed)
        patched.setattr(stage, "measure_passes", passed)
        return optimize(place / "model", out=out, **settings | changed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its text and a finished run with a ladder."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("ladder")
    tiny.folder(path / "model", "llama-untied")
    tiny.text(path / "text.jsonl")
    run(path, path / "out")
    return path


def test_the_ladder_lies_beside_the_plan(place: Path) -> None:
    out = place / "out"
    found = read_ladder(out / "ladder.json", stored_digest(out / "nested"))
    assert 3 <= len(found.rungs) <= stage.RUNGS
    assert all(rung.is_measured for rung in found.rungs)
    assert [group for group, _ in found.rungs[0].levels] == [
        group for group, _ in json.loads((out / "plan.json").read_text())["record"]["groups"]
    ]
    losses = [(r.loss_lower, r.loss_nats, r.loss_upper) for r in found.rungs]
    assert losses == sorted(losses, reverse=True)
    assert all(lower < middle < upper for lower, middle, upper in losses), "each has an interval of its own"
    assert found.loss_tokens > 0
    assert verify_digests(out / "nested") == ()
    assert {what for what, _ in found.notes} == {"times", "losses", "parity"}
    assert "precision at run time" in (out / "nested" / "README.md").read_text()
    assert not list(out.glob("work-*"))


def test_plane_1_is_the_runs_own_rounding(place: Path) -> None:
    """This effort rounds each group by itself: bit for bit what calibration kept."""
    out = place / "out"
    found = read_back(out / "nested")
    inputs = json.loads((out / "calibration.json").read_text())["inputs"]
    with lowprec.RunFolder(out) as folder:
        for group, layers in read_ladder(out / "ladder.json").layers:
            kept = folder.read_solved(f"{group}@{found[layers[0]].format}", inputs)
            assert kept is not None
            for layer in layers:
                assert torch.equal(found[layer].codes, kept[layer].codes)
                assert torch.equal(found[layer].scale, kept[layer].scale)


def test_each_rung_of_the_loaded_model_is_what_its_levels_say(place: Path) -> None:
    out = place / "out"
    made = read_ladder(out / "ladder.json")
    model, tokenizer, switch = load_nested(out / "nested", torch.float32, ladder=made)
    dense, _ = load_artefact(out / "nested")
    nested, ids, seen = read_nested(out / "nested"), tiny.batch(), []
    for index, rung in enumerate(made.rungs):
        level = {group: LEVEL_NAMES[name] for group, name in rung.levels}
        for group, layers in made.layers:
            for layer in layers:
                dense.get_submodule(layer).weight.data = nested[layer].dequantize(level[group])
        switch.set(index)
        with torch.no_grad():
            found, expected = model(ids).logits, dense(ids).logits
        assert float((found - expected).norm() / expected.norm()) < 1e-3
        seen.append(found)
    assert tokenizer is not None
    assert not torch.equal(seen[0], seen[-1])


def test_it_is_served_and_simulated(place: Path, tmp_path: Path) -> None:
    out = place / "out"
    top = read_ladder(out / "ladder.json").top
    live = lowprec.serve(out, ttft_s=5.0, tpot_s=1.0, nats_per_token=0.5, slots=2)
    answer = live.generate("w1 w2 w3", 5, "high", stop=())
    assert (len(answer.tokens), answer.rungs) == (5, (top,) * 5)
    with pytest.raises(SystemExit) as ended:
        cli.app(["simulate", "--ladder", str(out / "ladder.json"), "--out", str(tmp_path), "--seconds", "5"])
    assert ended.value.code == 0
    assert (tmp_path / "simulation.html").exists()


def test_the_report_shows_the_rungs(place: Path) -> None:
    out = place / "out"
    text = (out / "report.json").read_text()
    report = report_from_json(text)
    assert report.ladder is not None
    made = read_ladder(out / "ladder.json")
    assert [r.name for r in report.ladder.rungs] == [r.name for r in made.rungs]
    assert report.ladder.model_digest == made.model_digest
    assert (report.ladder.rungs[0].low_share, report.ladder.rungs[-1].low_groups) == (1.0, 0)
    # Groups of 32 and 64 columns.
    assert 8.0 < report.ladder.bits_per_weight < 9.0
    page = (out / "report.html").read_text()
    assert "Precision at run time" in page
    assert all(f'<th scope="row">{rung.name}</th>' in page for rung in made.rungs)
    assert "lowprec.serve(" in page
    console = Console(width=200, file=io.StringIO(), record=True)
    print_summary(report, console)
    assert f"{len(made.rungs)} rungs, INT4 → INT8" in console.export_text()
    without = dataclasses.replace(report, ladder=None)
    assert "Precision at run time" not in report_html(without)


def copied(place: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    shutil.copytree(place / "out", out)
    return out


def test_a_second_run_makes_nothing_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = copied(place, tmp_path)
    before = (out / "ladder.json").read_bytes()
    monkeypatch.setattr(levels, "nest", cut)
    monkeypatch.setattr(stage, "ratio_bounds", cut)
    monkeypatch.setattr(stage, "load_nested", cut)
    report = run(place, out, budget="20%")
    assert report.ladder is not None
    assert (out / "ladder.json").read_bytes() == before, "another budget has the same rungs"


def test_a_run_that_was_cut_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = copied(place, tmp_path), read_ladder(place / "out" / "ladder.json")
    for name in ("ladder.json", "rungs.json", "nested.json"):
        (out / name).unlink()
    shutil.rmtree(out / "nested")
    bounds, count = stage.ratio_bounds, 0

    def third(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        return cut() if count == 3 else bounds(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(stage, "ratio_bounds", third)
        with pytest.raises(Cut):
            run(place, out)
    assert (out / "nested" / "residual.safetensors").exists()
    assert not (out / "ladder.json").exists()
    count = 3
    with monkeypatch.context() as patched:
        patched.setattr(levels, "nest", cut)
        patched.setattr(stage, "ratio_bounds", third)
        run(place, out)
    assert count - 3 == len(whole.rungs) - 2, "two losses were kept"
    assert read_ladder(out / "ladder.json") == whole


def test_damaged_weights_are_made_again(place: Path, tmp_path: Path) -> None:
    out = copied(place, tmp_path)
    file = out / "nested" / "residual.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    run(place, out)
    assert file.read_bytes() == whole


def test_the_lower_level_is_kept_beside_the_plans_mix(place: Path, tmp_path: Path) -> None:
    """Or a run that was cut while it made the ladder would round the whole model again."""
    settings = Settings(
        out=tmp_path / "out", effort=dataclasses.replace(tiny.EFFORT, compensated=True), embeddings=False,
        objective="bytes", data=(str(place / "text.jsonl"),), schemes=("w4a16", "w8a16"),
    )  # fmt: skip
    with begin(place / "model", settings, "30%") as context:
        scored = lowprec.score(lowprec.prepare(context))
        mixes, low = Mixes(scored), lower_level(scored)
        other = low | {"lm_head": "w8a16"}

        def kept() -> set[str]:
            return {found[1] for name in context.folder.solved_names() if (found := OF_A_MIX.search(name))}

        mixes.kept(low)
        mixes.kept(other)
        assert len(kept()) == 2
        mixes.solved(other, [low])
        assert len(kept()) == 2
        mixes.solved(other)
        assert len(kept()) == 1


def test_where_nothing_is_faster_the_plan_still_gets_its_report(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(place, tmp_path)
    for name in ("ladder.json", "levels.json", "report.json"):
        (out / name).unlink()

    def alike(*given: Any) -> list[CostSample]:
        return [dataclasses.replace(s, p20_us=1.0, p50_us=1.0, p80_us=1.0) for s in timed(*given)]

    settings: dict[str, Any] = {"budget": "30%", "objective": "bytes", "embeddings": False, "effort": tiny.EFFORT}
    monkeypatch.setattr(levels, "time_levels", alike)
    with pytest.raises(UnsupportedError, match="no group's INT4 level is faster than its INT8 level here"):
        optimize(
            place / "model", out=out, data=[place / "text.jsonl"], ladder=True,
            workload=Workload(prompt_tokens=32, output_tokens=8), **settings,
        )  # fmt: skip
    assert report_from_json((out / "report.json").read_text()).ladder is None


def test_a_rung_that_is_not_what_was_scored_stops_the_stage(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(place, tmp_path)
    (out / "ladder.json").unlink()
    monkeypatch.setattr(stage, "LARGEST_KL", 1e-6)
    with pytest.raises(lowprec.LowprecError, match="what runs would not lose what the rung says"):
        run(place, out)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"target": "onnxruntime"}, "target onnxruntime cannot switch its precision"),
        ({"device": "h100"}, "no ladder can be made for device 'h100'"),
        ({"schemes": ["int8"]}, "no group that could switch\n.*let --schemes include int4"),
    ],
)
def test_what_cannot_switch_is_refused_before_anything_is_measured(
    place: Path, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        run(place, tmp_path / "out", **changed)
    assert not (tmp_path / "out" / "calibration.json").exists()


def test_an_encoder_has_no_ladder(tmp_path: Path) -> None:
    model = wrap(tiny.encoder(), lambda module, batch: module(batch.ids)[0][:, 0], tokenizer=tiny.tokenizer())
    settings = Settings(out=tmp_path / "out", ladder=True, effort=tiny.EFFORT)
    with pytest.raises(UnsupportedError, match="cannot have a ladder"), begin(model, settings, "0.05 abs"):
        pass


def test_levels_and_passes_are_measured_here(place: Path) -> None:
    """With real clocks: what is asked for comes back, and the rungs took turns."""
    samples = time_levels("int4-g64", 64, 128, (1, 8))
    assert [(s.scheme, s.m) for s in samples] == [
        (level_name("int4-g64", level), m) for m in (1, 8) for level in (4, 8)
    ]
    assert all(0 < s.p20_us <= s.p50_us <= s.p80_us for s in samples)
    assert [s.bytes for s in samples[:2]] == [64 * (64 + 2 * 2), round(64 * (128 + 2 * 2 + 0.5))]
    made = read_ladder(place / "out" / "ladder.json")
    model, _, switch = load_nested(place / "out" / "nested", ladder=made)
    order: list[int] = []

    def set_rung(rung: int) -> None:
        order.append(rung)
        switch.set(rung)

    count = len(made.rungs)
    found = measure_passes(model, set_rung, count, batches=(1, 2), prompts=(4, 8), context=6, repeats=2)
    assert len(found) == count
    for times in found:
        assert [t.tokens for t in times["decode"]] == [1, 2]
        assert [t.tokens for t in times["prefill"]] == [4, 8]
        assert all(t.origin == "measured" and 0 < t.p20_us <= t.p50_us <= t.p80_us for t in times["decode"])
    assert order[: 1 + 2 * count] == [count - 1, *range(count), *range(1, count), 0]
