"""What a simulation leaves: its JSON, its page, its lines in the terminal, and the command around them."""

import io
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowprec.errors import ArtifactError, ConfigError
from lowprec.ladder import write_ladder
from lowprec.report.simulation import (
    headline,
    print_comparison,
    simulation_from_json,
    simulation_html,
    simulation_json,
    write_simulation,
)
from lowprec.simulate.compare import Comparison
from lowprec.simulate.study import Load, study
from lowprec.simulate.traces import Lengths
from tests.ladders import ladder


@pytest.fixture(scope="module")
def found() -> Comparison:
    load = Load(seconds=60.0, lengths=Lengths(prompt=64, output=32), efforts=(0.9, 0.1, 0.0))
    return study(ladder(ratio=0.58), "burst-train", load=load, slots=16, seed=1)


class Page(HTMLParser):
    """Tags that stay open, addresses that would be loaded, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href") and value and "//" in value]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_json_is_the_comparison(found: Comparison) -> None:
    text = simulation_json(found)
    assert simulation_from_json(text) == found
    assert text == simulation_json(simulation_from_json(text))
    with pytest.raises(ConfigError, match="schema version 7"):
        simulation_from_json(text.replace('"schema_version": 1', '"schema_version": 7'))


def test_the_page_is_whole_and_loads_nothing(found: Comparison) -> None:
    page = Page(simulation_html(found))
    assert page.open == []
    assert page.loaded == []
    assert "script" not in page.tags
    for result in found.results:
        assert result.policy in page.text
    for rung in found.rungs:
        assert rung in page.text
    # Four figures, a line for each policy in three of them and one for the arrivals.
    assert simulation_html(found).count('class="series one"') == 4 + 1
    assert "nan" not in page.text.lower().split()


def test_names_from_files_are_escaped(found: Comparison) -> None:
    import dataclasses

    named = dataclasses.replace(found, trace="<script>alert(1)</script>")
    assert "<script>" not in simulation_html(named)


def test_what_is_said(found: Comparison) -> None:
    out = io.StringIO()
    print_comparison(found, Console(file=out, width=200), report_path="here/simulation.html")
    said = out.getvalue()
    assert "here/simulation.html" in said
    assert "static r4" in said
    assert "oracle" in said
    assert "fewer requests miss an objective than at the top rung alone" in said
    calm = study(ladder(), "poisson", load=Load(base=0.2, seconds=30.0), slots=16)
    assert headline(calm) == "The top rung alone misses no objective; the controller does not switch"
    alone = study(ladder(), "poisson", load=Load(base=0.2, seconds=30.0), slots=16, statics=["r1"])
    assert headline(alone) == "The controller misses an objective in 0.0\N{NO-BREAK SPACE}% of the requests"


def test_a_folder_that_cannot_be_made(found: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_simulation(found, tmp_path / "file" / "out")


def simulate(*arguments: str | Path, **given: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowprec.cli", "simulate", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False, **given)


def test_the_command(tmp_path: Path) -> None:
    write_ladder(ladder(), tmp_path / "ladder.json")
    asked = ["--ladder", tmp_path / "ladder.json", "--seconds", "30", "--slo-ttft", "1", "--slo-tpot", "0.05"]
    asked += ["--budget", "0.2", "--seed", "3", "--slots", "16", "--effort", "low:0.5,medium:0.5"]
    done = simulate(*asked, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert "controller" in done.stdout
    assert "Objectives 1.00 s to the first token, 50.0 ms per token; budget 0.200 nats per token" in done.stdout
    simulate(*asked, "--out", tmp_path / "two")
    one, two = ((tmp_path / name / "simulation.json").read_bytes() for name in ("one", "two"))
    assert one == two
    assert (tmp_path / "one" / "simulation.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ladder", "none.json"], "none.json: cannot be read as a ladder"),
        (["--ladder", "LADDER", "--trace", "bursts"], "unknown trace 'bursts': did you mean"),
        (["--ladder", "LADDER", "--trace", "none.csv"], "none.csv: cannot be read as a trace"),
        (["--ladder", "LADDER", "--trace", "BAD"], "line 3: output '-4' is no number of tokens"),
        (["--ladder", "LADDER", "--slo-ttft", "-1"], "time to first token of -1 s"),
        (["--ladder", "LADDER", "--slo-tpot", "0.0001"], "the lowest rung takes"),
        (["--ladder", "LADDER", "--budget", "0"], "budget 0.0 nats per token is outside"),
        (["--ladder", "LADDER", "--budget", "0.001"], "give 0.00688 or more"),
        (["--ladder", "LADDER", "--effort", "hihg"], "unknown effort 'hihg': did you mean 'high'"),
        (["--ladder", "LADDER", "--static", "r9"], "the ladder has no rung 'r9'"),
        (["--ladder", "LADDER", "--seed", "-3"], "seed -3: give 0 or more"),
    ],
)
def test_bad_input_is_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    from lowprec.cli import main

    write_ladder(ladder(), tmp_path / "ladder.json")
    (tmp_path / "bad.csv").write_text("arrival,prompt,output\n0,1,2\n1,3,-4\n")
    places = {"LADDER": str(tmp_path / "ladder.json"), "BAD": str(tmp_path / "bad.csv")}
    asked = [places.get(a, a) for a in arguments]
    monkeypatch.setattr("sys.argv", ["lowprec", "simulate", *asked, "--out", str(tmp_path / "out")])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("error:") == 1
    assert not (tmp_path / "out").exists()
