"""The bench of bursts: what it sums up, and that a missed bar is said."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny
from bench.dynamic import __main__ as main
from bench.dynamic import live, scenes
from bench.dynamic.times import Sizes
from bench.dynamic.wide import write_wide
from lowprec.errors import ConfigError
from lowprec.ladder import Ladder, write_ladder
from lowprec.simulate.traces import BURSTS, Lengths
from lowprec.steps.load import load
from tests.ladders import ladder
from tests.test_live import of_run

# Prompts take a third of the time here, and every token waits for those that are read between it and the last.
SCENE = scenes.Scene(
    name="short", faster=1.0, slots=16, lengths=Lengths(prompt=64, output=32), seconds=100.0, ttft_s=1.0, tpot_full=2.0
)


def test_a_scene_on_a_ladder_that_holds_it() -> None:
    with ThreadPoolExecutor(1) as pool:
        found = scenes.run_scene(SCENE, ladder(ratio=0.5), 1, pool)
    assert [s.shape for s in found.shapes] == list(BURSTS)
    assert found.origin == "modelled"
    assert found.meets == (not found.missed)
    for shape in found.shapes:
        assert shape.violations <= 0.1 * shape.static_violations
        assert shape.worst_window_nats <= found.budget_nats
    assert found.calm_requests > 0


def test_missed_bars_are_named() -> None:
    with ThreadPoolExecutor(1) as pool:
        shape = scenes.run_scene(SCENE, ladder(ratio=0.5), 1, pool).shapes[0]
    bad = dataclasses.replace(
        shape,
        change=-0.5,
        ttft_ratio=2.0,
        worst_window_nats=9.0,
        most_switches_in_a_second=3,
        longest_return_s=None,
    )
    missed = scenes._missed((bad,), 1, 0.1)
    assert len(missed) == 6
    assert scenes._missed((shape,), 0, 0.1) == []
    easy = dataclasses.replace(shape, static_violations=0, change=0.0)
    assert scenes._missed((easy,), 0, 0.1) == ["no request was late at static INT8: nothing to win: burst-step"]


def test_where_nothing_was_late_nothing_changed() -> None:
    results = scenes._burst(SCENE, SCENE.setting(ladder(ratio=0.5)), "burst-step", 0)
    ours = results.result("controller")
    assert scenes.change_of([ours], 0) == 0.0
    assert scenes.change_of([dataclasses.replace(ours, violations=3)], 4) == -0.25


def test_other_objectives_leave_the_recorded_figures_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ladder(ladder(ratio=0.5), tmp_path / "ladder.json")
    monkeypatch.setattr(main, "OBJECTIVES", tmp_path / "objectives.json")
    monkeypatch.setattr(main, "DYNAMIC", tmp_path / "none" / "dynamic.json")
    monkeypatch.setattr(main, "SCENES", (SCENE,))
    monkeypatch.setattr(main, "ProcessPoolExecutor", ThreadPoolExecutor)
    given = ["bursts", "--ladder", str(tmp_path / "ladder.json"), "--seeds", "1", "--ttft", "4", "--ttft", "1"]
    result = CliRunner().invoke(main.app, given)
    record = json.loads((tmp_path / "objectives.json").read_text())
    assert [scene["ttft_s"] for scene in record["scenes"]] == [4.0, 1.0]
    assert result.exit_code == int(any(scene["missed"] for scene in record["scenes"]))
    for scene in record["scenes"]:
        for shape in scene["shapes"]:
            assert shape["oracle_change"] == shape["oracle_violations"] / max(1, shape["static_violations"]) - 1


def test_a_ladder_that_does_not_span_a_burst_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the bottom serves 1\.\d+ times what the top does with 16 slots"):
        SCENE.setting(ladder(ratio=0.9))


def test_a_quicker_machine_is_modelled() -> None:
    found = scenes.quicker(ladder(), 10.0)
    assert found.rungs[0].pass_us("decode", 4) == pytest.approx(ladder().rungs[0].pass_us("decode", 4) / 10)
    assert not any(rung.is_measured for rung in found.rungs)
    assert "10 times as fast" in found.device


def quick(whole: Ladder) -> Ladder:
    """The ladder of a machine on which passes take next to nothing, as those of a tiny model do."""
    return scenes.quicker(whole, 100.0)


def test_live_arrivals_are_the_traces_and_everything_is_counted(tmp_path: Path) -> None:
    made = of_run(tmp_path)
    write_ladder(quick(made), tmp_path / "ladder.json")
    assert live.run_of(tmp_path, tmp_path / "work") == tmp_path
    scene = live.LiveScene(seconds=3.0, seeds=2, slots=3, lengths=Lengths(prompt=6, output=6))
    found = live.measure(tmp_path, scene)
    assert found.rungs == ("r0", "r1", "r2")
    assert 0 < found.base_per_s < found.top_per_s < found.peak_per_s
    for fixed, ours in found.results:
        assert fixed.policy == "static r2"
        assert ours.policy == "controller"
        assert fixed.requests == ours.requests > 0
        assert sum(t.tokens for t in fixed.tokens) == sum(t.tokens for t in ours.tokens)
        assert [t.tokens for t in fixed.tokens[:2]] == [0, 0], "nothing but the top"
        assert fixed.loss_nats == pytest.approx(made.rungs[-1].loss_upper)
        assert 0 < fixed.ttft_s.p50 <= fixed.ttft_s.p95
        assert 0 < ours.busy <= 1
        assert ours.worst_window_nats <= found.budget_nats
        assert fixed.return_s is None
    assert json.loads(json.dumps(dataclasses.asdict(found)))["model_digest"] == made.model_digest


def test_a_wide_model_loads_with_its_tokenizer(tmp_path: Path) -> None:
    sizes = Sizes(blocks=2, hidden=64, intermediate=128, heads=4, kv_heads=2)
    count = write_wide(tiny.folder(tmp_path / "like", "llama"), tmp_path / "wide", sizes)
    model = load(tmp_path / "wide")
    assert sum(p.numel() for p in model.module.parameters()) == count
    assert count - sizes.parameters() == 2 * 64 * len(model.tokenizer) + 5 * 64, "embedding, head and norms"


def test_a_live_bench_that_shows_nothing_says_so() -> None:
    results = scenes._burst(SCENE, SCENE.setting(ladder(ratio=0.5)), "burst-step", 0)
    ours, fixed = results.result("controller"), results.result("static r4")
    assert live._missed([(fixed, ours)], -0.95, 3.0, 0.2, 1.5) == []
    calm = dataclasses.replace(fixed, violations=0)
    slow = dataclasses.replace(ours, most_switches_in_a_second=3, worst_window_nats=0.3, return_s=None)
    missed = live._missed([(calm, slow)], 0.0, 1.0, 0.2, 1.1)
    assert len(missed) == 6
    assert "the bottom serves 1.10 times what the top does" in missed[0]
    assert "no request was late" in missed[1]
    assert "back at the top within 10 s: ['never']" in missed[-1]
