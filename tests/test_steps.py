"""A run step by step: the example of the README as it is printed, and the algorithms by their public names."""

import json
from pathlib import Path

import pytest
import torch

import lowprec
import tiny
from lowprec.artifacts.card import FILE_NAME
from lowprec.pipeline import prove
from lowprec.settings import EFFORTS
from lowprec.steps import tokens

README = Path(__file__).parent.parent / "README.md"


def example() -> str:
    """The code block of the README that begins a run."""
    blocks = [part.split("```")[0] for part in README.read_text().split("```python\n")[1:]]
    (found,) = [block for block in blocks if "lowprec.begin(" in block]
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with the files that the example names; its effort is that of a tiny model."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(EFFORTS, "fast", tiny.EFFORT)
    model = tiny.folder(tmp_path / "path" / "to" / "model")
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    tiny.text(tmp_path / "tickets.jsonl")
    return tmp_path


def test_the_example_of_the_readme_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(compile(example(), "README.md", "exec"), names)
    report, scored = names["report"], names["scored"]
    assert isinstance(report, lowprec.Report)
    assert isinstance(scored, lowprec.Scored)
    assert (report.plan.budget.limit, scored.prepared.context.metric.budget.limit) == (0.02, 0.05)
    assert json.loads((place / "run" / "plan.json").read_text())["record"]["budget"]["limit"] == 0.02
    assert capsys.readouterr().out.splitlines()[-1].startswith(report.verdict)
    card = (place / "run" / "model" / FILE_NAME).read_text()
    assert "license: mit\n" in card
    assert "base_model" not in card
    rows = json.loads((place / "run" / "sensitivity.json").read_text())["record"]
    measured = {(r["group"], r["scheme"]): r["measured_kl_nats"] for r in rows if r["measured_kl_nats"] is not None}
    assert measured == {(p.group, p.scheme): p.measured_kl_nats for p in report.sensitivity.pairs}
    with pytest.raises(lowprec.ConfigError, match="begin another run"):
        scored.with_budget(lowprec.Budget(metric="kl", kind="absolute"))


def test_the_algorithms_are_called_with_what_is_prepared(place: Path) -> None:
    model = lowprec.load(place / "path" / "to" / "model")
    settings = lowprec.Settings(out=place / "run", effort=tiny.EFFORT, data=(str(place / "tickets.jsonl"),))
    with lowprec.begin(model, settings) as run:
        have, outcome = lowprec.prepare(run), model.outcome
        assert lowprec.graph(have.stream)[0] == have.groups
        formats = {g: sorted({s.weight for s in found if s.weight}) for g, found in have.schemes.items()}
        scratch = lowprec.Scratch(place / "scratch", "key")
        calibration = lowprec.calibrate(
            have.stream,
            have.groups,
            have.calibration_batches,
            outcome,
            lambda gathered: have.rounder.solve_and_keep(gathered, formats),
            scratch,
            probing=len(have.probed.batches),
        )
        effects = lowprec.sensitivity(
            have.stream,
            have.groups,
            have.schemes,
            have.probed.batches,
            outcome,
            have.rounder.errors,
            calibration,
            scratch,
            seed=0,
        )
        options = {
            group: [
                lowprec.Option(scheme=s.name, loss=effects.kl(group, s)[0] if s.weight else 0.0, cost=bits(s))
                for s in schemes
            ]
            for group, schemes in have.allowed.items()
        }
        mix = lowprec.allocate(have.names, options, 0.05).scheme_of()
        schemes = {group: next(s for s in have.allowed[group] if s.name == mix[group]) for group in have.names}
        common = {"stream": have.stream, "groups": have.groups, "schemes": schemes, "outcome": outcome}
        common |= {"batches": have.calibration_batches, "calibration": calibration}
        compensation = lowprec.Compensation(
            **common, rounder=have.rounder, folder=run.folder, inputs=have.inputs, name="mine"
        )
        solved = compensation.run(lowprec.Scratch(place / "scratch-solve", "key"))
        healed = lowprec.Healing(**common, passes=1).run(solved)
    assert set(healed) == set(solved)
    assert set(solved) == {layer for g in have.groups if schemes[g.name].weight for layer in g.layers}
    assert solved


def bits(scheme: lowprec.Scheme) -> float:
    """What a parameter costs."""
    return {"bf16": 16.0, "int4": 4.0}.get(scheme.family, 8.0)


def test_a_verdict_is_the_same_whatever_is_held_at_a_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = lowprec.Settings(out=place / "run", effort=tiny.EFFORT, data=(str(place / "tickets.jsonl"),))
    with lowprec.begin(place / "path" / "to" / "model", settings, "30%") as run:
        have = lowprec.prepare(run)
        chosen = lowprec.choose(lowprec.score(have), lowprec.price(have))
        loaded = lowprec.export(chosen)
        data, batches = have.held_out[0], have.held_out[0].batches(128)
        with chosen.in_model():
            whole = prove._compared(chosen, loaded, data, batches)
            monkeypatch.setattr(tokens, "PORTION_TOKENS", 200)
            portions = tokens.portions_of(batches)
            assert len(portions) > 2
            assert [batch for some in portions for batch in some] == batches
            assert torch.equal(prove._compared(chosen, loaded, data, batches), whole)
