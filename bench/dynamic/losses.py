"""Losses of rungs: KL of a real model whose blocks are in INT8 or INT4, on text that its run never looked at first.

INT8 is rounded plainly, per channel; INT4 are the codes that a finished run of `lowprec calibrate` (best, default text)
solved for each group. The blocks that lose least go down first, as the run's own sensitivities say. The head stays in
INT8. The text is what the run keeps for its verdict: neither statistics nor any decision came from it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.settings import effort_named
from lowprec.solvers.rtn import Rtn
from lowprec.steps.data import SplitSizes, split
from lowprec.steps.judge import Bounds, ratio_bounds
from lowprec.steps.linear import linear_layers, weight_of
from lowprec.steps.load import load
from lowprec.steps.measure import compare, compare_tokens, paired, run_through
from lowprec.steps.sources import read_sources
from lowprec.steps.stream import Override, Stream

CONFIDENCE = 0.95
GROWTH = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Bounds of each rung's KL, the tokens they are from, and what is at the lower level."""

    bounds: tuple[Bounds, ...]
    tokens: int
    low: tuple[frozenset[int], ...]
    blocks: int


def block_order(run: Path) -> list[int]:
    """Blocks, the one that loses least in INT4 first."""
    lost: dict[int, float] = {}
    for row in json.loads((run / "sensitivity.json").read_text())["record"]:
        parts = row["group"].split(".")
        if row["scheme"].startswith("w4a16") and "layers" in parts:
            number = int(parts[parts.index("layers") + 1])
            lost[number] = lost.get(number, 0.0) + row["predicted_kl_nats"]
    return sorted(lost, key=lambda number: lost[number])


def solved(run: Path) -> dict[str, QuantizedWeight]:
    """Layer -> its INT4 codes."""
    found = {}
    for file in sorted((run / "solved").glob("*%40int4-g*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for layer, fmt in json.loads(tensors.metadata()["formats"]).items():
                codes, scale = (tensors.get_tensor(f"{layer}.{part}") for part in ("codes", "scale"))
                found[layer] = QuantizedWeight(format=fmt, codes=codes, scale=scale)
    return found


def measure(source: str, run: Path, shares: Sequence[float], tokens: int) -> Losses:
    """KL of `source` with each share of its blocks in INT4, over about `tokens` tokens."""
    model, effort = load(source), effort_named("best")
    sizes = SplitSizes(
        calibration=effort.calibration_tokens + effort.sensitivity_tokens,
        tuning=effort.tuning_tokens,
        held_out=effort.held_out_tokens,
        window=effort.window,
        growth=GROWTH,
    )
    text = split(read_sources(()), model.tokenizer, sizes, 0).held_out[-1].subset(tokens)
    batches = text.batches(2048)
    stream = Stream(model.module, model.forward, batches[0])
    order, low, int8 = block_order(run), solved(run), WEIGHT_FORMATS["int8"]
    high = {
        name: Rtn().solve(weight_of(layer).float(), int8, None) for name, layer in linear_layers(model.module).items()
    }
    reference = run_through(stream, batches)
    found: list[Bounds] = []
    lowered: list[frozenset[int]] = []
    for share in shares:
        blocks = frozenset(order[: round(share * len(order))])
        chosen = {name: low[name] if stream.block_of(name) in blocks else high[name] for name in stream.layers}
        overlay = {name: Override(weight=weight.dequantize) for name, weight in chosen.items()}
        table = compare(reference, [run_through(stream, batches, overlay)], batches, compare_tokens)[0]
        scores = paired(table, text, batches)
        units, place = np.unique(scores.unit, return_inverse=True)
        kl, count = (np.bincount(place, values, len(units)) for values in (scores.kl, scores.tokens))
        found.append(ratio_bounds(kl, count, CONFIDENCE))
        lowered.append(blocks)
        print(f"{len(blocks)} of {len(order)} blocks in INT4: {found[-1]}", flush=True)
    return Losses(bounds=tuple(found), tokens=text.tokens, low=tuple(lowered), blocks=len(order))
