"""Rounding against its peers on four unlike texts: loss, time and memory, calibrated on the same 64 windows.

    python bench/quality/suite.py .demo/model.gguf --peer auto-round=VENV/bin/python --peer hqq=OTHER/bin/python
    python bench/quality/suite.py ENCODER --out .bench/encoder --peer ...

Every method runs in a process of its own (peers with the interpreter of their own environment), one after the other,
and hands back the weights that it would compute with (one that turned the model first, all of it); those are judged
here, in one runtime, against the same reference: decoders by perplexity, sentence encoders by how far embeddings move.
A method whose result is in the folder already is neither run nor judged again. A decoder's head, an encoder's pooler
and all embeddings stay as they are. Ours are rounded by `gptq-quick`, which searches each grid once, as `--effort fast`
does; `balanced` and `best` take `gptq`. Intervals are those of the judge: 95 %, over units of text, paired with the
reference.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from decoders import Decoders
from encoders import Encoders
from exchange import MEASURED
from judging import EVERYTHING, Cost, Method
from texts import TEXTS, texts

from lowprec.artifacts.folder import canonical_json
from lowprec.formats import scheme_named
from lowprec.steps.load import Model, load
from lowprec.steps.tokens import TokenSet

HERE = Path(__file__).parent
GRID = re.compile(r"w(\d)a\d+-g(\d+)")


@dataclass(frozen=True, kw_only=True)
class Ours:
    """One of lowprec's lines; `solver` is not in its name, as all that are not rounded plainly have the same.

    Attributes:
        kind: the rounding's name; its `solver`, `steps` of learned rounding, and `passes` of healing.
        smoothed, weighted, two_sided, rotated: whether scales are merged between layers before, calibration tokens
            weigh, rows make up for each other's errors, hidden states are turned before.
    """

    kind: str
    solver: str = "gptq-quick"
    steps: int = 0
    passes: float = 0.0
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
        return self.scheme, self.solver, str(self.steps), f"{self.passes:g}", *(str(int(n)) for n in flags)


PLAIN = Ours(kind="plain rounding", solver="rtn")
COMPENSATED = Ours(kind="compensated")
LEARNED = Ours(kind="learned", steps=40)
HEALED = Ours(kind="healed", passes=1)
HALF = Ours(kind="healed by half the text", passes=0.5)
BOTH = Ours(kind="learned and healed", steps=40, passes=1)
OURS = (
    replace(PLAIN, scheme="w4a16-g64"),
    replace(COMPENSATED, scheme="w4a16-g64"),
    replace(COMPENSATED, scheme="w4a16-g64", weighted=True),
    replace(COMPENSATED, scheme="w4a16-g64", two_sided=True),
    replace(COMPENSATED, scheme="w4a16-g64", rotated=True),
    replace(COMPENSATED, scheme="w4a16-g64", two_sided=True, rotated=True),
    replace(COMPENSATED, scheme="w4a16-g64", weighted=True, two_sided=True, rotated=True),
    replace(LEARNED, scheme="w4a16-g64"),
    replace(HEALED, scheme="w4a16-g64"),
    replace(HEALED, scheme="w4a16-g64", smoothed=True),
    replace(HEALED, scheme="w4a16-g64", rotated=True),
    replace(HEALED, scheme="w4a16-g64", two_sided=True),
    replace(HALF, scheme="w4a16-g64", two_sided=True, rotated=True),
    replace(HEALED, scheme="w4a16-g64", two_sided=True, rotated=True),
    replace(HEALED, scheme="w4a16-g64", weighted=True, two_sided=True, rotated=True),
    replace(BOTH, scheme="w4a16-g64"),
    replace(BOTH, scheme="w4a16-g64", two_sided=True),
    replace(COMPENSATED, scheme="w4a16-g32-asym"),
    replace(HEALED, scheme="w4a16-g32-asym"),
    replace(HEALED, scheme="w4a16-g32-asym", rotated=True),
    replace(HALF, scheme="w4a16-g32-asym", two_sided=True, rotated=True),
    replace(COMPENSATED, scheme="w3a16-g64"),
    replace(HEALED, scheme="w3a16-g64"),
    replace(COMPENSATED, scheme="w3a16-g64", two_sided=True, rotated=True),
    replace(COMPENSATED, scheme="w3a16-g64", weighted=True, two_sided=True, rotated=True),
    replace(HALF, scheme="w3a16-g64", two_sided=True, rotated=True),
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
TWO_SIDED, HEALED_TWO_SIDED = (replace(kind, two_sided=True) for kind in (COMPENSATED, HEALED))
OURS_OF_ENCODERS = tuple(
    replace(kind, scheme=scheme)
    for scheme in ("w4a16-g64", "w4a16-g32-asym", "w3a16-g64", "w8a16", "w8a8-int8")
    for kind in (PLAIN, COMPENSATED, HEALED, TWO_SIDED, HEALED_TWO_SIDED)
)
# (peer, name, arguments of its worker, bits and group size first)
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


def methods(peers: Mapping[str, str], ours: tuple[Ours, ...] = OURS) -> list[Method]:
    """Ours, and those peers whose interpreter is given."""
    found = [
        Method(
            name=line.name,
            worker="worker_lowprec.py",
            python=sys.executable,
            arguments=line.arguments,
            activation=scheme_named(line.scheme).activation,
            grid=_grid(*match.groups()) if (match := GRID.match(line.scheme)) else "",
        )
        for line in ours
    ]
    return found + [
        Method(
            name=name,
            worker=f"worker_{peer.replace('-', '_')}.py",
            python=peers[peer],
            arguments=arguments,
            grid=_grid(*arguments[:2]),
            peer=True,
        )
        for peer, name, arguments in PEERS
        if peer in peers
    ]


def _grid(bits: str, group: str) -> str:
    return f"{bits.removeprefix('nf')} bits, groups of {group}"


def interpreters(peers: list[str]) -> dict[str, str]:
    """Peer -> interpreter, of texts NAME=PYTHON."""
    found = dict(peer.partition("=")[::2] for peer in peers)
    known = {peer for peer, _, _ in PEERS}
    if unknown := [name for name, python in found.items() if name not in known or not python]:
        raise typer.BadParameter(f"{unknown[0]!r}: give NAME=PYTHON with a name of {', '.join(sorted(known))}")
    return found


def prepare(model: Model, folder: Path, tokens: int, window: int) -> TokenSet:
    """Writes the model, a decoder in bfloat16, and the calibration windows; returns what is judged by."""
    found = texts(model.tokenizer, folder / "packages", tokens, window)
    if not (folder / "model" / "config.json").exists():
        config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if "quantization" not in k})
        fresh = type(model.module)(config).to(torch.bfloat16 if model.kind == "decoder" else model.dtype)
        fresh.load_state_dict(model.module.state_dict())
        fresh.save_pretrained(folder / "model")
        model.tokenizer.save_pretrained(folder / "model")
    save_file({"ids": found.calibration.contiguous()}, folder / "calibration.safetensors")
    return found.judged


def run(method: Method, folder: Path) -> Path:
    """Runs the method unless its result is there, and notes where; returns its folder."""
    out = folder / method.name.replace(",", "").replace(" ", "-")
    if not (out / MEASURED).exists():
        given = [str(folder / "model"), str(folder / "calibration.safetensors"), str(out)]
        command = [method.python, str(HERE / method.worker), *given, *method.arguments]
        subprocess.run(command, check=True)
        measured = json.loads((out / MEASURED).read_text())
        (out / MEASURED).write_text(canonical_json({**measured, "machine": _machine(), "commit": _commit()}))
    return out


def _machine() -> str:
    """Processor, its cores, and how busy they were in the last minutes."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[2]:.1f}"


def _commit() -> str | None:
    """Of lowprec, where this is a checkout."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, check=False, capture_output=True, text=True)
    return found.stdout.strip() or None


def show(bench: Decoders | Encoders, results: list[Cost], console: Console) -> None:
    """The table."""
    table = Table("method", "s", "processor s", "GB", *TEXTS, EVERYTHING, *bench.columns, title=bench.title)
    for result in results:
        worked = "" if result.processor_seconds is None else f"{result.processor_seconds:.0f}"
        cost = (f"{result.seconds:.0f}", worked, f"{result.peak_bytes / 1e9:.2f}")
        table.add_row(result.method, *cost, *bench.row(result))
    console.print(table)


def main(
    model: Annotated[str, typer.Argument(help="A decoder or a sentence encoder: folder, GGUF file or name.")],
    out: Annotated[Path, typer.Option(help="Where results and intermediate files go.")] = Path(".bench/quality"),
    peer: Annotated[list[str] | None, typer.Option(help="NAME=PYTHON of a peer's environment; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each text to judge by.")] = 18_000,
    only: Annotated[list[str] | None, typer.Option(help="Run methods whose name holds this; repeatable.")] = None,
    skip: Annotated[str, typer.Option(help="Leave out those whose name holds this.")] = "",
) -> None:
    """Runs the suite."""
    out.mkdir(parents=True, exist_ok=True)
    loaded = load(model)
    kind, ours = (Decoders, OURS) if loaded.kind == "decoder" else (Encoders, OURS_OF_ENCODERS)
    judged = prepare(loaded, out, tokens, kind.window)
    known = methods(interpreters(peer or []), ours)
    wanted = [m for m in known if any(o in m.name for o in only or [""]) and not (skip and skip in m.name)]
    folders = {method.name: run(method, out) for method in wanted}
    bench = kind(loaded, judged, out / "packages")
    results: list[Cost] = []
    for method in wanted:
        folder = folders[method.name]
        results.append(bench.result(method, folder, json.loads((folder / MEASURED).read_text())))
        show(bench, results, Console(width=220))
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    record: dict[str, Any] = {"environment": machine, "results": [asdict(r) for r in results]}
    if isinstance(bench, Encoders):
        record["differences"] = [asdict(d) for d in bench.differences(wanted, folders)]
    (out / "quality.json").write_text(canonical_json(record))


if __name__ == "__main__":
    typer.run(main)
