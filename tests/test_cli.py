"""The command line: exit codes, one readable message, no traceback."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from lowprec.cli import main
from lowprec.version import __version__

LOWPREC = [sys.executable, "-m", "lowprec.cli"]


def lowprec(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [*LOWPREC, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def test_version_answers_without_heavy_imports() -> None:
    done = lowprec("--version")
    assert (done.returncode, done.stdout) == (0, f"lowprec {__version__}\n")
    light = subprocess.run(
        [sys.executable, "-c", "import lowprec, lowprec.cli, sys; sys.exit('torch' in sys.modules)"], check=False
    )
    assert light.returncode == 0, "importing the package and its command line must not import torch"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL", "--budget", "0"], "outside (0, 1]"),
        (["MODEL", "--budget", "300%"], "budget 3 (300%) is outside (0, 1]"),
        (["MODEL", "--budget", "0.05 abs"], "give a relative budget"),
        (["MODEL", "--target", "onnx"], "unknown target 'onnx'"),
        (["MODEL", "--objective", "speed"], "unknown objective 'speed'"),
        (["MODEL", "--schemes", "int5"], "did you mean"),
        (["nowhere/to-be-found"], "no local path"),
        (["MODEL", "--data", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    tiny.folder(tmp_path / "model")
    given = [str(tmp_path / "model") if a == "MODEL" else a for a in arguments]
    done = lowprec("calibrate", *given, "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1


@pytest.mark.slow
def test_a_model_that_cannot_be_turned_is_refused_with_the_remedy(tmp_path: Path) -> None:
    done = lowprec("calibrate", tiny.folder(tmp_path / "model", "gpt2"), "--rotate", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert "the hidden states of this model cannot be turned" in done.stderr
    assert "leave --rotate out" in done.stderr
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.slow
def test_damaged_models_are_named_and_debug_shows_where(tmp_path: Path) -> None:
    model = tiny.folder(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = lowprec("calibrate", model, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "truncated" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in lowprec("--debug", "calibrate", model, "--out", tmp_path / "out").stderr


@pytest.mark.slow
def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("not a folder")
    done = lowprec("calibrate", tiny.folder(tmp_path / "model"), "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "not a folder" in done.stderr
    assert (tmp_path / "out").read_text() == "not a folder"


@pytest.mark.slow
def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    model = tiny.folder(tmp_path / "model")
    file, name = model / "model.safetensors", "model.layers.0.mlp.down_proj.weight"
    save_file(load_file(file) | {name: torch.ones(64, 96)}, file, {"format": "pt"})
    done = lowprec("calibrate", model, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert f"tensor {name} in model.safetensors is [64, 96], the configuration says [64, 128]" in done.stderr


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowprec.api.optimize", interrupted)
    monkeypatch.setattr("sys.argv", ["lowprec", "calibrate", "model", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["interrupted: the same command resumes the run"]
