"""Whole runs on a tiny model: what is written, resume after kill -9, other budgets, bad folders."""

import dataclasses
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch

import lowprec
import tiny
from lowprec.api import optimize
from lowprec.artifacts.digests import verify_digests
from lowprec.artifacts.folder import RunFolder
from lowprec.artifacts.loading import load_artefact, read_back
from lowprec.artifacts.probe import check_probe
from lowprec.artifacts.safetensors_io import load_tensors
from lowprec.errors import ArtifactError, ConfigError, DataError, ModelError
from lowprec.formats import scheme_named
from lowprec.pipeline.mixes import MeasuredMix, Mixes
from lowprec.records import Budget, Workload
from lowprec.report import report_from_json
from lowprec.results import REUSED, Report
from lowprec.settings import Effort
from lowprec.steps.load import load, wrap
from lowprec.steps.scratch import Scratch

pytestmark = pytest.mark.slow
BUDGET = "30%"


def run(model: Path, out: Path, data: Path, **changed: Any) -> Report:
    settings: dict[str, Any] = {
        "budget": BUDGET,
        "objective": "bytes",
        # A table of its own form is tests/test_tables.py's.
        "embeddings": False,
        "effort": tiny.EFFORT,
        "data": [data],
        "workload": Workload(prompt_tokens=32, output_tokens=8),
    }
    return optimize(model, out=out, **settings | changed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its text and a finished run."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("run")
    tiny.folder(path / "model")
    tiny.text(path / "text.jsonl")
    run(path / "model", path / "out", path / "text.jsonl")
    return path


def stored(out: Path, name: str) -> Any:
    return json.loads((out / f"{name}.json").read_text())["record"]


def test_a_finished_run_holds_everything(place: Path) -> None:
    out = place / "out"
    report = report_from_json((out / "report.json").read_text())
    assert {"model", "solved", "sensitivity.json", "cost.json", "plan.json", "report.html"} <= set(os.listdir(out))
    assert not (out / "work").exists(), "hidden states are not left behind"
    assert report.parity.codes_equal
    assert report.parity.holds
    assert report.verdict == "inconclusive", "1,200 held-out tokens carry no verdict"
    assert report.unread_data
    assert not report.reused
    assert report.cost.weight_bytes_after < report.cost.weight_bytes_before
    assert sum(s.parameters for s in report.schemes) == sum(g.parameters for g in report.groups)
    assert verify_digests(out / "model") == ()


def test_the_artefact_is_what_the_plan_says(place: Path) -> None:
    schemes = dict(stored(place / "out", "plan")["groups"])
    found = read_back(place / "out" / "model")
    assert set(schemes.values()) != {"bf16"}
    for group, name in schemes.items():
        layers = [layer for layer in found if layer.startswith(group.rpartition(".")[0])]
        if scheme_named(name).weight and group != "lm_head":
            assert any(found[layer].format == scheme_named(name).weight for layer in layers)
    model, _ = load_artefact(place / "out" / "model")
    assert check_probe(model, place / "out" / "model") < 1e-2


def test_the_artefact_weighs_what_the_report_says(place: Path) -> None:
    report = report_from_json((place / "out" / "report.json").read_text())
    # Every packed layer also stores its shape, two int64.
    shapes = 16 * len(read_back(place / "out" / "model"))
    assert report.cost.after == pytest.approx(report.cost.weight_bytes_after, abs=shapes)
    tensors, _ = load_tensors(place / "out" / "model" / "model.safetensors")
    assert report.cost.weight_bytes_after == pytest.approx(sum(t.nbytes for t in tensors.values()), rel=0.001)


def test_the_same_command_again_does_nothing_new(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    plan = (place / "out" / "plan.json").read_bytes()
    solved = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out" / "solved").iterdir()}
    report = run(place / "model", tmp_path / "out", place / "text.jsonl")
    assert (tmp_path / "out" / "plan.json").read_bytes() == plan
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out" / "solved").iterdir()} == solved
    assert report.unread_data, "the same plan on the same data is the same look"


def test_another_budget_reallocates_and_never_hides_that_data_was_read(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(place / "out", out)
    sensitivity, cost = (out / "sensitivity.json").read_bytes(), (out / "cost.json").read_bytes()
    reports = [run(place / "model", out, place / "text.jsonl", budget=b) for b in ("1%", "3%", "8%")]
    assert (out / "sensitivity.json").read_bytes() == sensitivity
    assert (out / "cost.json").read_bytes() == cost
    assert len({r.plan.groups for r in reports}) > 1, "budgets this far apart give other mixes"
    assert reports[-1].reused, "two looks hold no unread data for a fourth plan"
    assert REUSED in (out / "model" / "README.md").read_text()
    assert REUSED not in (place / "out" / "model" / "README.md").read_text()
    bits = [r.cost.effective_bits for r in reports]
    assert bits == sorted(bits, reverse=True), "a larger budget never costs more"


def test_a_second_run_in_one_folder_stops(place: Path) -> None:
    with RunFolder(place / "out"), pytest.raises(ArtifactError, match="in use"):
        run(place / "model", place / "out", place / "text.jsonl")


def _child(place: Path, out: Path, workers: int, effort: Effort) -> None:
    torch.set_num_threads(1)
    run(place / "model", out, place / "text.jsonl", workers=workers, effort=effort)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    # The server imports everything once, so that a killed run costs what it computes.
    context.set_forkserver_preload(["lowprec.api", "lowprec.report", "transformers.models.llama.modeling_llama"])
    return context


@pytest.mark.timeout(900)
@pytest.mark.parametrize("compensated", [False, True])
def test_killed_at_ten_random_moments_the_plan_is_the_same(place: Path, tmp_path: Path, compensated: bool) -> None:
    effort = dataclasses.replace(
        tiny.EFFORT, compensated=compensated, weighted=compensated, two_sided=compensated,
        learning_steps=10 * compensated, healing_passes=int(compensated),
    )  # fmt: skip
    context, out, whole, generator = _context(), tmp_path / "out", tmp_path / "whole", random.Random(11)
    for folder in (out, whole):
        folder.mkdir()
        shutil.copy(place / "out" / "cost.json", folder)
    start = time.monotonic()
    child = context.Process(target=_child, args=(place, whole, 2, effort))
    child.start()
    child.join()
    seconds = time.monotonic() - start
    assert child.exitcode == 0
    for _ in range(10):
        child = context.Process(target=_child, args=(place, out, generator.choice([1, 2, 4]), effort))
        child.start()
        child.join(generator.uniform(0.1, 0.9) * seconds)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
        child.join()
    run(place / "model", out, place / "text.jsonl", effort=effort)
    for name in ("plan.json", "sensitivity.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not list(out.glob("work-*")), "what stages keep for themselves is gone"
    for file in (whole / "model").glob("*.safetensors"):
        if file.name != "probe.safetensors":
            assert (out / "model" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("compensated", [True, False])
def test_a_mix_is_healed_when_asked_for_and_never_measures_worse(
    place: Path, tmp_path: Path, compensated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    effort = dataclasses.replace(tiny.EFFORT, compensated=compensated)
    out, tried, measure = tmp_path / "out", [], Mixes._measure

    def noted(self: Mixes, *given: Any) -> MeasuredMix:
        found = measure(self, *given)
        if found.rounding == "healed":
            # So little text heals nothing: what is chosen and made again is to be a healed mix all the same.
            upper = 0.9 * min(one.measured.upper for one in tried if one.mix == found.mix)
            found = dataclasses.replace(found, measured=dataclasses.replace(found.measured, upper=upper))
        tried.append(found)
        return found

    monkeypatch.setattr(Mixes, "_measure", noted)
    # Of KL all budgets take the same text.
    budgets = [Budget(metric="kl", limit=limit, kind="absolute") for limit in (0.3, 0.003)]

    def codes() -> dict[str, Any]:
        return read_back(out / "model")

    report = run(place / "model", out, place / "text.jsonl", effort=effort, heal=True, budget=budgets[0])
    first = codes()
    run(place / "model", out, place / "text.jsonl", effort=effort, heal=True, budget=budgets[1])
    measured = json.loads((out / "measured.json").read_text())["record"]
    for mix in measured:
        bounds = {one.rounding: one.measured.upper for one in tried if one.mix == mix["mix"]}
        assert "healed" in bounds
        assert bounds[mix["rounding"]] == min(bounds.values())
    assert any(m["rounding"] == "healed" for m in measured)
    assert report.plan.solver.rpartition(", ")[2] in {m["rounding"] for m in measured}
    mixes = {m["mix"] for m in measured}
    assert len(_mixes_kept(out)) <= 1 < len(mixes), "what only other mixes needed is gone"
    again = run(place / "model", out, place / "text.jsonl", effort=effort, heal=True, budget=budgets[0])
    assert again.plan.groups == report.plan.groups
    assert again.plan.solver == report.plan.solver
    for layer, weight in codes().items():
        assert torch.equal(weight.codes, first[layer].codes), "made again as it was measured"
        assert torch.equal(weight.scale, first[layer].scale)
    run(place / "model", out, place / "text.jsonl", effort=effort, heal=True, budget="1%")
    assert len(_mixes_kept(out)) <= 1, "a small budget's tuning text is another one: earlier mixes are not known there"


def _mixes_kept(out: Path) -> set[str]:
    names = [unquote(file.stem).partition("@")[2].removeprefix("healed") for file in (out / "solved").iterdir()]
    return {name for name in names if re.fullmatch("[0-9a-f]{16}", name)}


class Cut(Exception):
    """Ends a run in the middle."""


@pytest.mark.parametrize("number", range(3, 28, 3))
def test_cut_at_any_write_the_plan_is_the_same(
    place: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts before the `number`th file of the hidden states' folder is written, where a half-done state could show."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(place / "out" / "cost.json", out)
    count = 0
    originals = {name: getattr(Scratch, name) for name in ("save", "set_note")}

    def counted(name: str) -> Any:
        def write(*arguments: Any) -> None:
            nonlocal count
            count += 1
            if count == number:
                raise Cut
            originals[name](*arguments)

        return write

    with monkeypatch.context() as patched:
        for name in originals:
            patched.setattr(Scratch, name, counted(name))
        with pytest.raises(Cut):
            run(place / "model", out, place / "text.jsonl")
    run(place / "model", out, place / "text.jsonl")
    assert (out / "sensitivity.json").read_bytes() == (place / "out" / "sensitivity.json").read_bytes()
    assert (out / "plan.json").read_bytes() == (place / "out" / "plan.json").read_bytes()


def test_worker_threads_do_not_change_the_plan(place: Path, tmp_path: Path) -> None:
    for workers in (1, 5):
        out = tmp_path / str(workers)
        out.mkdir()
        shutil.copy(place / "out" / "cost.json", out)
        run(place / "model", out, place / "text.jsonl", workers=workers)
        assert (out / "plan.json").read_bytes() == (place / "out" / "plan.json").read_bytes()


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2", "llama-untied"])
def test_other_decoders_run_too(name: str, tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model", name)
    report = run(tmp_path / "model", tmp_path / "out", tiny.text(tmp_path / "text.jsonl"))
    assert report.parity.codes_equal
    assert report.parity.holds
    assert (report.artefact_form == "lowprec") == (name == "gpt2"), "Conv1D has no compressed-tensors form"
    assert_complete(tmp_path / "out", report)
    module, tokenizer = lowprec.load_artefact(report.artefact)
    assert check_probe(module, Path(report.artefact)) < 1e-2
    assert tokenizer is not None


def assert_complete(out: Path, report: Report) -> None:
    """The artefact is in its place, its files are those of its digests, and it weighs what the report says."""
    folder = out / "model"
    assert report.artefact == str(folder)
    assert verify_digests(folder) == ()
    assert report.verdict in (folder / "README.md").read_text()
    if report.artefact_form == "lowprec":
        tensors, _ = load_tensors(folder / "lowprec.safetensors")
        assert report.cost.weight_bytes_after == sum(t.nbytes for t in tensors.values())
        assert report.cost.after == pytest.approx(report.cost.weight_bytes_after, rel=0.001)
        assert "no compressed-tensors checkpoint" in (folder / "README.md").read_text()


def test_an_encoder_is_a_library_call(tmp_path: Path) -> None:
    def embed(module: Any, batch: Any) -> torch.Tensor:
        hidden: torch.Tensor = module(input_ids=batch.ids, attention_mask=batch.mask().long()).last_hidden_state
        return hidden[:, 0]

    def cosine(reference: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return 1.0 - torch.nn.functional.cosine_similarity(reference, output, dim=-1)

    model = wrap(tiny.encoder(), embed, tokenizer=tiny.tokenizer(), metric=cosine)
    report = optimize(
        model, out=tmp_path / "out", budget="0.02 abs", objective="bytes", effort=tiny.EFFORT,
        data=[tiny.text(tmp_path / "text.jsonl")],
    )  # fmt: skip
    assert 0 <= report.loss.relative < 0.02
    assert report.loss.perplexity_before is None
    assert report.cost.reduction_measured is not None
    assert report.artefact_form == "lowprec"
    assert_complete(tmp_path / "out", report)


class Tagger(torch.nn.Module):
    """A module that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(tiny.WORDS, 64)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, 64]."""
        x: torch.Tensor = self.embedding(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.mean(1)


def test_a_plain_module_gets_an_artefact_that_goes_into_it(tmp_path: Path) -> None:
    def embed(module: Any, batch: Any) -> torch.Tensor:
        out: torch.Tensor = module(batch.ids)
        return out

    module = Tagger().eval()
    untouched = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    settings: dict[str, Any] = {
        "budget": "0.05 abs", "objective": "bytes", "effort": tiny.EFFORT, "data": [tiny.text(tmp_path / "text.jsonl")],
    }  # fmt: skip
    report = optimize(wrap(module, embed, tokenizer=tiny.tokenizer()), out=tmp_path / "out", **settings)
    assert report.artefact_form == "lowprec-layers"
    assert report.parity.holds
    assert report.parity.kl_nats == pytest.approx(0.0, abs=1e-9)
    assert_complete(tmp_path / "out", report)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in module.state_dict().items())
    ids = tiny.batch()
    changed = lowprec.apply_artefact(Tagger().eval(), report.artefact)
    with torch.no_grad():
        assert 0 < float((changed(ids) - module(ids)).norm() / module(ids).norm()) < 0.5
    rounded = [module.embedding, *module.layers]
    stays = report.cost.weight_bytes_before - sum(layer.weight.nbytes for layer in rounded)
    codes, _ = load_tensors(Path(report.artefact) / "lowprec.safetensors")
    assert report.cost.weight_bytes_after == stays + sum(t.nbytes for t in codes.values())
    # A function that answers from a module of its own would have the original judged in the artefact's place.
    closed = wrap(module, lambda _, batch: module(batch.ids), tokenizer=tiny.tokenizer())
    with pytest.raises(ModelError, match="module that it is given"):
        optimize(closed, out=tmp_path / "closed", **settings)


def test_static_activations_and_chosen_schemes(place: Path, tmp_path: Path) -> None:
    report = run(place / "model", tmp_path / "out", place / "text.jsonl", schemes=["w8a8-int8-static"], budget="90%")
    assert {s.scheme for s in report.schemes} <= {"bf16", "w8a8-int8-static"}
    assert report.parity.holds


def test_zero_points_and_three_bits_come_back_as_they_were_judged(place: Path, tmp_path: Path) -> None:
    report = run(
        place / "model", tmp_path / "out", place / "text.jsonl", schemes=["int4-asym", "int3"], budget="90%",
        objective="bytes",
    )  # fmt: skip
    used = {s.scheme.split("-")[0] for s in report.schemes} - {"bf16"}
    assert used
    assert used <= {"w3a16", "w4a16"}
    assert report.artefact_form == (
        "lowprec" if any("asym" in s.scheme for s in report.schemes) else "compressed-tensors"
    )
    assert report.parity.holds


def test_a_planned_device_is_modelled(place: Path, tmp_path: Path) -> None:
    report = run(place / "model", tmp_path / "out", place / "text.jsonl", device="h100", objective="dollars")
    assert report.cost.origin == "modelled"
    assert report.cost.reduction_measured is None
    assert "dollars" in report.cost.unit


def test_a_task_is_a_metric(place: Path, tmp_path: Path) -> None:
    model = load(place / "model")
    ids = torch.arange(40)
    with torch.no_grad():
        likely = model.module(ids[None]).logits[0].argmax(-1).tolist()
        unlikely = model.module(ids[None]).logits[0].argmin(-1).tolist()
    # Questions that the reference answers right by construction; the context of question i ends in word i.
    lines = []
    for i in range(40):
        question = " ".join(f"w{j}" for j in range(i + 1))
        choices = [f"w{likely[i] % 298}", f"w{unlikely[i] % 298}"]
        lines.append(json.dumps({"question": question, "choices": choices, "answer": 0}))
    (tmp_path / "task.jsonl").write_text("\n".join(lines))
    from lowprec.settings import parse_budget

    budget = parse_budget("20%", f"task:{tmp_path / 'task.jsonl'}")
    report = run(place / "model", tmp_path / "out", place / "text.jsonl", budget=budget)
    assert report.loss.metric.startswith("task:")
    assert report.loss.units == 24
    (tmp_path / "chance.jsonl").write_text(
        "\n".join(json.dumps({"question": f"w{i}", "choices": ["w1", "w2"], "answer": i % 2}) for i in range(40))
    )
    with pytest.raises(ConfigError, match="chance"):
        run(
            place / "model", tmp_path / "chance", place / "text.jsonl",
            budget=parse_budget("20%", f"task:{tmp_path / 'chance.jsonl'}"),
        )  # fmt: skip
    assert not (tmp_path / "chance" / "calibration.json").exists(), "refused before anything is spent on it"


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"target": "torhc"}, ConfigError, "did you mean 'torch'"),
        ({"device": "h1000"}, ConfigError, "did you mean 'h100'"),
        ({"schemes": ["w4a61"]}, ConfigError, "did you mean 'w4a16'"),
        ({"effort": "fats"}, ConfigError, "did you mean 'fast'"),
        ({"budget": "300%"}, ConfigError, r"3 \(300%\) is outside"),
        ({"budget": "0"}, ConfigError, r"0 \(0%\) is outside"),
        ({"budget": "0.05 abs"}, ConfigError, "perplexity is judged by its relative increase"),
        ({"budget": Budget(metric="kl")}, ConfigError, "kl compares two models.* give an absolute budget"),
        ({"budget": Budget(metric="top1")}, ConfigError, "top1 compares two models"),
    ],
)
def test_bad_settings_say_what_to_do(
    place: Path, tmp_path: Path, changed: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(place / "model", tmp_path / "out", place / "text.jsonl", **changed)
    assert not list((tmp_path / "out").glob("*.json")), "refused before anything is measured"


def test_too_little_text_says_how_much_is_needed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("w1 w2 w3")
    with pytest.raises(DataError, match="tokens"):
        run(place / "model", tmp_path / "out", tmp_path / "small.txt")


def test_nan_weights_are_named(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    model = tiny.decoder()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj"):
        load(tmp_path / "model")
