"""Mixes against uniform schemes and random mixes, and predicted against measured KL, on text that no decision saw.

    python bench/mixes.py MODEL [--objective bytes] [--tokens 8192] [--out .bench]

For every uniform scheme, the allocation is asked for the mix of least predicted loss that costs no more; one more mix
costs no more than the cheapest of 20 random ones. Each is measured on held-out text (which no verdict of this folder
uses), paired window by window, with bounds on the difference from a bootstrap over units. Prints a table, and writes
JSON beside it with the machine and versions. Exit code 1 when a mix is worse beyond noise than its uniform scheme, not
better beyond noise than every random mix, or when a predicted KL is more than a fifth off.
"""

import dataclasses
import random
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from lowprec.artifacts.folder import RunFolder, canonical_json
from lowprec.formats import resolve, scheme_named
from lowprec.pipeline.choose import options
from lowprec.pipeline.context import context_of
from lowprec.pipeline.prepare import prepare
from lowprec.pipeline.price import Priced, price
from lowprec.pipeline.score import Scored, score
from lowprec.pipeline.summarise import environment
from lowprec.report import RunProgress
from lowprec.settings import Settings, effort_named
from lowprec.steps.allocate import Option, allocate
from lowprec.steps.judge import Bounds, ratio_bounds
from lowprec.steps.load import load
from lowprec.steps.measure import compare, compare_tokens, paired, run_through
from lowprec.steps.scores import PairedScores, mean_kl, perplexity_increase
from lowprec.steps.tokens import batched

UNIFORM = ("w4a16", "w8a16", "w8a8-int8", "w8a8-fp8", "w4a8-int8")
RANDOM_MIXES = 20
CONFIDENCE = 0.975
LARGEST_ERROR = 0.2
CHEAPEST = "mix at the cost of the cheapest random one"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measured mix, and bounds of its KL less that of the row that it must not be worse than."""

    name: str
    cost: float
    predicted_kl_nats: float
    measured_kl_nats: float
    perplexity_increase: float
    against: str | None = None
    difference_lower_nats: float | None = None
    difference_upper_nats: float | None = None


class Bench:
    """A scored model, and measurements of mixes on its unread text."""

    def __init__(self, scored: Scored, priced: Priced, tokens: int) -> None:
        self.scored, self.prepared = scored, scored.prepared
        self.options = options(scored, priced)
        self.names = self.prepared.names
        self.text = batched(self.prepared.splits.held_out[-1].subset(tokens))
        self.reference = run_through(self.prepared.stream, self.text.batches)
        self.scores: dict[str, PairedScores] = {}
        self.rows: dict[str, Row] = {}

    def uniform(self, scheme: str) -> dict[str, str]:
        """Every group in `scheme`, the group size settled for each."""
        return {g.name: resolve(scheme_named(scheme), g.k).name for g in self.prepared.groups}

    def randomised(self, generator: random.Random) -> dict[str, str]:
        """A scheme for each group, drawn from those that the target runs."""
        return {name: generator.choice(self.options[name]).scheme for name in self.names}

    def total(self, mix: dict[str, str], field: str) -> float:
        """Sum of the predicted `loss` or the `cost` of a mix."""
        return sum(next(getattr(o, field) for o in self.options[g] if o.scheme == s) for g, s in mix.items())

    def best_within(self, cost: float) -> dict[str, str]:
        """The mix of least predicted loss that costs no more: the same knapsack with the two quantities exchanged."""
        swapped = {
            g: [Option(scheme=o.scheme, loss=o.cost, cost=o.loss) for o in found] for g, found in self.options.items()
        }
        return allocate(self.names, swapped, cost).scheme_of()

    def measure(self, name: str, mix: dict[str, str], against: str | None = None) -> Row:
        """Measures a mix; `against` names the measured row that it must not be worse than."""
        data, batches = self.text.data, self.text.batches
        candidate = run_through(self.prepared.stream, batches, self.scored.overlay(mix))
        table = compare(self.reference, [candidate], batches, compare_tokens)[0]
        scores = self.scores[name] = paired(table, data, batches)
        bounds = None if against is None else self.difference(name, against)
        row = Row(
            name=name,
            cost=self.total(mix, "cost"),
            predicted_kl_nats=self.total(mix, "loss"),
            measured_kl_nats=mean_kl(scores),
            perplexity_increase=perplexity_increase(scores),
            against=against,
            difference_lower_nats=None if bounds is None else bounds.lower,
            difference_upper_nats=None if bounds is None else bounds.upper,
        )
        self.rows[name] = row
        return row

    def difference(self, name: str, other: str) -> Bounds:
        """Bounds of the first mix's KL less the second's, in nats, over units of text."""
        one, two = self.scores[name], self.scores[other]
        units, place = np.unique(one.unit, return_inverse=True)
        numerator = np.bincount(place, one.kl - two.kl, len(units))
        return ratio_bounds(numerator, np.bincount(place, one.tokens, len(units)), CONFIDENCE)


def collect(bench: Bench, seed: int) -> None:
    """All rows of the table."""
    for scheme in UNIFORM:
        uniform = bench.uniform(scheme)
        bench.measure(f"uniform {scheme}", uniform)
        mix = bench.best_within(bench.total(uniform, "cost"))
        bench.measure(f"mix at the cost of {scheme}", mix, f"uniform {scheme}")
    generator = random.Random(seed)
    drawn = [bench.randomised(generator) for _ in range(RANDOM_MIXES)]
    for number, mix in enumerate(drawn):
        bench.measure(f"random {number + 1}", mix)
    cheapest = min(bench.total(mix, "cost") for mix in drawn)
    best = min((bench.rows[f"random {i + 1}"] for i in range(len(drawn))), key=lambda r: r.measured_kl_nats)
    bench.measure(CHEAPEST, bench.best_within(cheapest), best.name)


def failures(bench: Bench) -> list[str]:
    """Which bars are missed, in words."""
    found = [
        f"{r.name}: predicted {r.predicted_kl_nats:.4f}, measured {r.measured_kl_nats:.4f}"
        for r in bench.rows.values()
        if r.against is None and abs(r.predicted_kl_nats / r.measured_kl_nats - 1.0) > LARGEST_ERROR
    ]
    uniform = [r for r in bench.rows.values() if r.against is not None and r.name != CHEAPEST]
    found += [f"{r.name} is worse than {r.against}" for r in uniform if (r.difference_lower_nats or 0.0) > 0.0]
    random_mixes = [name for name in bench.rows if name.startswith("random")]
    found += [f"{CHEAPEST} is not better than {r}" for r in random_mixes if bench.difference(CHEAPEST, r).upper >= 0.0]
    return found


def printed(rows: list[Row], objective: str) -> Table:
    """The table for people."""
    table = Table(title=f"Measured on text that no decision saw; cost: {objective}")
    for column in ("mix", "cost", "predicted KL", "measured KL", "ratio", "perplexity", "against", "KL difference <"):
        table.add_column(column, justify="left" if column in ("mix", "against") else "right")
    for row in rows:
        upper = "" if row.difference_upper_nats is None else f"{row.difference_upper_nats:+.4f}"
        table.add_row(
            row.name, f"{row.cost:.4g}", f"{row.predicted_kl_nats:.4f}", f"{row.measured_kl_nats:.4f}",
            f"{row.predicted_kl_nats / row.measured_kl_nats:.2f}", f"{row.perplexity_increase:+.2%}",
            row.against or "", upper,
        )  # fmt: skip
    return table


def main(
    model: str,
    objective: str = "bytes",
    tokens: int = 8192,
    effort: str = "fast",
    seed: int = 0,
    out: Annotated[Path, typer.Option()] = Path(".bench"),
    results: Annotated[Path, typer.Option()] = Path("bench/results/mixes.json"),
) -> None:
    """Measures and prints."""
    settings = Settings(out=out, effort=effort_named(effort), objective=objective, seed=seed)  # type: ignore[arg-type]
    with RunFolder(out) as folder, RunProgress() as progress:
        context = context_of(load(model), settings, folder, progress)
        prepared = prepare(context)
        bench = Bench(score(prepared), price(prepared), tokens)
        with progress.step("mixes"):
            collect(bench, seed)
    rows = list(bench.rows.values())
    Console(width=160).print(printed(rows, objective))
    rank = float(spearmanr([r.predicted_kl_nats for r in rows], [r.measured_kl_nats for r in rows]).statistic)
    missed = failures(bench)
    record = {
        "rows": [dataclasses.asdict(r) for r in rows],
        "spearman_of_mixes": rank,
        "missed": missed,
        "tokens": bench.text.data.tokens,
        "objective": objective,
        "environment": environment(context),
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(canonical_json(record))
    Console().print(f"Spearman over mixes {rank:.3f}; bars that are missed: {missed or 'none'}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
