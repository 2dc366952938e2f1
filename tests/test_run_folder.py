"""The run folder: locks, whole files, skipped steps, and what happens when the disk or the user gets in the way."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lowprec.artifacts.folder import RunFolder, atomic_write, canonical_json, require_space, write_text
from lowprec.errors import ArtifactError
from lowprec.formats import QuantizedWeight
from lowprec.records import Budget, SensitivityRow, digest

INPUTS = {"model": "aa", "data": "bb"}


def row(group: str = "g") -> SensitivityRow:
    return SensitivityRow(
        group=group, scheme="w8a16", solver="rtn", predicted_kl_nats=0.1, measured_kl_nats=None, stderr=0.01, tokens=7
    )


def weight(kind: str = "int8") -> QuantizedWeight:
    codes = torch.arange(64, dtype=torch.int8).view(2, 32)
    if kind == "fp8":
        codes = codes.to(torch.float8_e4m3fn)
    return QuantizedWeight(format=kind, codes=codes, scale=torch.tensor([[0.5], [0.25]]))


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


HOLD = """
import sys, time
from lowprec.artifacts.folder import RunFolder
folder = RunFolder(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    other = start(HOLD, tmp_path)
    assert other.stdout is not None
    with other, other.stdout as out:
        assert out.readline() == "held\n"
        with pytest.raises(ArtifactError, match=f"in use by another run \\(process {other.pid}\\)"):
            RunFolder(tmp_path)
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        with RunFolder(tmp_path) as folder:
            folder.write_text("a.txt", "mine")
    assert (tmp_path / "a.txt").read_text() == "mine"


def test_the_lock_also_holds_within_one_process_and_ends_with_the_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(ArtifactError, match="in use"):
        RunFolder(tmp_path)
    RunFolder(tmp_path).close()


CUT = """
import os, signal, sys
from lowprec.artifacts import folder as module
run = module.RunFolder(sys.argv[1])
run.write_step("one", {"x": 1}, {"m": "1"})
def cut(descriptor):
    os.kill(os.getpid(), signal.SIGKILL)
module.os.fsync = cut
run.write_step("two", {"x": 2}, {"m": "1"})
"""


def test_a_run_killed_while_writing_resumes_at_the_step_that_was_cut(tmp_path: Path) -> None:
    killed = start(CUT, tmp_path)
    with killed:
        assert killed.wait() == -signal.SIGKILL
    assert list(tmp_path.glob(".two.json*"))
    with RunFolder(tmp_path) as folder:
        assert not list(tmp_path.glob(".two.json*"))
        assert folder.read_step("one", {"m": "1"}) == {"x": 1}
        assert folder.read_step("two", {"m": "1"}) is None
        folder.write_step("two", {"x": 2}, {"m": "1"})
        assert folder.read_step("two", {"m": "1"}) == {"x": 2}


def test_a_step_is_skipped_only_when_its_inputs_are_the_same(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        rows = (row("a"), row("b"))
        stamp = folder.write_step("sensitivity", rows, INPUTS)
        assert stamp == digest(canonical_json(rows))
        assert folder.read_step("sensitivity", INPUTS, tuple[SensitivityRow, ...]) == rows
        assert folder.read_step("sensitivity", {**INPUTS, "data": "cc"}) is None
        assert folder.read_step("sensitivity", {"model": "aa"}) is None
        assert folder.read_step("sensitivity", None) is not None
        assert folder.read_step("other", INPUTS) is None
        folder.write_step("budget", Budget(), INPUTS)
        assert folder.read_step("budget", INPUTS, Budget) == Budget()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"inputs": {}, "schema_version": 1}', '{"schema_version": 99}', "\xff"]
)
def test_a_damaged_step_file_counts_as_not_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    with RunFolder(tmp_path) as folder:
        (tmp_path / "plan.json").write_bytes(content.encode("latin-1"))
        assert folder.read_step("plan", {}) is None
    assert "it is made again" in caplog.text


def test_a_step_of_another_shape_counts_as_not_there(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write_step("plan", {"limit": 7}, {})
        assert folder.read_step("plan", {}, Budget) is None
        folder.write_step("plan", [1, 2], {})
        assert folder.read_step("plan", {}, tuple[SensitivityRow, ...]) is None


def test_nan_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write_step("cost", {"x": 1.0}, {})
        with pytest.raises(ValueError, match="Out of range float"):
            folder.write_step("cost", {"x": float("nan")}, {})
        assert folder.read_step("cost", {}) == {"x": 1.0}


def test_solved_groups_come_back_bit_for_bit(tmp_path: Path) -> None:
    layers = {"model.layers.0.q": weight(), "model.layers.0.k": weight("fp8")}
    with RunFolder(tmp_path) as folder:
        folder.write_solved("layers.0/../qkv", layers, INPUTS)
        first = next((tmp_path / "solved").iterdir()).read_bytes()
        found = folder.read_solved("layers.0/../qkv", INPUTS)
        assert found is not None
        assert set(found) == set(layers)
        for name, expected in layers.items():
            assert found[name].format == expected.format
            assert found[name].codes.dtype == expected.codes.dtype
            assert torch.equal(found[name].codes.view(torch.uint8), expected.codes.view(torch.uint8))
            assert torch.equal(found[name].scale, expected.scale)
        assert folder.read_solved("layers.0/../qkv", {"model": "zz"}) is None
        assert folder.read_solved("nothing", INPUTS) is None
        folder.write_solved("layers.0/../qkv", layers, INPUTS)
        assert [file.read_bytes() for file in (tmp_path / "solved").iterdir()] == [first]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_solved_group_counts_as_not_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write_solved("g", {"q": weight()}, INPUTS)
        path = next((tmp_path / "solved").iterdir())
        whole = path.read_bytes()
        flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
        path.write_bytes({"cut": whole[:-1], "flip": flipped, "empty": b"", "text": b"hello, this is text"}[damage])
        assert folder.read_solved("g", INPUTS) is None
    assert "it is solved again" in caplog.text


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EROFS, "may write to"),
        (errno.EACCES, "may write to"),
        (errno.EIO, "written"),
    ],
)
def test_a_failed_write_tells_the_remedy_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    path = tmp_path / "report.json"
    write_text(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ArtifactError, match=words):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_writer_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_text(path, "old")

    def broken(file: object) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        atomic_write(path, broken)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is a file, not a folder"):
        RunFolder(tmp_path / "file")
    with pytest.raises(ArtifactError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "below")
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_text(tmp_path / "nowhere" / "x", "x")

    def refuse(self: Path, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    # The superuser may write anywhere, so a folder without write permission is no test for everybody.
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ArtifactError, match=r"Read-only.*choose a folder that you may write to"):
        RunFolder(tmp_path / "out")


def test_space_is_asked_for_before_it_is_used(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(ArtifactError, match=r"needs 1,000,000,000,000\.0 MB but only .* MB are free"):
        require_space(tmp_path / "not" / "there", 10**18)
