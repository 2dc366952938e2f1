"""Benchmarks are run by hand: that they import, and take a tiny encoder through, keeps them from rotting unseen."""

import importlib
import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from lowprec.steps.linear import linear_layers
from lowprec.steps.load import load
from lowprec.steps.tokens import TokenSet
from tests import tiny

BENCH = Path(__file__).parent.parent / "bench"
QUALITY = BENCH / "quality"


@pytest.mark.parametrize("file", sorted(BENCH.rglob("*.py")), ids=lambda file: file.stem)
def test_every_benchmark_imports(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a script its own folder is where it finds its neighbours.
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"bench_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__doc__


def wide_encoder() -> Any:
    """An encoder whose weights are wide enough that quantising it moves its embeddings."""
    model = tiny.encoder()
    for layer in linear_layers(model).values():
        layer.weight.data.mul_(8.0)
    return model


def windows() -> TokenSet:
    """Five windows of each of the four texts, each a unit."""
    count = 20
    return TokenSet(
        ids=tuple(tiny.batch(count, 24, seed=1)),
        units=tuple(range(count)),
        sources=tuple(i % 4 for i in range(count)),
        documents=("",) * count,
        source_names=("technical", "literature", "code", "questions"),
    )


def test_an_encoder_goes_through_worker_and_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(QUALITY))
    suite, encoders = (importlib.import_module(name) for name in ("suite", "encoders"))
    asked = [(str(i), " ".join(f"w{word}" for word in ids) + "\nA: w1") for i, ids in enumerate(tiny.batch(8, 12))]
    monkeypatch.setattr(encoders, "questions", lambda packages: asked)
    wide_encoder().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    save_file({"ids": tiny.batch(8, 24)}, tmp_path / "calibration.safetensors")
    bench = encoders.Encoders(load(tmp_path / "model"), windows(), tmp_path)

    wanted = {m.name: m for m in suite.methods({"hqq": ""}, suite.OURS_OF_ENCODERS)}
    results: dict[str, Any] = {}
    folders: dict[str, Path] = {}
    for name in ("lowprec plain rounding, w8a16", "lowprec plain rounding, w4a16-g64", "lowprec healed, w4a16-g64"):
        out = tmp_path / str(len(folders))
        given = [str(tmp_path / "model"), str(tmp_path / "calibration.safetensors"), str(out)]
        monkeypatch.setattr(sys, "argv", ["", *given, *wanted[name].arguments])
        runpy.run_path(str(QUALITY / wanted[name].worker), run_name="__main__")
        results[name] = bench.result(wanted[name], out, json.loads((out / "method.json").read_text()))
        assert bench.result(wanted[name], out, {"seconds": 0.0, "peak_bytes": 0}).scores == results[name].scores
        folders[name] = out
    int8, plain, healed = results.values()
    assert [s.text for s in int8.scores] == ["technical", "literature", "code", "questions", "all"]
    assert [s.windows for s in int8.scores] == [5, 5, 5, 5, 20]
    for worse, better in zip(plain.scores, int8.scores, strict=True):
        assert 0.0 < better.lower <= better.loss <= better.upper < worse.lower
    assert healed.scores[-1].loss < plain.scores[-1].loss
    assert int8.neighbours.questions == 8
    assert len(bench.row(healed)) == 6

    # Whoever rounds to the like is compared: here a peer whose result is one of ours.
    peer = wanted["HQQ, int4 g64, float zero points"]
    ours = [wanted[name] for name in folders]
    found = bench.differences([*ours, peer], folders | {peer.name: folders["lowprec plain rounding, w4a16-g64"]})
    assert [d.method for d in found] == list(folders)[1:]
    assert (found[0].lower, found[0].difference, found[0].upper) == (0.0, 0.0, 0.0)
    assert found[1].difference == pytest.approx(healed.scores[-1].loss - plain.scores[-1].loss)
