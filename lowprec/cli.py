"""The command line: arguments, progress, exit codes.

Exit codes: 0 the verdict is within the budget, 1 over or inconclusive, 2 an error (one message, no traceback),
130 interrupted.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from lowprec.errors import ConfigError, LowprecError
from lowprec.records import Workload
from lowprec.version import __version__

INTERRUPTED = 130

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"lowprec {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Give it a model and a loss budget: it returns the cheapest model that stays inside, with the evidence."""


@contextlib.contextmanager
def _interruptible(said: str) -> Iterator[None]:
    """Ctrl-C is no error; `said` tells what is left of the work."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print(said, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
@_interruptible("interrupted: the same command resumes the run")
def calibrate(
    model: Annotated[str, typer.Argument(help="Hugging Face name or folder, or a GGUF file.")],
    budget: Annotated[str, typer.Option(help="Loss that is allowed: 5%, 0.05, or '0.05 abs'.")] = "5%",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; an earlier one is resumed.")] = Path(
        "lowprec-out"
    ),
    target: Annotated[
        str, typer.Option(help="Runtime that the plan is made for: torch, onnxruntime, openvino.")
    ] = "torch",
    device: Annotated[str, typer.Option(help="cpu, cuda, or a device to plan for: h100, h200, a100, ...")] = "cpu",
    objective: Annotated[str, typer.Option(help="What is made least: time, bytes or dollars.")] = "time",
    metric: Annotated[str, typer.Option(help="perplexity (default), kl, top1, task:FILE; encoders: cosine_loss.")] = "",
    effort: Annotated[str, typer.Option(help="fast, balanced or best.")] = "balanced",
    smooth: Annotated[
        bool, typer.Option(help="Merge scales between layers, so that less is lost by rounding; the function stays.")
    ] = True,
    rotate: Annotated[
        bool,
        typer.Option(
            help="Put hidden states into a random basis, so that less is lost by rounding inputs; the function stays. "
            "A head that was tied to the embedding gets a weight of its own."
        ),
    ] = False,
    heal: Annotated[
        bool | None, typer.Option(help="Tune the scales of each measured mix end to end; left out, the effort decides.")
    ] = None,
    embeddings: Annotated[
        bool | None,
        typer.Option(
            help="Round embeddings, too; the artefact is then in lowprec's own form. "
            "Left out: when bytes are the objective."
        ),
    ] = None,
    ladder: Annotated[
        bool,
        typer.Option(
            help="Make rungs, too, between which one set of INT4 and INT8 weights switches while it serves: "
            "nested/ and ladder.json in the run's folder."
        ),
    ] = False,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="What the KV cache may be kept in: 8 (INT8, layer by layer), fp8 or int8-channel (all layers), none; "
            "left out: what the target offers."
        ),
    ] = None,
    schemes: Annotated[
        str, typer.Option(help="Families or schemes that may be chosen; left out: what the target offers.")
    ] = "",
    data: Annotated[list[str] | None, typer.Option(help="Text, JSONL, Parquet or datasets name; repeatable.")] = None,
    batch: Annotated[int, typer.Option(help="Workload: sequences at a time.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Workload: tokens of a prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(help="Workload: tokens of an answer.")] = 128,
    dollars_per_hour: Annotated[float | None, typer.Option(help="Price of the device.")] = None,
    calibration_device: Annotated[str, typer.Option(help="Where calibration computes: cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the splits and of sampling.")] = 0,
    workers: Annotated[int, typer.Option(help="Threads that round layers; no effect on results.")] = 2,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Measure a model, choose a scheme for each layer within the loss budget, prove it and write it.

    --debug anywhere shows tracebacks.
    """
    # Heavy imports come after the arguments were understood, so that --help answers at once.
    from lowprec.api import REPORT_HTML, optimize
    from lowprec.report import RunProgress, print_summary
    from lowprec.settings import parse_budget

    _quiet_libraries()
    chosen: Any = objective
    workload = Workload(batch=batch, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    with RunProgress() as progress:
        report = optimize(
            model,
            out=out,
            budget=parse_budget(budget, metric) if metric else budget,
            target=target,
            device=device,
            objective=chosen,
            workload=workload,
            effort=effort,
            smooth=smooth,
            rotate=rotate,
            heal=heal,
            embeddings=embeddings,
            ladder=ladder,
            kv_cache=kv_cache,
            schemes=[name.strip() for name in schemes.split(",") if name.strip()],
            data=data or (),
            dollars_per_hour=dollars_per_hour,
            calibration_device=calibration_device,
            seed=seed,
            workers=workers,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    print_summary(report, Console(), report_path=str(out / REPORT_HTML))
    raise typer.Exit(0 if report.verdict == "within" else 1)


@app.command()
@_interruptible("interrupted: nothing was written")
def export(
    source: Annotated[Path, typer.Argument(help="Folder of a finished run, or of its artefact.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; an earlier export is replaced.")],
    target: Annotated[
        str, typer.Option(help="What is written: onnx, onnxruntime, openvino; ascend, migraphx, qnn, tensorrt, webgpu.")
    ] = "onnx",
    accuracy: Annotated[
        str,
        typer.Option(help="Inputs of integer weights in onnxruntime: planned, exact (float32), fast (INT8 blocks)."),
    ] = "planned",
    form: Annotated[str | None, typer.Option(help="Form of a target that has several: qnn a16w8, a8w8, ...")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens of a call, for forms of fixed sizes.")] = None,
    past: Annotated[int | None, typer.Option(help="Tokens in the cache before it, for forms of fixed sizes.")] = None,
) -> None:
    """Write a finished run's model for another runtime, and check it there.

    --debug anywhere shows tracebacks.
    """
    from lowprec.onnx import EXPORT_TARGETS, check_target, export_onnx
    from lowprec.report import RunProgress, numbers
    from lowprec.targets.exporting import EXPORTERS, export_for

    _quiet_libraries()
    known = (*EXPORT_TARGETS, *EXPORTERS)
    check_target(target, accuracy, known)
    with RunProgress() as progress, progress.step("export"):
        if target in EXPORTERS:
            written = export_for(target, source, out, form=form, sequence=sequence, past=past)
        elif (form, sequence, past) != (None, None, None):
            raise ConfigError(f"the target {target} has one form, of free sizes: give no --form, --sequence or --past")
        else:
            written = export_onnx(source, out, target=target, accuracy=accuracy)
    size = numbers.plain(numbers.byte_size(written.bytes))
    error = written.largest_error
    # Where no runtime computed it there is nothing to tell of its outputs.
    compared = "" if error is None else f"; outputs within {error:.1e} of the artefact's"
    Console().print(
        f"{_escape(str(out))}: {written.kind}, {written.layers} layers in codes, {size}{compared}", soft_wrap=True
    )
    for note in written.notes:
        Console().print(f"note: {_escape(note)}", soft_wrap=True)


@app.command()
@_interruptible("interrupted: nothing was written")
def simulate(
    ladder: Annotated[Path, typer.Option(help="JSON of the model's ladder: rungs with loss and step times.")],
    trace: Annotated[
        str,
        typer.Option(
            help="poisson, burst-step, burst-ramp, burst-train, diurnal; or a CSV file with the columns arrival "
            "(seconds or date), prompt, output (tokens) and, if wanted, effort. BurstGPT's and Azure's names are known."
        ),
    ] = "burst-step",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for simulation.json and simulation.html.")] = Path(
        "lowprec-simulation"
    ),
    seed: Annotated[int, typer.Option(help="Seed of a made trace; the same seed gives the same result.")] = 0,
    slo_ttft: Annotated[
        float | None,
        typer.Option(
            help="Objective: seconds to the first token. Left out: 10 times an idle server's at the top rung."
        ),
    ] = None,
    slo_tpot: Annotated[
        float | None,
        typer.Option(help="Objective: seconds per token after it. Left out: 1.5 times a full step's at the top rung."),
    ] = None,
    percentile: Annotated[float, typer.Option(help="Share of requests that is to meet the objectives.")] = 0.95,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Loss allowed, in nats per token over any 10,000 tokens. Left out: half way between top and bottom."
        ),
    ] = None,
    burst_share: Annotated[
        float, typer.Option(help="Share of the budget that may be saved up and spent at once.")
    ] = 0.2,
    slots: Annotated[int, typer.Option(help="Sequences that are decoded together.")] = 8,
    chunk: Annotated[int, typer.Option(help="Tokens of prompts that one pass reads.")] = 512,
    load: Annotated[float, typer.Option(help="Made traces: base rate, 1 being all the top rung can serve.")] = 0.5,
    peak: Annotated[float, typer.Option(help="Made traces: rate at the peak, in the same unit.")] = 1.2,
    seconds: Annotated[float, typer.Option(help="Made traces: length.")] = 300.0,
    prompt_tokens: Annotated[int, typer.Option(help="Made traces: mean tokens of a prompt.")] = 256,
    output_tokens: Annotated[int, typer.Option(help="Made traces: mean tokens of an answer.")] = 128,
    effort: Annotated[
        str, typer.Option(help="How low requests may be taken: low, medium, high; or shares, low:0.7,high:0.3.")
    ] = "low",
    speedup: Annotated[float, typer.Option(help="CSV: how many times as fast its requests arrive.")] = 1.0,
    static: Annotated[
        list[str] | None, typer.Option(help="Rung to compare with; repeatable. Left out: the top and the bottom.")
    ] = None,
    truth: Annotated[float, typer.Option(help="How many times as long as the ladder says passes really take.")] = 1.0,
) -> None:
    """Replay arrivals through the controller that moves precision at run time, against fixed rungs and an oracle.

    --debug anywhere shows tracebacks.
    """
    from lowprec.ladder import read_ladder
    from lowprec.report.simulation import print_comparison, write_simulation
    from lowprec.runtime.spending import LossBudget
    from lowprec.simulate.study import Load, default_budget, parse_efforts, study
    from lowprec.simulate.traces import Lengths

    rungs = read_ladder(ladder)
    nats = default_budget(rungs).nats_per_token if budget is None else budget
    found = study(
        rungs,
        trace,
        load=Load(
            base=load,
            peak=peak,
            seconds=seconds,
            lengths=Lengths(prompt=prompt_tokens, output=output_tokens),
            efforts=parse_efforts(effort),
        ),
        slots=slots,
        chunk=chunk,
        truth=truth,
        ttft_s=slo_ttft,
        tpot_s=slo_tpot,
        percentile=percentile,
        budget=LossBudget(nats_per_token=nats, burst_share=burst_share),
        statics=static,
        speedup=speedup,
        seed=seed,
    )
    page = write_simulation(found, out)
    print_comparison(found, Console(), report_path=str(page))


@app.command()
@_interruptible("interrupted: nothing was written")
def nest(
    artefact: Annotated[Path, typer.Argument(help="Folder of a finished artefact with INT4 layers.")],
    model: Annotated[str, typer.Option(help="What it was made from: name, folder or GGUF file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; an earlier artefact is replaced.")],
    data: Annotated[list[str] | None, typer.Option(help="Text, JSONL, Parquet or datasets name; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of text.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Give an INT4 artefact a second level of nearly 8 bits, which a running model can switch to and from.

    --debug anywhere shows tracebacks.
    """
    from lowprec.nesting import nest_artefact
    from lowprec.report import RunProgress

    _quiet_libraries()
    with RunProgress() as progress:
        written = nest_artefact(
            artefact, model, out, data=data or (), seed=seed, trust_remote_code=trust_remote_code, progress=progress
        )
    Console().print(
        f"{_escape(str(out))}: {len(written.layers)} layers of two levels, {written.bits_per_weight:.3f} bits a "
        f"weight; {len(written.single)} quantised layers of one level",
        soft_wrap=True,
    )


def _quiet_libraries() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", module=r"(transformers|torch|compressed_tensors)\b.*")


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Entry point of the command `lowprec`; `--debug` anywhere shows tracebacks.

    Args:
        arguments: None for those of the process.
        program: what usage lines call it; None for the process's own name.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    try:
        app(args=[a for a in given if a != "--debug"], prog_name=program, standalone_mode=True)
    except LowprecError as error:
        if debug:
            raise
        _complain(str(error))
    except Exception as error:
        if debug:
            raise
        _complain(f"{type(error).__name__}: {error}. This is a bug of lowprec; --debug shows where")


def _complain(message: str) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error:[/] {_escape(message)}", soft_wrap=True)
    sys.exit(2)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
