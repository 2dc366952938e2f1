"""Precision that moves at run time, measured: a ladder on this machine, and the controller on bursts.

    python -m bench.dynamic ladder MODEL RUN [--out bench/results/ladder_cpu.json]
    python -m bench.dynamic bursts [--seeds 20] [--workers 2] [--ttft 5 ...] [--out bench/results/dynamic.json]
    python -m bench.dynamic live MODEL_OR_RUN [--out bench/results/dynamic_live.json]
    python -m bench.dynamic wide MODEL OUT
    python -m bench.dynamic million

`ladder` measures every rung's step times (`times.py`) and losses (`losses.py`); RUN is a finished `lowprec calibrate`
of MODEL. `bursts` replays three shapes of bursts, with peaks of 1.2 times what the top rung can serve, and calm
traffic; with `--ttft` the measured scene alone, with each of these objectives of the time to first token. `live` sends
requests to a server in this process, with the controller and without (`live.py`), along the ladder of a run or, of a
model, of a run that is made first; `wide` makes one that spends its time on weights, as larger ones do. The exit code
of `bursts` and `live` is 1 where a bar of `scenes.py` is missed. `million` times a replay of a million requests.
"""

import dataclasses
import json
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.dynamic.scenes import BARS, SCENES, Scene, SceneResult, run_scene
from lowprec.ladder import Ladder, Rung, read_ladder, write_ladder
from lowprec.runtime.controller import Controller
from lowprec.simulate.server import replay
from lowprec.simulate.traces import Lengths, make_trace

if TYPE_CHECKING:
    from bench.dynamic.live import LiveResult

RESULTS = Path(__file__).parent.parent / "results"
LADDER, DYNAMIC, LIVE, OBJECTIVES = (
    RESULTS / f"{name}.json" for name in ("ladder_cpu", "dynamic", "dynamic_live", "dynamic_objectives")
)
LOW = (12, 10, 8, 6, 4, 2, 0)
BATCHES, PROMPTS, CONTEXT = (1, 2, 3, 4, 6, 8, 16), (16, 32, 64, 128, 256, 512), 128

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def ladder(
    model: str, run: Path, tokens: int = 4096, repeats: int = 9, out: Annotated[Path, typer.Option()] = LADDER
) -> None:
    """Measures a ladder of seven rungs and writes it."""
    from bench.dynamic import losses, times
    from lowprec.artifacts.digests import sha256_of

    sizes = times.Sizes()
    low = [frozenset(range(n)) for n in LOW]
    taken = times.measure(times.decoder(sizes, times.LEVELS, 0.08), low, BATCHES, PROMPTS, CONTEXT, repeats)
    lost = losses.measure(model, run, [n / sizes.blocks for n in LOW], tokens)
    rungs = tuple(
        Rung(
            name=f"{n}/{sizes.blocks} INT4" if n else "INT8",
            levels=(*((f"blocks.{i}", "int4" if i < n else "int8") for i in range(sizes.blocks)), ("head", "int8")),
            loss_nats=bounds.estimate,
            loss_lower=max(0.0, bounds.lower),
            loss_upper=bounds.upper,
            loss_origin="measured",
            **found,
        )
        for n, bounds, found in zip(LOW, lost.bounds, taken, strict=True)
    )
    made = Ladder(
        model=f"{Path(model).name}; times of a decoder of {sizes.parameters() / 1e6:.0f} M weights",
        model_digest=sha256_of(Path(model))[:16],
        device=times.machine(),
        levels=("int4", "int8"),
        context_tokens=CONTEXT,
        loss_tokens=lost.tokens,
        confidence=losses.CONFIDENCE,
        rungs=rungs,
        notes=(
            ("times", f"{sizes}, levels {' and '.join(times.LEVELS)} side by side, processor seconds of one thread"),
            (
                "losses",
                f"KL of {Path(model).name} with the same share of its {lost.blocks} blocks in INT4, head in INT8",
            ),
        ),
    )
    write_ladder(made, out)


@app.command()
def bursts(
    seeds: int = 20,
    workers: int = 2,
    ladder_path: Annotated[Path, typer.Option("--ladder")] = LADDER,
    ttft: Annotated[list[float] | None, typer.Option(help="Seconds to the first token; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Replays every scene, or the first with each objective of the time to first token; writes what came of it."""
    measured = read_ladder(ladder_path)
    scenes = tuple(dataclasses.replace(SCENES[0], ttft_s=seconds) for seconds in ttft) if ttft else SCENES
    with ProcessPoolExecutor(workers) as pool:
        results = [run_scene(scene, measured, seeds, pool) for scene in scenes]
    record = {
        "bars": dataclasses.asdict(BARS),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "seeds": seeds,
        "scenes": [dataclasses.asdict(r) for r in results],
    }
    out = out or (OBJECTIVES if ttft else DYNAMIC)
    out.write_text(json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n")
    for result in results:
        _print(result)
    sys.exit(0 if all(result.meets for result in results) else 1)


def _print(result: SceneResult) -> None:
    scene, console = result.scene, Console(width=150)
    ratio = result.bottom_per_s / result.top_per_s
    console.print(
        f"\n[bold]{scene.name}[/] ({result.origin}): {scene.slots} slots, capacity {result.top_per_s:.2f} "
        f"requests/s at the top, {ratio:.2f} times that at the bottom; objectives {result.ttft_s:.2f} s and "
        f"{1e3 * result.tpot_s:.0f} ms; budget {result.budget_nats:.3f} nats"
    )
    names = ("shape", "late: static", "controller", "oracle", "change; oracle's", "TTFT p95", "times better (least)")
    table = Table(*names, "worst window", "switches/s", "back in (most)", "first; backlog; beyond it, most")
    for s in result.shapes:
        back = f"{s.median_return_s:.1f} s"
        back += " (never)" if s.longest_return_s is None else f" ({s.longest_return_s:.1f} s)"
        table.add_row(
            s.shape,
            *(str(n) for n in (s.static_violations, s.violations, s.oracle_violations)),
            f"{100 * s.change:+.1f} %; {100 * s.oracle_change:+.1f} %",
            f"{s.static_ttft_p95_s:.2f} s -> {s.ttft_p95_s:.2f} s",
            f"{s.ttft_ratio:.1f} ({s.least_ttft_ratio:.1f})",
            f"{s.worst_window_nats:.4f}",
            str(s.most_switches_in_a_second),
            back,
            "; ".join(
                "never" if t is None else f"{t:.1f} s"
                for t in (s.longest_regain_s, s.longest_backlog_s, s.longest_beyond_backlog_s)
            ),
        )
    console.print(table)
    console.print(
        f"low load: {result.calm_switches} switches in {result.calm_requests:,} requests; half load: "
        f"{result.half_switches} in {result.half_requests:,}"
    )
    for missed in result.missed:
        console.print(f"[red]missed[/]: {missed}")


@app.command()
def live(
    source: Annotated[Path, typer.Argument(help="Folder of a run with a ladder, or a model.")],
    seconds: float = 90.0,
    seeds: int = 2,
    slots: int = 8,
    prompt_tokens: int = 32,
    output_tokens: int = 32,
    work: Annotated[Path, typer.Option(help="Where the run of a model is kept.")] = Path(".bench/live"),
    out: Annotated[Path, typer.Option()] = LIVE,
) -> None:
    """Serves bursts on this machine, with the controller and at static INT8."""
    from bench.dynamic.live import LiveScene, measure, run_of

    lengths = Lengths(prompt=prompt_tokens, output=output_tokens)
    found = measure(run_of(source, work), LiveScene(seconds=seconds, seeds=seeds, slots=slots, lengths=lengths))
    record = {"bars": dataclasses.asdict(BARS), "python": platform.python_version(), **dataclasses.asdict(found)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n")
    _print_live(found)
    sys.exit(1 if found.missed else 0)


def _print_live(found: "LiveResult") -> None:
    console = Console(width=150)
    console.print(
        f"{found.model} on {found.device}: {found.top_per_s:.2f} requests/s at the top, "
        f"{found.bottom_per_s / found.top_per_s:.2f} times that at the bottom; base {found.base_per_s:.2f}, peak "
        f"{found.peak_per_s:.2f}; objectives {found.ttft_s:.2f} s and {1e3 * found.tpot_s:.0f} ms; budget "
        f"{found.budget_nats:.3f} nats"
    )
    table = Table("seed", "policy", "late", "TTFT p50, p95", "loss, worst window", "switches", "at the top", "back in")
    for seed, pair in enumerate(found.results):
        for result in pair:
            top = result.tokens[-1].tokens / sum(t.tokens for t in result.tokens)
            table.add_row(
                *(str(seed), result.policy, f"{result.violations} of {result.requests}"),
                f"{result.ttft_s.p50:.2f} s, {result.ttft_s.p95:.2f} s",
                f"{result.loss_nats:.4f}, {result.worst_window_nats:.4f}",
                *(str(result.switches), f"{100 * top:.0f} %"),
                "" if result.return_s is None else f"{result.return_s:.1f} s",
            )
    console.print(table)
    console.print(f"late {100 * found.violations_change:+.1f} %, TTFT p95 {found.ttft_ratio:.2f} times better")
    for missed in found.missed:
        console.print(f"[red]missed[/]: {missed}")


@app.command()
def wide(
    like: Annotated[Path, typer.Argument(help="A model, whose tokenizer is taken.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Writes a model of wide layers and random weights, for `live`."""
    from bench.dynamic.wide import write_wide

    print(f"{out}: {write_wide(like, out) / 1e6:.0f} M random weights")


@app.command()
def million(
    requests: int = 1_000_000, ladder_path: Annotated[Path, typer.Option("--ladder")] = LADDER, load: float = 0.9
) -> None:
    """Times a replay through the controller, in processor seconds and in seconds."""
    scene: Scene = SCENES[-1]
    made = scene.setting(read_ladder(ladder_path))
    trace = make_trace(
        "diurnal",
        base_per_s=0.2 * made.top_per_s,
        peak_per_s=2 * load * made.top_per_s - 0.2 * made.top_per_s,
        seconds=requests / (load * made.top_per_s),
        lengths=scene.lengths,
        seed=0,
    )
    policy = Controller(made.ladder, made.objectives, made.budget, slots=scene.slots, longest_prompt=scene.chunk)
    wall, processor = time.perf_counter(), time.process_time()
    outcome = replay(trace, made.server, policy)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    tokens = sum(n for _, n in outcome.tokens)
    print(
        f"{len(trace):,} requests, {tokens:,} tokens, {policy.switches} switches: {processor:.1f} s of the processor, "
        f"{wall:.1f} s"
    )


if __name__ == "__main__":
    app()
