"""optimum-cli knows lowprec as one of its commands, and leaves arguments, help and exit codes to it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lowprec

ROOT = Path(__file__).parents[1]
REGISTRATION = "optimum/commands/register/register_lowprec.py"


def optimum_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs optimum's command line as a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "optimum.commands.optimum_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_it_is_one_of_optimums_commands() -> None:
    done = optimum_cli("--help")
    assert done.returncode == 0, done.stderr
    assert "lowprec" in done.stdout
    assert "cheapest precision of each layer" in done.stdout


def test_options_that_come_first_are_lowprecs() -> None:
    done = optimum_cli("lowprec", "--version")
    assert (done.returncode, done.stdout) == (0, f"lowprec {lowprec.__version__}\n"), done.stderr
    shown = optimum_cli("lowprec", "export", "--help")
    assert "Usage: optimum-cli lowprec export [OPTIONS]" in shown.stdout


def test_errors_and_exit_codes_are_lowprecs(tmp_path: Path) -> None:
    done = optimum_cli("lowprec", "calibrate", str(tmp_path), "--budget", "5x", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert "'5x'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_wheel_has_the_registration_and_no_package_of_optimums_own(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("lowprec-*.whl"))).namelist()
    assert [name for name in names if name.startswith("optimum")] == [REGISTRATION]
    assert "lowprec/cli.py" in names
    assert "lowprec_kernels/ops.py" in names
