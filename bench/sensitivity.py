"""How well predicted sensitivities rank, on (group, scheme) pairs and text that nothing else has used.

    python bench/sensitivity.py MODEL [--pairs 24] [--tokens 8192] [--effort fast] [--out .bench]

Measures `pairs` groups in each base scheme on held-out text (which no verdict of this folder uses), none of them a
pair that the run's own check measures. Prints Spearman's rank correlation overall and within each scheme, with the
ratio of predicted to measured KL, and writes JSON beside it with the machine and versions. Exit code 1 below 0.95
overall or 0.9 within the INT4 family.
"""

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from lowprec.artifacts.folder import RunFolder, canonical_json
from lowprec.formats import scheme_named
from lowprec.pipeline.context import context_of
from lowprec.pipeline.prepare import prepare
from lowprec.pipeline.score import Scored, score
from lowprec.pipeline.summarise import environment
from lowprec.report import RunProgress
from lowprec.results import CheckedPair
from lowprec.settings import Settings, effort_named
from lowprec.steps.check import agreement, base_of, choose_pairs
from lowprec.steps.load import load
from lowprec.steps.measure import measure_pairs
from lowprec.steps.tokens import batched

LEAST_OVERALL, LEAST_INT4 = 0.95, 0.9


def measured(scored: Scored, per_scheme: int, tokens: int, seed: int) -> tuple[CheckedPair, ...]:
    """Pairs that the run's check does not measure, on the last held-out text."""
    prepared, predicted = scored.prepared, scored.predicted
    context = prepared.context
    schemes = {base_of(scheme) for _, scheme in predicted}
    used = set(choose_pairs(list(predicted), context.settings.effort.checked_pairs, context.settings.seed))
    chosen = choose_pairs([p for p in predicted if p not in used], per_scheme * len(schemes), seed)
    text = batched(prepared.held_out[-1].subset(tokens))
    overlays = {(group, scheme): scored.overlay({group: scheme}) for group, scheme in chosen}
    with context.progress.step("measure", prepared.stream.depth, "blocks") as step:
        found = measure_pairs(prepared.stream, text.batches, overlays, context.metric.divergence, step.report)
    return tuple(
        CheckedPair(group=g, scheme=s, predicted_kl_nats=predicted[g, s], measured_kl_nats=found[g, s])
        for g, s in overlays
    )


def ratios(pairs: tuple[CheckedPair, ...], names: Iterable[str]) -> dict[str, tuple[int, float, float]]:
    """Family or base scheme -> number of pairs, predicted / measured over their sums, and its median over pairs."""
    found = {}
    for name in names:
        own = [p for p in pairs if name in (base_of(p.scheme), scheme_named(p.scheme).family)]
        sums = sum(p.predicted_kl_nats for p in own) / sum(p.measured_kl_nats for p in own)
        found[name] = (len(own), sums, float(np.median([p.predicted_kl_nats / p.measured_kl_nats for p in own])))
    return found


def main(
    model: str,
    pairs: int = 24,
    tokens: int = 8192,
    effort: str = "fast",
    seed: int = 1,
    out: Annotated[Path, typer.Option()] = Path(".bench"),
    results: Annotated[Path, typer.Option()] = Path("bench/results/sensitivity.json"),
) -> None:
    """Measures and prints."""
    settings = Settings(out=out, effort=effort_named(effort), objective="bytes")
    with RunFolder(out) as folder, RunProgress() as progress:
        context = context_of(load(model), settings, folder, progress)
        found = measured(score(prepare(context)), pairs, tokens, seed)
    ranks = agreement(found, 0.0, 0.0)
    table = Table(title=f"Predicted against measured KL; Spearman over all pairs {ranks.spearman:.3f}")
    for column in ("within", "pairs", "Spearman", "predicted / measured", "median"):
        table.add_column(column, justify="left" if column == "within" else "right")
    within = dict(ranks.spearman_within)
    for name, (count, sums, median) in ratios(found, within).items():
        table.add_row(name, str(count), f"{within[name]:.3f}", f"{sums:.2f}", f"{median:.2f}")
    Console(width=100).print(table)
    record = {
        "spearman": ranks.spearman,
        "spearman_within": within,
        "pairs": [dataclasses.asdict(p) for p in found],
        "tokens": tokens,
        "environment": environment(context),
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(canonical_json(record))
    sys.exit(0 if ranks.spearman >= LEAST_OVERALL and within.get("int4", 1.0) >= LEAST_INT4 else 1)


if __name__ == "__main__":
    typer.run(main)
