"""The bench of bursts: what it sums up, and that a missed bar is said."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.dynamic import scenes
from lowprec.errors import ConfigError
from lowprec.simulate.traces import BURSTS, Lengths
from tests.ladders import ladder

SCENE = scenes.Scene(
    name="short", faster=1.0, slots=16, lengths=Lengths(prompt=64, output=32), seconds=100.0, ttft_s=1.0
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


def test_a_ladder_that_does_not_span_a_burst_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the bottom serves 1\.\d+ times what the top does with 16 slots"):
        SCENE.setting(ladder(ratio=0.9))


def test_a_quicker_machine_is_modelled() -> None:
    found = scenes.quicker(ladder(), 10.0)
    assert found.rungs[0].pass_us("decode", 4) == pytest.approx(ladder().rungs[0].pass_us("decode", 4) / 10)
    assert not any(rung.is_measured for rung in found.rungs)
    assert "10 times as fast" in found.device
