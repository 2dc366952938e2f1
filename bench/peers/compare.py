"""lowprec's export in onnxruntime against the runtimes that people use, on one machine, in one run.

    bash bench/peers/setup.sh .bench/peers           # environments, once
    python bench/peers/compare.py .demo/model.gguf RUN --environments .bench/peers --work .bench/onnxruntime

RUN is a finished run (or an artefact). Each contender is a process with the same number of threads; rounds go from one
to the next, so that what else happens on the machine meets all alike, and ratios are taken within a round. Prefill: so
many tokens, to the first token made. Decode: the tokens after it. Writes JSON with versions and p20, p50, p80; exit
code 1 when a bar is missed.
"""

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import models
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from lowprec.artifacts.folder import canonical_json

HERE = Path(__file__).parent
OURS = "lowprec"
FLOAT = ("lowprec fp32", "lowprec fp32, standard operators", "onnxruntime-genai fp32")
BARS = {"decode": {"float": 3.3, "onnxruntime-genai int4": 1.0, "llama.cpp": 1.0}, "prefill": {"float": 2.0}}
WAIT = 120.0
"""Seconds for an answer; a worker that needs longer has failed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A worker's command: the Python that runs it, its file, and the model."""

    python: Path
    worker: str
    model: Path

    def start(self, threads: int) -> "subprocess.Popen[str]":
        """The process, with its first line still to be read."""
        return subprocess.Popen(
            [str(self.python), str(HERE / self.worker), str(self.model), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip


def main(
    model: Annotated[str, typer.Argument(help="The model: a GGUF file, which llama.cpp runs as it is, or a folder.")],
    run: Annotated[Path, typer.Argument(help="A finished run, or an artefact.")],
    environments: Annotated[Path, typer.Option(help="Where setup.sh made them.")],
    work: Annotated[Path, typer.Option(help="Folder for what is built; kept, and used again.")],
    accuracy: Annotated[str, typer.Option(help="planned, exact or fast: see lowprec export.")] = "planned",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 12,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of prefill.")] = 512,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of decode.")] = 64,
    out: Annotated[Path, typer.Option(help="JSON file.")] = HERE.parent / "results" / "onnxruntime.json",
) -> None:
    """Compare decode and prefill; exit code 1 when a bar is missed."""
    console = Console()
    contenders = prepared(model, run, environments.absolute(), work.absolute(), accuracy)
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(running(c, threads)) for name, c in contenders.items()}
        versions = {name: _answer(name, worker)["versions"] for name, worker in workers.items()}
        # The first round warms up.
        seen = [round_of(workers, number, prompt, tokens) for number in range(rounds + 1)][1:]
    result = {
        "machine": {"processor": processor(), "system": platform.platform(), "threads": threads},
        "asked": {"prompt": prompt, "tokens": tokens, "rounds": rounds, "accuracy": accuracy},
        "versions": {"lowprec": version("lowprec"), **versions},
        "speed": {name: speeds([r[name] for r in seen], prompt, tokens) for name in contenders},
        "ratios": {kind: ratios(seen, kind) for kind in BARS},
        "same_text_in_genai": seen[0][OURS]["made"] == seen[0][f"{OURS}, in onnxruntime-genai"]["made"],
    }
    out.write_text(canonical_json(result), encoding="utf-8")
    show(console, result)
    missed = [
        f"{kind} against {name}: {result['ratios'][kind][name]['p50']:.2f}, {bar} asked"
        for kind, bars in BARS.items()
        for name, bar in bars.items()
        if name in result["ratios"][kind] and result["ratios"][kind][name]["p50"] < bar
    ]
    for line in missed:
        console.print(f"missed: {line}")
    raise typer.Exit(1 if missed else 0)


def prepared(model: str, run: Path, environments: Path, work: Path, accuracy: str) -> dict[str, Contender]:
    """All contenders whose environment there is, their models built."""
    here, genai, llama = Path(sys.executable), environments / "genai/bin/python", environments / "llama/bin/python"
    if not genai.exists():
        raise SystemExit(f"{genai} is missing: bash bench/peers/setup.sh {environments}")
    ours = models.exported(run, work / f"lowprec-{accuracy}", accuracy)
    plain = models.plain(model, work / "plain")
    standard = models.in_float32(plain, work / "fp32-standard", fused=False)
    fused = models.in_float32(plain, work / "fp32", fused=True)
    found = {
        OURS: Contender(python=here, worker="worker_lowprec.py", model=ours),
        FLOAT[0]: Contender(python=here, worker="worker_lowprec.py", model=fused),
        FLOAT[1]: Contender(python=here, worker="worker_lowprec.py", model=standard),
        f"{OURS}, in onnxruntime-genai": Contender(python=genai, worker="worker_genai.py", model=ours),
    }
    for precision in ("fp32", "int4"):
        folder = models.built(genai, plain, work / f"genai-{precision}", precision)
        found[f"onnxruntime-genai {precision}"] = Contender(python=genai, worker="worker_genai.py", model=folder)
    if model.endswith(".gguf") and llama.exists():
        found["llama.cpp"] = Contender(python=llama, worker="worker_llama.py", model=Path(model).absolute())
    return found


@contextlib.contextmanager
def running(contender: Contender, threads: int) -> Iterator["subprocess.Popen[str]"]:
    """The worker's process; ended with the context."""
    worker = contender.start(threads)
    try:
        yield worker
    finally:
        worker.kill()
        worker.wait()


def round_of(
    workers: Mapping[str, "subprocess.Popen[str]"], number: int, prompt: int, tokens: int
) -> dict[str, dict[str, Any]]:
    """An answer of each worker, asked in an order that turns from round to round."""
    names = list(workers)
    turned = names[number % len(names) :] + names[: number % len(names)]
    return {name: ask(name, workers[name], prompt, tokens) for name in turned}


def ask(name: str, worker: "subprocess.Popen[str]", prompt: int, tokens: int) -> dict[str, Any]:
    """One answer of a worker: its seconds, and the tokens that it made."""
    assert worker.stdin is not None
    worker.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
    worker.stdin.flush()
    return _answer(name, worker)


def _answer(name: str, worker: "subprocess.Popen[str]") -> dict[str, Any]:
    assert worker.stdout is not None
    timer = threading.Timer(WAIT, worker.kill)
    timer.start()
    line = worker.stdout.readline()
    timer.cancel()
    if not line:
        raise SystemExit(f"{name}: its worker ended with {worker.wait()}; run {worker.args} to see why")
    found: dict[str, Any] = json.loads(line)
    return found


def spread(numbers: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    return {f"p{q}": float(np.percentile(numbers, q)) for q in (20, 50, 80)}


def speeds(answers: list[dict[str, Any]], prompt: int, tokens: int) -> dict[str, Any]:
    """Tokens a second, and the most memory that the process ever had."""
    return {
        "prefill": spread([prompt / a["prefill"] for a in answers]),
        "decode": spread([(tokens - 1) / a["decode"] for a in answers]),
        "peak_bytes": max(a["peak_bytes"] for a in answers),
    }


def ratios(seen: list[dict[str, Any]], kind: str) -> dict[str, dict[str, float]]:
    """How many times as fast as each contender, and as the fastest in float32, lowprec was in each round."""

    def ratio(name: str) -> list[float]:
        return [r[name][kind] / r[OURS][kind] for r in seen]

    found = {name: spread(ratio(name)) for name in seen[0] if name != OURS}
    best = min(FLOAT, key=lambda name: float(np.median([r[name][kind] for r in seen])))
    return {**found, "float": spread(ratio(best))}


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def show(console: Console, result: Mapping[str, Any]) -> None:
    """The table."""
    table = Table("", "decode tok/s", "prefill tok/s", "lowprec, times decode", "times prefill", "peak MB")
    for name, speed in result["speed"].items():
        times = [result["ratios"][kind].get(name) for kind in ("decode", "prefill")]
        table.add_row(
            name,
            *(f"{speed[kind]['p50']:.0f}" for kind in ("decode", "prefill")),
            *("" if t is None else f"{t['p50']:.2f} ({t['p20']:.2f} to {t['p80']:.2f})" for t in times),
            f"{speed['peak_bytes'] / 1e6:.0f}",
        )
    console.print(table)
    for kind in ("decode", "prefill"):
        console.print(f"{kind}, against the fastest in float32: {result['ratios'][kind]['float']['p50']:.2f}")
    console.print(f"the same text from onnxruntime-genai: {result['same_text_in_genai']}")


if __name__ == "__main__":
    typer.run(main)
