"""Scoring eight schemes against scoring one: the backward pass is shared, so more schemes must cost little.

    pytest bench/test_scoring_speed.py --benchmark-enable -o addopts=""

Rounding itself is set aside: the errors are made before the clock starts. The bar is 1.3 times.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowprec.formats import WEIGHT_FORMATS, resolve, scheme_named
from lowprec.records import Scheme
from lowprec.solvers import SOLVERS
from lowprec.steps.calibrate import calibrate
from lowprec.steps.effects import LayerErrors
from lowprec.steps.graph import find_groups
from lowprec.steps.linear import weight_of
from lowprec.steps.load import load
from lowprec.steps.outcome import Tokens
from lowprec.steps.scratch import Scratch
from lowprec.steps.sensitivity import effects
from lowprec.steps.stream import Stream
from lowprec.steps.tokens import Batch

MODEL = Path(".demo/model.gguf")
EIGHT = ("w8a8-fp8", "w8a8-int8", "w8a16", "w4a16", "w4a16-g32", "w4a8-int8", "w4a8-fp8", "w8a8-int8-static")
ROUNDS = 3


@pytest.mark.skipif(not MODEL.exists(), reason="make demo brings the model")
def test_eight_schemes_cost_at_most_a_third_more_than_one(benchmark: Any, tmp_path: Path) -> None:
    model = load(MODEL)
    data = [Batch(ids=torch.randint(0, 49152, (4, 128)), lengths=torch.full((4,), 128), index=(0, 1, 2, 3))] * 2
    stream = Stream(model.module, model.forward, data[0])
    groups, _ = find_groups(stream)
    made: dict[tuple[str, str], Tensor] = {}

    def errors(layer: str, formats: Any) -> LayerErrors:
        for fmt in formats:
            if (layer, fmt) not in made:
                weight = weight_of(stream.layers[layer]).float()
                rounded = SOLVERS["rtn"].solve(weight, WEIGHT_FORMATS[fmt], None).dequantize()
                made[layer, fmt] = (rounded - weight).bfloat16()
        return LayerErrors(parts=torch.stack([made[layer, fmt] for fmt in formats]))

    def seconds(names: tuple[str, ...], round_: int) -> float:
        schemes: dict[str, list[Scheme]] = {g.name: [resolve(scheme_named(n), g.k) for n in names] for g in groups}
        scratch = Scratch(tmp_path / f"{len(names)}-{round_}", "d")
        done = calibrate(stream, groups, [*data, *data], Tokens(), lambda _: None, scratch, probing=len(data))
        start = time.perf_counter()
        effects(stream, groups, schemes, data, Tokens(), errors, done, scratch, seed=0)
        return time.perf_counter() - start

    seconds(EIGHT, 0)
    ratios = [seconds(EIGHT, r) / seconds(("w4a16",), r) for r in range(1, ROUNDS + 1)]
    benchmark.extra_info["ratio"] = statistics.median(ratios)
    benchmark.pedantic(lambda: None, rounds=1)
    assert statistics.median(ratios) <= 1.3
