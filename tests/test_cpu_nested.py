"""Nested weights on CPUs against float64, in all instructions that this machine has, and without a compiler."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowprec_kernels import cpu_nested, native, reference
from lowprec_kernels.cpu_nested import FEW_ROWS, NestedOperands
from lowprec_kernels.packing import pack_int4
from lowprec_kernels.timing import Timing

RATIOS = (4, 6, 8, 12)
# Of 16-bit x whose columns within a group are of unlike size; bfloat16 results are rounded once more.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2.0**-8}
SETS = {"plain": (), "avx2": native.AVX2, "avx512-vnni": native.VNNI, "neon-dotprod": native.NEON}
SHAPES = ((40, 256, 64), (33, 384, 128), (17, 96, 32), (1, 64, 64), (70, 576, 64), (9, 1024, 512))


def operands(n: int, k: int, group: int, *, zero: bool = False, bias: bool = False, seed: int = 0) -> NestedOperands:
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)

    return NestedOperands(
        base=pack_int4(codes(n, k)),
        residual=pack_int4(codes(n, k)),
        scale=(0.001 + 0.02 * torch.rand(n, k // group, generator=generator)).to(torch.bfloat16),
        ratio=torch.tensor(RATIOS, dtype=torch.int8)[torch.randint(0, 4, (n, k // group), generator=generator)],
        zero=codes(n, k // group) if zero else None,
        bias=torch.randn(n, generator=generator) if bias else None,
        group_size=group,
    )


def activations(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Columns of very unlike size, as outlier channels make them."""
    generator = torch.Generator().manual_seed(m + k)
    sizes = torch.logspace(-2, 2, k)[torch.randperm(k, generator=generator)]
    return (torch.randn(m, k, generator=generator) * sizes).to(dtype)


def truth(weight: NestedOperands, x: Tensor, level: int) -> Tensor:
    return reference.nested_gemm(
        x.double(), weight.base, weight.residual, weight.scale.float(), weight.ratio, weight.zero, weight.bias,
        weight.group_size, level,
    )  # fmt: skip


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def runs(name: str) -> bool:
    best = native.instructions()
    return name == "plain" or (best and SETS[name] == best) or (name == "avx2" and best == native.VNNI)


@pytest.fixture(params=SETS)
def built(request: pytest.FixtureRequest) -> object:
    if not runs(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    found = cpu_nested.typed(native.library(cpu_nested.SOURCE, SETS[request.param]))
    assert cpu_nested.instructions_of(found) == request.param
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_against_float64(built: object, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for zero, bias, m, level in itertools.product((False, True), (False, True), (1, 3), (4, 8)):
        weight, x = operands(*shape, zero=zero, bias=bias), activations(m, shape[1], dtype)
        y = cpu_nested.native(built, weight, x, level)
        assert y.dtype == dtype
        assert error(y, truth(weight, x, level)) <= TOLERANCE[dtype]


def test_a_row_is_computed_alike_among_others_and_by_any_number_of_threads(built: object) -> None:
    weight, x = operands(257, 320, 64, zero=True), activations(5, 320)
    whole = cpu_nested.native(built, weight, x, 8)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for row in range(5):
                assert torch.equal(cpu_nested.native(built, weight, x[row : row + 1], 8)[0], whole[row])
    finally:
        torch.set_num_threads(before)


def test_values_that_are_no_numbers_mark_their_row_alone(built: object) -> None:
    weight, x = operands(33, 192, 64), activations(5, 192)
    clean = cpu_nested.native(built, weight, x, 8)
    x[1, 7], x[2, 100], x[3, :] = torch.nan, torch.inf, 0.0
    y = cpu_nested.native(built, weight, x, 8)
    assert bool(y[[1, 2]].isnan().all())
    assert torch.equal(y[3], torch.zeros(33))
    assert torch.equal(y[[0, 4]], clean[[0, 4]])
    tiny = cpu_nested.native(built, weight, torch.full((1, 192), 1e-42), 8)
    assert bool((tiny.abs() < 1e-37).all())


@pytest.mark.parametrize("level", [4, 8])
def test_the_form_for_many_rows_is_exact(level: int) -> None:
    for zero, bias in itertools.product((False, True), (False, True)):
        weight, x = operands(40, 256, 64, zero=zero, bias=bias), activations(FEW_ROWS + 1, 256)
        y = cpu_nested.nested_gemm(weight, x, level)
        torch.testing.assert_close(y.double(), truth(weight, x, level), rtol=1e-5, atol=1e-4)
        assert error(cpu_nested.nested_gemm(weight, x[:2], level), truth(weight, x[:2], level)) <= 2e-4
    assert cpu_nested.nested_gemm(weight, x[:0], level).shape == (0, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [4, 8])
def test_many_rows_in_bfloat16_are_multiplied_in_either_dtype(
    level: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_nested, "product_dtype", lambda given: dtype)
    weight, x = operands(40, 256, 64, zero=True, bias=True), activations(FEW_ROWS + 1, 256).to(torch.bfloat16)
    y = cpu_nested.nested_gemm(weight, x, level)
    assert y.dtype == torch.bfloat16
    # Half a step of bfloat16 on the output, and one on each weight where these are rounded as well.
    assert error(y, truth(weight, x.float(), level)) <= 5e-3


@pytest.mark.parametrize("fastest", [torch.float32, torch.bfloat16])
def test_what_many_rows_are_multiplied_in_is_measured_for_bfloat16_alone(
    fastest: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(runs: dict[str, Any], **_: Any) -> dict[str, Timing]:
        times = {name: 1.0 if name == str(fastest) else 2.0 for name in runs}
        return {name: Timing(p20_us=t, p50_us=t, p80_us=t, runs=1) for name, t in times.items()}

    monkeypatch.setattr(cpu_nested, "time_interleaved", told)
    measured = cpu_nested.product_dtype.__wrapped__
    assert measured(torch.bfloat16) == fastest
    assert measured(torch.float32) == torch.float32


def test_level_4_never_reads_the_second_plane() -> None:
    weight, x = operands(16, 128, 64), activations(2, 128)
    other = operands(16, 128, 64, seed=1)
    changed = NestedOperands(
        base=weight.base, residual=other.residual, scale=weight.scale, ratio=other.ratio, zero=None, bias=None,
        group_size=64,
    )  # fmt: skip
    assert torch.equal(cpu_nested.nested_gemm(weight, x, 4), cpu_nested.nested_gemm(changed, x, 4))
    assert not torch.equal(cpu_nested.nested_gemm(weight, x, 8), cpu_nested.nested_gemm(changed, x, 8))


def test_what_does_not_fit_is_refused() -> None:
    weight = operands(16, 128, 64)
    with pytest.raises(ValueError, match=r"\(4, 8\), not 5"):
        cpu_nested.nested_gemm(weight, activations(1, 128), 5)
    with pytest.raises(ValueError, match=r"x must be \[M, 128\].*\(1, 64\)"):
        cpu_nested.nested_gemm(weight, activations(1, 64), 8)
    with pytest.raises(ValueError, match="float16"):
        cpu_nested.nested_gemm(weight, activations(1, 128, torch.float16), 8)
    with pytest.raises(ValueError, match=r"scale must be torch\.bfloat16"):
        NestedOperands(
            base=weight.base, residual=weight.residual, scale=weight.scale.float(), ratio=weight.ratio, zero=None,
            bias=None, group_size=64,
        )  # fmt: skip
    assert "not 96" in str(cpu_nested.native_reason(96))


SCRIPT = """
import logging, torch
logging.basicConfig(level=logging.WARNING)
from tests.test_cpu_nested import activations, error, operands, truth
from lowprec_kernels import cpu_nested
weight, x = operands(16, 128, 64), activations(2, 128)
print(cpu_nested.few_rows_form(64))
for _ in range(2):
    assert error(cpu_nested.nested_gemm(weight, x, 8), truth(weight, x, 8)) < 1e-6
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found (CXX=no-such-compiler)"),
        ({"CXX": "false"}, "false cannot build cpu_nested.cpp"),
        ({"LOWPREC_CACHE": "/dev/null/nowhere"}, "set LOWPREC_CACHE to another folder"),
    ],
)
def test_without_a_library_the_slow_form_runs_and_says_so(
    changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "LOWPREC_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", **changes}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.stdout.split() == ["dequantize"]
    assert done.stderr.count(message) == 1


def test_libraries_of_other_instructions_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = native.compiler()
    keys = {native._key(cpu_nested.SOURCE, flags, compiler) for flags in SETS.values()}
    assert len(keys) == len(SETS)
    monkeypatch.setenv("LOWPREC_CACHE", str(tmp_path))
    assert native.cache_folder() == tmp_path
