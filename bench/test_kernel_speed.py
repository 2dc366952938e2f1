"""Benchmarks of the CPU kernels: `pytest bench --benchmark-only`. Ratios within one run are what to read.

Weights are cold: each round takes the next of the copies that `timing.copies_for` asks for.
"""

import itertools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from lowprec.formats import SCHEMES, resolve
from lowprec.runtime.dispatch import automatic
from lowprec.runtime.measure import independent_states, random_operands
from lowprec_kernels.timing import copies_for

SHAPES = ((576, 1536), (2048, 2048))
ROWS = (1, 16, 256)
NAMES = ("bf16", "w8a8-fp8", "w8a8-int8", "w8a16", "w4a16", "w4a8-int8", "w4a8-fp8")
# Scalar on processors without VNNI: minutes at these sizes.
SLOW = {"int-mm"}
CASES = [
    (name, kernel, n, k)
    for name, (n, k) in itertools.product(NAMES, SHAPES)
    for kernel in automatic(resolve(SCHEMES[name], k), n, k)
    if kernel.name not in SLOW
]


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("name", "kernel", "n", "k"), CASES, ids=lambda v: getattr(v, "name", v))
def test_linear(benchmark: BenchmarkFixture, name: str, kernel: object, n: int, k: int, m: int) -> None:
    benchmark.group = f"M={m} N={n} K={k}"
    scheme = resolve(SCHEMES[name], k)
    form = next(f for f in automatic(scheme, n, k) if f is kernel)
    states = independent_states(form, random_operands(scheme, n, k), copies_for(form.bytes_per_weight * n * k))
    x = torch.randn(m, k).to(torch.bfloat16)
    turn = itertools.cycle(states)
    benchmark.pedantic(lambda: form.run(next(turn), x), rounds=20, warmup_rounds=2)
