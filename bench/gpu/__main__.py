"""`bench/gpu.sh [STAGE ...]`: runs stages one after the other and writes what they find, all the while.

    ceilings   what the device does at best             check     every kernel against float64
    large      operands of more than 2^31 elements      tune      the table of configurations
    compare    every kernel beside its peers            decoder   a whole decoder

Before them, what they launch is compiled in as many processes as there are cores. Results: `gpu.json`, `log.txt` and
`tuned/DEVICE.json` below OUT (bench/results); a stage that was run before keeps its place in `gpu.json` until it is run
again. Every stage is bounded (`--seconds 60`, `--seconds tune=150`) and says what it left out.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu import journal, precompile
from bench.gpu.dry import VARIABLE as TARGET_VARIABLE
from bench.gpu.dry import Target
from bench.gpu.journal import Outcome
from bench.gpu.setting import Setting, out_folder, setting
from bench.gpu.summary import summary
from bench.gpu.worker import CALLS, COMPILE, PLANS
from lowprec_kernels import tuning

DEFAULT_SECONDS = {COMPILE: 120.0, "ceilings": 30.0, "check": 90.0, "large": 30.0, "tune": 150.0, "compare": 120.0,
                   "decoder": 100.0}  # fmt: skip
CHECK_PROCESSES = 8
# In `gpu.json`: facts or stages, a stage, its lists.
WHOLE_DEPTH = 4
# Items of these may build whole models, or wait for another package to tune itself.
SLOW, SLOW_FACTOR = ("compare", "decoder"), 2
# What later stages are told of earlier ones: variable -> file in the run's folder.
FILES = {precompile.VARIABLE: "compiled.json", journal.VARIABLE: "poisoned.json"}


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(PLANS)}; all by default")
    parser.add_argument("--seconds", action="append", default=[], help="N for every stage, or STAGE=N; may be repeated")
    parser.add_argument("--no-compile", action="store_true", help="compile nothing beforehand")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU, in Triton's interpreter")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in (*PLANS, COMPILE)]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}; there are {', '.join((COMPILE, *PLANS))}")
    options.stages = options.stages or list(PLANS)
    return options


def limits(given: list[str]) -> dict[str, float]:
    """Seconds of each stage."""
    found = dict(DEFAULT_SECONDS)
    for text in given:
        stage, _, number = text.rpartition("=")
        found |= {stage: float(number)} if stage else dict.fromkeys(found, float(number))
    return found


def facts(s: Setting) -> dict[str, Any]:
    """What the numbers belong to."""
    import triton

    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "smoke": s.smoke,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
    }
    if s.smoke:
        return found | {"device": "cpu"}
    return found | {"device": torch.cuda.get_device_name(), "driver": _driver(), "target": asdict(Target.here())}


def _driver() -> str:
    """The driver's version, as nvidia-smi tells it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return "unknown: there is no nvidia-smi"


def _without_variants(outcome: Outcome) -> Outcome:
    """The stage that compiles, in one row."""
    errors = sorted({error for row in outcome.rows for error in row["launchers"]})
    seconds = round(sum(row["seconds"] for row in outcome.rows), 1)
    row = {
        "variants": len(outcome.rows),
        "left_out": len(outcome.left_out),
        "cpu_seconds": seconds,
        "launchers": errors,
    }
    return replace(outcome, rows=[row], left_out=[])


def written(value: Any, depth: int = 0) -> str:
    """JSON with a line for each row of results, and numbers of no more digits than they have meaning."""
    if depth == WHOLE_DEPTH or not value or not isinstance(value, dict | list):
        return json.dumps(_rounded(value))
    indent = " " * (depth + 1)
    if isinstance(value, list):
        return "[\n" + ",\n".join(indent + json.dumps(_rounded(row)) for row in value) + "\n" + indent[1:] + "]"
    parts = [f"{indent}{json.dumps(key)}: {written(part, depth + 1)}" for key, part in value.items()]
    return "{\n" + ",\n".join(parts) + "\n" + indent[1:] + "}" + ("" if depth else "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


class Results:
    """`gpu.json`: facts, and for each stage what came of it."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        before = json.loads(path.read_text()) if path.exists() else {}
        self.content: dict[str, Any] = {**about, "stages": before.get("stages", {})}

    def put(self, stage: str, outcome: Outcome) -> None:
        """Writes the file anew, whole or not at all."""
        about = {"device": self.content["device"], "date": self.content["date"]}
        found = outcome if stage != COMPILE else _without_variants(outcome)
        self.content["stages"][stage] = about | asdict(found)
        partial = self.path.with_suffix(".partial")
        partial.write_text(written(self.content))
        partial.replace(self.path)


def environment(s: Setting, stage: str, tables: Path, folder: Path, hidden: bool) -> dict[str, str]:
    """What a worker is started with; `hidden`: without seeing the device."""
    found = {**os.environ, tuning.VARIABLE: str(tables)}
    for variable, name in FILES.items():
        if (folder / name).exists():
            found[variable] = str(folder / name)
    if s.smoke:
        found["TRITON_INTERPRET"] = "1"
    if stage == COMPILE:
        found[TARGET_VARIABLE] = Target.here().described()
        found |= {"CUDA_VISIBLE_DEVICES": ""} if hidden else {}
    return found


def run_stage(
    stage: str, stages: list[str], s: Setting, seconds: float, folder: Path, results: Results, *, hidden: bool = True
) -> Outcome:
    """One stage, in its processes."""
    shards = {COMPILE: s.workers, "check": 1 if s.smoke else CHECK_PROCESSES}.get(stage, 1)
    journals = Path(tempfile.mkdtemp(dir=folder))
    deadline = time.time() + seconds

    def command(path: Path, shard: int) -> list[str]:
        line = [sys.executable, "-m", "bench.gpu.worker", stage, "--journal", str(path), "--deadline", str(deadline)]
        line += ["--shard", str(shard), "--shards", str(shards), "--wanted", ",".join(stages)]
        return [*line, "--smoke"] if s.smoke else line

    return journal.supervise(
        command,
        journals,
        shards=shards,
        seconds=seconds,
        stall_seconds=s.stall_seconds * (SLOW_FACTOR if stage in SLOW else 1),
        environment=environment(s, stage, results.path.parent / "tuned", folder, hidden),
        report=lambda outcome: results.put(stage, outcome),
    )


def told(folder: Path, stage: str, outcome: Outcome) -> None:
    """Writes what later stages have to know."""
    if stage == COMPILE:
        (folder / FILES[precompile.VARIABLE]).write_text(json.dumps([row["variant"] for row in outcome.rows]))
    path = folder / FILES[journal.VARIABLE]
    before = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps(sorted({*before, *(line["note"] for line in outcome.crashes if line["note"])})))


def with_tables(out: Path) -> None:
    """Starts from the tables that ship."""
    folder = out / "tuned"
    folder.mkdir(parents=True, exist_ok=True)
    for table in tuning.TABLES.glob("*.json"):
        if not (folder / table.name).exists():
            shutil.copy(table, folder)


def main(arguments: list[str]) -> int:
    """Runs the stages that are asked for; 1 where something was wrong or failed."""
    options = parsed(arguments)
    s = setting(options.smoke)
    out = out_folder()
    with_tables(out)
    results = Results(out / ("smoke.json" if s.smoke else "gpu.json"), facts(s))
    seconds = limits(options.seconds)
    stages = [name for name in options.stages if name != COMPILE]
    compiled = [] if s.smoke or options.no_compile or not set(stages) & set(CALLS) else [COMPILE]
    with tempfile.TemporaryDirectory() as folder:
        for stage in [*compiled, *stages]:
            outcome = run_stage(stage, stages, s, seconds[stage], Path(folder), results)
            if stage == COMPILE and outcome.failed and not outcome.rows:
                # Without a visible device nothing could be compiled: once more with it.
                outcome = run_stage(stage, stages, s, seconds[stage], Path(folder), results, hidden=False)
            told(Path(folder), stage, outcome)
            counts = f"{len(outcome.rows)} rows, {len(outcome.failed)} failed, {len(outcome.left_out)} left out"
            print(f"== {stage}: {outcome.seconds:.0f} s, {counts}", flush=True)
    text = summary(results.content, [*compiled, *stages])
    (out / ("smoke.txt" if s.smoke else "gpu.txt")).write_text(text)
    print(text)
    found = [results.content["stages"][stage] for stage in stages]
    return int(any(o["failed"] or any(row.get("ok") is False for row in o["rows"]) for o in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
