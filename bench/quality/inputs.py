"""What rounding the inputs of layers to INT8 costs by itself, weights untouched: as they are, smoothed, turned.

    python bench/quality/inputs.py .demo/model.gguf

KL in nats, over all groups inside the blocks and for each kind of layer alone, on the suite's four texts. Scales are
those that `lowprec.steps.transform` fits for weights in INT8 (`--weights int4-g64`: for such).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from texts import texts

from lowprec.formats import resolve, scheme_named
from lowprec.records import Group
from lowprec.steps.graph import find_groups
from lowprec.steps.load import Model, load
from lowprec.steps.measure import Run, compare, compare_tokens, mean_kl, run_through
from lowprec.steps.rotate import turned
from lowprec.steps.stream import Override, Stream, fast_dtype
from lowprec.steps.tokens import Batch
from lowprec.steps.transform import smooth

SCHEMES = {"int8": "w8a8-int8", "int4-g64": "w4a8-int8-g64"}
BATCH_TOKENS, SMOOTHED_BATCHES = 2048, 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table: what is done to the model before its inputs are rounded."""

    name: str
    turned: bool = False
    smoothed: bool = False


CASES = (
    Case(name="as it is"),
    Case(name="turned", turned=True),
    Case(name="smoothed", smoothed=True),
    Case(name="turned and smoothed", turned=True, smoothed=True),
)


class Bench:
    """The reference on the judged text, and what rounded inputs lose against it."""

    def __init__(self, model: Model, folder: Path, tokens: int) -> None:
        self._model, found = model, texts(model.tokenizer, folder, tokens)
        self._batches = found.judged.batches(BATCH_TOKENS)
        rows = found.calibration.split(4)[:SMOOTHED_BATCHES]
        self._fitted = [Batch(ids=ids, lengths=torch.full((len(ids),), ids.shape[1]), index=()) for ids in rows]
        self._example = Batch(ids=rows[0][:1, :8], lengths=torch.tensor([8]), index=())
        self._reference = self._run(self._stream(model))

    def _stream(self, model: Model) -> Stream:
        return Stream(model.module, model.forward, self._example)

    def _run(self, stream: Stream, overlay: dict[str, Override] | None = None) -> Run:
        with stream.computing(fast_dtype(stream)):
            return run_through(stream, self._batches, overlay or {})

    def row(self, case: Case, scheme: str) -> list[tuple[str, float]]:
        """(kind of layer, KL) of a case, all of them first."""
        stream = self._stream(turned(self._model) if case.turned else self._model)
        groups = [g for g in find_groups(stream)[0] if g.block is not None]
        exponents = {}
        if case.smoothed:
            wanted = {g.name: (resolve(scheme_named(scheme), g.k),) for g in groups}
            found = smooth(stream, groups, wanted, self._fitted, self._example)
            exponents = {s.group: s.spread for s in found}
        kinds = dict.fromkeys(_kind(g) for g in groups)
        chosen = [("all", groups), *((kind, [g for g in groups if _kind(g) == kind]) for kind in kinds)]
        return [(name, self._kl(stream, some, exponents)) for name, some in chosen]

    def _kl(self, stream: Stream, groups: Sequence[Group], exponents: dict[str, torch.Tensor]) -> float:
        overlay = {
            layer: Override(weight=None, activation="int8-token", activation_exponents=exponents.get(g.name))
            for g in groups
            for layer in g.layers
        }
        run = self._run(stream, overlay)
        with stream.computing(fast_dtype(stream)):
            return mean_kl(compare(self._reference, [run], self._batches, compare_tokens)[0])


def _kind(group: Group) -> str:
    return group.layers[0].rpartition(".")[2]


def main(
    model: Annotated[str, typer.Argument(help="A decoder: folder, GGUF file or name.")],
    out: Annotated[Path, typer.Option(help="Where texts are kept.")] = Path(".bench/quality/packages"),
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 2_500,
    weights: Annotated[str, typer.Option(help="Format that scales are fitted for: int8 or int4-g64.")] = "int8",
) -> None:
    """Prints the table."""
    if weights not in SCHEMES:
        raise typer.BadParameter(f"{weights!r}: give {' or '.join(SCHEMES)}")
    bench = Bench(load(model), out, tokens)
    rows = [(case.name, bench.row(case, SCHEMES[weights])) for case in CASES]
    table = Table("inputs in INT8 by token", *(name for name, _ in rows[0][1]), title="KL, nats")
    for name, found in rows:
        table.add_row(name, *(f"{kl:.4f}" for _, kl in found))
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
