"""Rounding against its peers on four unlike texts: perplexity, time and memory, calibrated on the same 64 x 512 tokens.

    python bench/quality/suite.py .demo/model.gguf --peer auto-round=VENV/bin/python --peer hqq=OTHER/bin/python

Every method runs in a process of its own (peers with the interpreter of their own environment), one after the other,
and hands back the weights that it would compute with (one that turned the model first, all of it); those are judged
here, in one runtime, against the same reference. A method whose result is in the folder already is neither run nor
judged again. The head stays bfloat16. Intervals are those of the judge: 95 %, over units of text, paired with the
reference.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from exam import Choices, Exam
from exchange import MEASURED, WEIGHTS
from texts import TEXTS, texts

from lowprec.artifacts.folder import canonical_json
from lowprec.formats import scheme_named
from lowprec.records import from_json, to_json
from lowprec.steps.judge import ratio_bounds
from lowprec.steps.load import Model, load
from lowprec.steps.measure import Run, compare, compare_tokens, paired, run_through
from lowprec.steps.scores import PairedScores
from lowprec.steps.stream import Overlay, Override, Stream, fast_dtype
from lowprec.steps.tokens import TokenSet

HERE = Path(__file__).parent
BATCH_TOKENS = 2048
CONFIDENCE = 0.95
EVERYTHING = "all"
SCORES, CHOICES = "scores.json", "choices.json"


@dataclass(frozen=True, kw_only=True)
class Ours:
    """One of lowprec's lines.

    Attributes:
        kind: the rounding's name; its `solver`, `steps` of learned rounding, and `passes` of healing.
        smoothed, weighted, two_sided, rotated: whether scales are merged between layers before, calibration tokens
            weigh, rows make up for each other's errors (tokens weigh then, too), hidden states are turned before.
    """

    kind: str
    solver: str = "gptq-quick"
    steps: int = 0
    passes: int = 0
    scheme: str = ""
    smoothed: bool = False
    weighted: bool = False
    two_sided: bool = False
    rotated: bool = False

    @property
    def name(self) -> str:
        """As the table shows it."""
        flags = ("weighted", "two_sided", "smoothed", "rotated")
        how = [self.kind, *(flag.replace("_", "-") for flag in flags if getattr(self, flag))]
        return f"lowprec {', '.join(how)}, {self.scheme}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of its worker."""
        flags = (self.smoothed, self.weighted, self.two_sided, self.rotated)
        return self.scheme, self.solver, *(str(int(n)) for n in (self.steps, self.passes, *flags))


PLAIN = Ours(kind="plain rounding", solver="rtn")
COMPENSATED = Ours(kind="compensated")
LEARNED = Ours(kind="learned", steps=40)
HEALED = Ours(kind="healed", passes=1)
BOTH = Ours(kind="learned and healed", steps=40, passes=1)
OURS = (
    replace(PLAIN, scheme="w4a16-g64"),
    replace(COMPENSATED, scheme="w4a16-g64"),
    replace(COMPENSATED, scheme="w4a16-g64", weighted=True),
    replace(COMPENSATED, scheme="w4a16-g64", two_sided=True),
    replace(COMPENSATED, scheme="w4a16-g64", rotated=True),
    replace(LEARNED, scheme="w4a16-g64"),
    replace(HEALED, scheme="w4a16-g64"),
    replace(HEALED, scheme="w4a16-g64", smoothed=True),
    replace(HEALED, scheme="w4a16-g64", rotated=True),
    replace(HEALED, scheme="w4a16-g64", two_sided=True),
    replace(HEALED, scheme="w4a16-g64", two_sided=True, rotated=True),
    replace(BOTH, scheme="w4a16-g64"),
    replace(BOTH, scheme="w4a16-g64", two_sided=True),
    replace(COMPENSATED, scheme="w4a16-g32-asym"),
    replace(HEALED, scheme="w4a16-g32-asym"),
    replace(HEALED, scheme="w4a16-g32-asym", rotated=True),
    replace(COMPENSATED, scheme="w3a16-g64"),
    replace(HEALED, scheme="w3a16-g64"),
    replace(HEALED, scheme="w3a16-g64", two_sided=True, rotated=True),
    replace(PLAIN, scheme="w8a16"),
    replace(PLAIN, scheme="w8a8-int8"),
    replace(PLAIN, scheme="w8a8-int8", smoothed=True),
    replace(COMPENSATED, scheme="w8a8-int8", smoothed=True),
    replace(HEALED, scheme="w8a8-int8", smoothed=True),
    replace(HEALED, scheme="w4a8-int8-g64"),
    replace(HEALED, scheme="w4a8-int8-g64", smoothed=True),
    replace(COMPENSATED, scheme="w4a8-int8-g64", rotated=True),
    replace(HEALED, scheme="w4a8-int8-g64", rotated=True),
    replace(HEALED, scheme="w4a8-int8-g64", smoothed=True, rotated=True),
    replace(HEALED, scheme="w4a8-int8-g64", two_sided=True, rotated=True),
)
# (peer, name, arguments of its worker)
PEERS = (
    ("auto-round", "AutoRound, 30 iterations, int4 g64 symmetric", ("4", "64", "symmetric", "30")),
    ("auto-round", "AutoRound, 200 iterations, int4 g64 symmetric", ("4", "64", "symmetric", "200")),
    ("auto-round", "AutoRound, 30 iterations, int4 g32 asymmetric", ("4", "32", "asymmetric", "30")),
    ("auto-round", "AutoRound, 30 iterations, int3 g64 symmetric", ("3", "64", "symmetric", "30")),
    ("llm-compressor", "llm-compressor GPTQ, int4 g64 symmetric", ("4", "64", "symmetric", "memoryless_minmax")),
    (
        "llm-compressor",
        "llm-compressor GPTQ, MSE scales, int4 g64 symmetric",
        ("4", "64", "symmetric", "memoryless_mse"),
    ),
    ("torchao", "torchao, int4 g64 symmetric", ("4", "64", "symmetric", "affine")),
    ("torchao", "torchao, HQQ scales, int4 g64 symmetric", ("4", "64", "symmetric", "hqq_scale_only")),
    ("bitsandbytes", "bitsandbytes NF4, g64", ("nf4", "64")),
    ("onnxruntime", "onnxruntime, int4 g64 symmetric", ("4", "64", "symmetric")),
    ("onnxruntime", "onnxruntime, int4 g64 asymmetric", ("4", "64", "asymmetric")),
    ("hqq", "HQQ, int4 g64, float zero points", ("4", "64")),
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the table: what is run, with which interpreter, on which arguments.

    `activation` is the format that the rounded layers' inputs are rounded to while it is judged.
    """

    name: str
    worker: str
    python: str
    arguments: tuple[str, ...]
    activation: str | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a method loses on one text: perplexity increase with its interval, and KL."""

    text: str
    tokens: int
    perplexity_increase: float
    lower: float
    upper: float
    kl_nats: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """One method's scores, time and memory."""

    method: str
    seconds: float
    peak_bytes: int
    scores: tuple[Score, ...]
    choices: Choices


def methods(peers: Mapping[str, str]) -> list[Method]:
    """Ours, and those peers whose interpreter is given."""
    found = [
        Method(
            name=ours.name,
            worker="worker_lowprec.py",
            python=sys.executable,
            arguments=ours.arguments,
            activation=scheme_named(ours.scheme).activation,
        )
        for ours in OURS
    ]
    return found + [
        Method(name=name, worker=f"worker_{peer.replace('-', '_')}.py", python=peers[peer], arguments=arguments)
        for peer, name, arguments in PEERS
        if peer in peers
    ]


def interpreters(peers: list[str]) -> dict[str, str]:
    """Peer -> interpreter, of texts NAME=PYTHON."""
    found = dict(peer.partition("=")[::2] for peer in peers)
    known = {peer for peer, _, _ in PEERS}
    if unknown := [name for name, python in found.items() if name not in known or not python]:
        raise typer.BadParameter(f"{unknown[0]!r}: give NAME=PYTHON with a name of {', '.join(sorted(known))}")
    return found


def prepare(model: Model, folder: Path, tokens: int) -> TokenSet:
    """Writes the bfloat16 model and the calibration windows; returns what is judged by."""
    found = texts(model.tokenizer, folder / "packages", tokens)
    if not (folder / "model" / "config.json").exists():
        config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if "quantization" not in k})
        fresh = type(model.module)(config).to(torch.bfloat16)
        fresh.load_state_dict(model.module.state_dict())
        fresh.save_pretrained(folder / "model")
        model.tokenizer.save_pretrained(folder / "model")
    save_file({"ids": found.calibration.contiguous()}, folder / "calibration.safetensors")
    return found.judged


def run(method: Method, folder: Path) -> Path:
    """Runs the method unless its result is there; returns its folder."""
    out = folder / method.name.replace(",", "").replace(" ", "-")
    if not (out / MEASURED).exists():
        given = [str(folder / "model"), str(folder / "calibration.safetensors"), str(out)]
        command = [method.python, str(HERE / method.worker), *given, *method.arguments]
        subprocess.run(command, check=True)
    return out


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Scores that were found before, and the digest of the text that they are of."""

    text: str
    scores: tuple[Score, ...]


class Bench:
    """The reference on the judged text, and what others lose against it."""

    def __init__(self, model: Model, judged: TokenSet, packages: Path) -> None:
        self._judged, self._batches = judged, judged.batches(BATCH_TOKENS)
        self._stream = Stream(model.module, model.forward, self._batches[0])
        # Reference and candidates in the same dtype: bfloat16's own noise, 0.001 nats, is in all rows.
        self._dtype = fast_dtype(self._stream)
        self._exam = Exam(self._stream, model.tokenizer, packages)

    @cached_property
    def _reference(self) -> Run:
        with self._stream.computing(self._dtype):
            return run_through(self._stream, self._batches)

    def scores(self, folder: Path, activation: str | None) -> tuple[Score, ...]:
        """Per text, and over all of them, what a method loses; read back where it was found on this text before."""
        file = folder / SCORES
        if file.exists():
            known = from_json(Judged, file.read_text())
            if known.text == self._judged.digest:
                return known.scores
        found = self._scores(*self._candidate(folder, activation))
        file.write_text(to_json(Judged(text=self._judged.digest, scores=found)))
        return found

    def choices(self, folder: Path, activation: str | None) -> Choices:
        """What a method answers; read back where it was asked before."""
        file = folder / CHOICES
        if file.exists():
            return from_json(Choices, file.read_text())
        stream, overlay = self._candidate(folder, activation)
        with self._stream.computing(self._dtype), stream.computing(self._dtype):
            found = self._exam.choices(stream, overlay)
        file.write_text(to_json(found))
        return found

    def _candidate(self, folder: Path, activation: str | None) -> tuple[Stream, Overlay]:
        """A method's model, the reference's unless it saved one of its own, and its weights.

        `activation` is what the inputs of the blocks' layers are rounded to.
        """
        stream = self._stream
        if (own := folder / "model").exists():
            turned = load(own)
            stream = Stream(turned.module, turned.forward, self._batches[0])
        weights = load_file(folder / WEIGHTS)
        return stream, {
            layer: Override(
                weight=lambda w=weights[name]: w.float(),  # type: ignore[misc]
                activation=activation,
                activation_exponents=weights.get(f"{layer}.exponents"),
            )
            for layer in stream.layers
            if (name := f"{layer}.weight") in weights and stream.block_of(layer) is not None
        }

    def _scores(self, stream: Stream, overlay: Overlay) -> tuple[Score, ...]:
        """Per text, and over all of them."""
        with self._stream.computing(self._dtype), stream.computing(self._dtype):
            candidate = run_through(stream, self._batches, overlay)
            table = compare(self._reference, [candidate], self._batches, compare_tokens)[0]
        found = paired(table, self._judged, self._batches)
        by_text = [(name, found.source == number) for number, name in enumerate(TEXTS)]
        return tuple(_score(name, found, mask) for name, mask in [*by_text, (EVERYTHING, found.source >= 0)])


def _score(text: str, found: PairedScores, mask: Any) -> Score:
    units = np.unique(found.unit[mask], return_inverse=True)[1]
    loss = np.bincount(units, (found.loss - found.loss_reference)[mask])
    tokens = np.bincount(units, found.tokens[mask])
    bounds = ratio_bounds(loss, tokens, 1.0 - (1.0 - CONFIDENCE) / 2.0)
    return Score(
        text=text,
        tokens=int(tokens.sum()),
        perplexity_increase=float(np.expm1(loss.sum() / tokens.sum())),
        lower=float(np.expm1(bounds.lower)),
        upper=float(np.expm1(bounds.upper)),
        kl_nats=float(found.kl[mask].sum() / tokens.sum()),
    )


def show(results: list[Result], console: Console) -> None:
    """The table."""
    columns = ("method", "s", "GB", *TEXTS, EVERYTHING, "KL", "right", "same letter")
    table = Table(*columns, title="perplexity increase [95 %]; multiple choice")
    for result in results:
        cells = [f"{s.perplexity_increase:+.2%} [{s.lower:.2%}, {s.upper:.2%}]" for s in result.scores]
        memory, kl = f"{result.peak_bytes / 1e9:.2f}", f"{result.scores[-1].kl_nats:.4f}"
        choices = (f"{result.choices.right:.1%}", f"{result.choices.as_reference:.1%}")
        table.add_row(result.method, f"{result.seconds:.0f}", memory, *cells, kl, *choices)
    console.print(table)


def main(
    model: Annotated[str, typer.Argument(help="A decoder: folder, GGUF file or name.")],
    out: Annotated[Path, typer.Option(help="Where results and intermediate files go.")] = Path(".bench/quality"),
    peer: Annotated[list[str] | None, typer.Option(help="NAME=PYTHON of a peer's environment; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each text to judge by.")] = 18_000,
    only: Annotated[str, typer.Option(help="Run the methods whose name holds this.")] = "",
    skip: Annotated[str, typer.Option(help="Leave out those whose name holds this.")] = "",
) -> None:
    """Runs the suite."""
    out.mkdir(parents=True, exist_ok=True)
    loaded = load(model)
    judged = prepare(loaded, out, tokens)
    known = methods(interpreters(peer or []))
    wanted = [m for m in known if only in m.name and not (skip and skip in m.name)]
    folders = {method.name: run(method, out) for method in wanted}
    activations = {method.name: method.activation for method in wanted}
    bench = Bench(loaded, judged, out / "packages")
    results = []
    for name, folder in folders.items():
        measured = json.loads((folder / MEASURED).read_text())
        result = Result(
            method=name,
            seconds=measured["seconds"],
            peak_bytes=measured["peak_bytes"],
            scores=bench.scores(folder, activations[name]),
            choices=bench.choices(folder, activations[name]),
        )
        results.append(result)
        show(results, Console(width=220))
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    record = {"environment": machine, "results": [asdict(r) for r in results]}
    (out / "quality.json").write_text(canonical_json(record))


if __name__ == "__main__":
    typer.run(main)
