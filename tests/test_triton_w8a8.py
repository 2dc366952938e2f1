"""W8A8 kernels against float64 over the same codes, in every form: edges, extremes, values that are not finite."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from interpreter import DEVICE
from lowprec_kernels import reference
from lowprec_kernels.triton_w8a8 import w8a8_fp8_gemm, w8a8_int8_gemm
from lowprec_kernels.triton_w8a8_block import SCALE_BLOCK, w8a8_fp8_block_gemm
from lowprec_kernels.triton_w8a8_forms import FAMILIES, FP8, FP8_BLOCK, INT8, tma_reason
from lowprec_kernels.tuning import MOST_CANDIDATES, Config, Problem, config_for

POINTER = Config(block_m=32, block_n=64, block_k=64, stages=2, group_m=2, form="pointer")
TMA = Config(block_m=128, block_n=64, block_k=64, stages=2, group_m=2, form="tma")
CONFIGS = {
    "pointer": POINTER,
    "pointer, split": dataclasses.replace(POINTER, split_k=3),
    "swap": Config(block_m=16, block_n=64, block_k=128, stages=2, form="swap"),
    "swap, split": Config(block_m=32, block_n=64, block_k=64, stages=2, split_k=4, form="swap"),
    "tma": TMA,
}
BY_POINTERS = [name for name in CONFIGS if name != "tma"]
BLOCK_CONFIGS = {name: dataclasses.replace(config, block_k=SCALE_BLOCK) for name, config in CONFIGS.items()}
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
GEMMS: dict[str, Callable[..., Tensor]] = {"int8": w8a8_int8_gemm, "fp8": w8a8_fp8_gemm}
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "int8": reference.w8a8_int8_gemm,
    "fp8": reference.w8a8_fp8_gemm,
}
# Half a step of the result's type, and what the matrix unit of sm_90 drops while it adds products of e4m3.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1.5e-3, torch.bfloat16: 4e-3}
RAGGED = [(1, 1, 16), (5, 40, 144), (33, 65, 100), (70, 136, 320), (130, 72, 16)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(kind: str, rows: int, k: int, seed: int) -> Tensor:
    if kind == "int8":
        return torch.randint(-127, 128, (rows, k), generator=generator(seed), dtype=torch.int8).to(DEVICE)
    values = torch.randn(rows, k, generator=generator(seed)) * 100
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).to(DEVICE)


def scales(*shape: int, seed: int = 3) -> Tensor:
    return (torch.rand(*shape, generator=generator(seed)) / 64 + 1 / 128).to(DEVICE)


def block_scales(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    blocks = -(-k // SCALE_BLOCK)
    return scales(m, blocks), scales(-(-n // SCALE_BLOCK), blocks, seed=4)


def bias(n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(n, generator=generator(9)).to(dtype).to(DEVICE)


def ones(rows: int) -> Tensor:
    return torch.ones(rows, 1, device=DEVICE)


def block_truth(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    return reference.w8a8_fp8_block_gemm(x, x_scale, w, w_scale, bias, torch.float64)


def assert_close(y: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    assert (y.dtype, y.shape) == (dtype, truth.shape)
    error = float((y.to(torch.float64) - truth.to(torch.float64)).norm() / truth.to(torch.float64).norm())
    assert error <= TOLERANCES[dtype], error


def skip_what_tma_cannot_store(name: str, n: int, k: int) -> None:
    if name == "tma" and (n * 2 % 16 or k % 16):
        pytest.skip("the rows do not begin at multiples of 16 bytes")


@pytest.mark.parametrize("shape", RAGGED)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", CODES)
def test_ragged_shapes(kind: str, name: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    skip_what_tma_cannot_store(name, n, k)
    operands = codes(kind, m, k, 1), scales(m, 1), codes(kind, n, k, 2), scales(n, 1, seed=4), bias(n)
    y = GEMMS[kind](*operands, torch.bfloat16, config=CONFIGS[name])
    assert_close(y, REFERENCES[kind](*operands, torch.float64), torch.bfloat16)


@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 40, 144), (70, 136, 320)])
@pytest.mark.parametrize("name", BLOCK_CONFIGS)
def test_block_scales(name: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    skip_what_tma_cannot_store(name, n, k)
    x, w = codes("fp8", m, k, 1), codes("fp8", n, k, 2)
    x_scale, w_scale = block_scales(m, n, k)
    y = w8a8_fp8_block_gemm(x, x_scale, w, w_scale, bias(n), torch.bfloat16, config=BLOCK_CONFIGS[name])
    assert_close(y, block_truth(x, x_scale, w, w_scale, bias(n)), torch.bfloat16)


@pytest.mark.parametrize("out_dtype", TOLERANCES)
@pytest.mark.parametrize("kind", [*CODES, "block"])
@pytest.mark.parametrize("rows", [3, 80, 300])
def test_what_is_launched_without_a_config(rows: int, kind: str, out_dtype: torch.dtype) -> None:
    n, k = 72, 272
    if kind == "block":
        x, w = codes("fp8", rows, k, 1), codes("fp8", n, k, 2)
        x_scale, w_scale = block_scales(rows, n, k)
        y = w8a8_fp8_block_gemm(x, x_scale, w, w_scale, None, out_dtype)
        assert_close(y, block_truth(x, x_scale, w, w_scale, None), out_dtype)
    else:
        operands = codes(kind, rows, k, 1), scales(rows, 1), codes(kind, n, k, 2), scales(n, 1, seed=4), None
        assert_close(GEMMS[kind](*operands, out_dtype), REFERENCES[kind](*operands, torch.float64), out_dtype)


@pytest.mark.parametrize("name", BY_POINTERS)
def test_integer_sums_are_exact(name: str) -> None:
    m, n, k = 18, 70, 1040
    x, w = codes("int8", m, k, 1), codes("int8", n, k, 2)
    x[0], w[0], w[1] = 127, -127, 127
    y = w8a8_int8_gemm(x, ones(m), w, ones(n), None, torch.float32, config=CONFIGS[name])
    assert torch.equal(y.to(torch.int32), reference.accumulate_int8(x, w))
    assert y[0, :2].tolist() == [-127 * 127 * k, 127 * 127 * k]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", CODES)
def test_largest_codes(kind: str, name: str) -> None:
    m, n, k = 17, 72, 176
    largest = 127 if kind == "int8" else 448
    x = torch.full((m, k), largest, dtype=torch.float32, device=DEVICE).to(CODES[kind])
    w = torch.full((n, k), -largest, dtype=torch.float32, device=DEVICE).to(CODES[kind])
    operands = x, scales(m, 1), w, scales(n, 1, seed=4), None
    y = GEMMS[kind](*operands, torch.bfloat16, config=CONFIGS[name])
    assert_close(y, REFERENCES[kind](*operands, torch.float64), torch.bfloat16)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", CODES)
def test_each_column_of_x_meets_its_own_of_w(kind: str, name: str) -> None:
    """x is one-hot, row i at column i of k: y is a copy of w, whatever the tiles, steps and splits are."""
    n, k = 72, 208
    x = torch.eye(k, device=DEVICE).to(CODES[kind])
    w = codes(kind, n, k, 2)
    y = GEMMS[kind](x, ones(k), w, ones(n), None, torch.bfloat16, config=CONFIGS[name])
    assert torch.equal(y.to(torch.float32), w.to(torch.float32).t())


@pytest.mark.parametrize("name", BLOCK_CONFIGS)
def test_each_block_gets_its_own_scale(name: str) -> None:
    """x is one-hot at one column of every block of K, codes are 1: y is the product of the two blocks' scales."""
    blocks, n = 3, 264
    k = blocks * SCALE_BLOCK - 48
    x = torch.zeros(blocks, k, device=DEVICE)
    x[torch.arange(blocks), torch.arange(blocks) * SCALE_BLOCK + 79] = 1
    w = torch.ones(n, k, device=DEVICE).to(torch.float8_e4m3fn)
    x_scale = 2.0 ** torch.arange(blocks * blocks, device=DEVICE, dtype=torch.float32).reshape(blocks, blocks)
    w_scale = 2.0 ** -torch.arange(3 * blocks, device=DEVICE, dtype=torch.float32).reshape(3, blocks)
    y = w8a8_fp8_block_gemm(
        x.to(torch.float8_e4m3fn), x_scale, w, w_scale, None, torch.bfloat16, config=BLOCK_CONFIGS[name]
    )
    wanted = (x_scale.diagonal()[:, None] * w_scale.t()).repeat_interleave(SCALE_BLOCK, 1)[:, :n]
    assert torch.equal(y.to(torch.float32), wanted)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", CODES)
def test_nan_scales_and_rows_of_zeros_touch_their_own_row_alone(kind: str, name: str) -> None:
    m, n, k = 19, 72, 144
    x, w = codes(kind, m, k, 1), codes(kind, n, k, 2)
    x_scale, w_scale = scales(m, 1), scales(n, 1, seed=4)
    x_scale[3], w_scale[70] = torch.nan, torch.nan
    x[5] = torch.zeros(k, device=DEVICE).to(CODES[kind])
    y = GEMMS[kind](x, x_scale, w, w_scale, None, torch.bfloat16, config=CONFIGS[name])
    assert bool(y[3].isnan().all())
    assert bool(y[:, 70].isnan().all())
    rest = torch.cat([y[:3], y[4:]])[:, torch.arange(n, device=DEVICE) != 70]
    assert bool(rest.isfinite().all())
    assert bool((rest[4] == 0).all())


@pytest.mark.parametrize("name", BLOCK_CONFIGS)
def test_nan_in_a_block_scale_touches_its_own_block_alone(name: str) -> None:
    m, n, k = 19, 264, 272
    x, w = codes("fp8", m, k, 1), codes("fp8", n, k, 2)
    x_scale, w_scale = block_scales(m, n, k)
    x_scale[3, 2], w_scale[1, 0] = torch.nan, torch.nan
    y = w8a8_fp8_block_gemm(x, x_scale, w, w_scale, None, torch.bfloat16, config=BLOCK_CONFIGS[name])
    wanted = torch.zeros(m, n, dtype=torch.bool, device=DEVICE)
    wanted[3] = wanted[:, SCALE_BLOCK : 2 * SCALE_BLOCK] = True
    assert torch.equal(y.isnan(), wanted)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", CODES)
def test_strided_operands(kind: str, name: str) -> None:
    m, n, k = 18, 72, 144
    x_rows, w_rows = codes(kind, 2 * m, k + 32, 1), codes(kind, n, k + 16, 2)
    x, w = x_rows[::2, 16 : k + 16], w_rows[:, :k]
    x_scale, w_scale = scales(m, 3)[:, 1:2], scales(n, 1, seed=4)
    y = GEMMS[kind](x, x_scale, w, w_scale, bias(2 * n)[::2], torch.bfloat16, config=CONFIGS[name])
    truth = REFERENCES[kind](x, x_scale, w, w_scale, bias(2 * n)[::2], torch.float64)
    assert_close(y, truth, torch.bfloat16)
    # K is not the contiguous dimension: copied.
    y = GEMMS[kind](
        x.t().contiguous().t(), x_scale, w.t().contiguous().t(), w_scale, None, torch.bfloat16, config=CONFIGS[name]
    )
    assert_close(y, REFERENCES[kind](x, x_scale, w, w_scale, None, torch.float64), torch.bfloat16)


@pytest.mark.parametrize("name", ["swap, split", "tma"])
def test_block_scales_of_any_strides(name: str) -> None:
    m, n, k = 18, 136, 272
    x, w = codes("fp8", m, k, 1), codes("fp8", n, k, 2)
    x_scale, w_scale = block_scales(m, n, k)
    transposed = x_scale.t().contiguous().t(), w_scale.t().contiguous().t()
    y = w8a8_fp8_block_gemm(x, transposed[0], w, transposed[1], None, torch.bfloat16, config=BLOCK_CONFIGS[name])
    assert_close(y, block_truth(x, x_scale, w, w_scale, None), torch.bfloat16)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", CODES)
def test_one_scale_per_tensor(kind: str, name: str) -> None:
    m, n, k = 18, 72, 144
    x, w = codes(kind, m, k, 1), codes(kind, n, k, 2)
    x_scale, w_scale = scales(1, 1), scales(1, 1, seed=4)
    y = GEMMS[kind](x, x_scale, w, w_scale, bias(n), torch.bfloat16, config=CONFIGS[name])
    truth = REFERENCES[kind](x, x_scale.expand(m, 1), w, w_scale.expand(n, 1), bias(n), torch.float64)
    assert_close(y, truth, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["pointer, split", "tma"])
def test_bias_of_any_float(name: str, dtype: torch.dtype) -> None:
    m, n, k = 18, 72, 144
    operands = codes("fp8", m, k, 1), scales(m, 1), codes("fp8", n, k, 2), scales(n, 1, seed=4), bias(n, dtype)
    y = w8a8_fp8_gemm(*operands, torch.float16, config=CONFIGS[name])
    assert_close(y, reference.w8a8_fp8_gemm(*operands, torch.float64), torch.float16)


def test_no_rows_and_no_sum() -> None:
    empty = w8a8_int8_gemm(codes("int8", 0, 64, 1), scales(0, 1), codes("int8", 8, 64, 2), ones(8), None, torch.float16)
    assert empty.shape == (0, 8)
    no_k = w8a8_fp8_gemm(codes("fp8", 4, 0, 1), ones(4), codes("fp8", 8, 0, 2), ones(8), bias(8), torch.bfloat16)
    assert torch.equal(no_k, bias(8).expand(4, 8))
    x_scale, w_scale = torch.empty(0, 1, device=DEVICE), scales(1, 1)
    empty = w8a8_fp8_block_gemm(codes("fp8", 0, 64, 1), x_scale, codes("fp8", 8, 64, 2), w_scale, None, torch.float16)
    assert empty.shape == (0, 8)


def test_split_sums_do_not_depend_on_what_ran_before() -> None:
    operands = codes("fp8", 9, 512, 1), scales(9, 1), codes("fp8", 72, 512, 2), scales(72, 1, seed=4), None
    config = CONFIGS["swap, split"]
    first = w8a8_fp8_gemm(*operands, torch.float32, config=config)
    assert torch.equal(first, w8a8_fp8_gemm(*operands, torch.float32, config=config))


@pytest.mark.parametrize(
    ("config", "n", "out_dtype", "words"),
    [
        (dataclasses.replace(POINTER, form="fast"), 72, torch.bfloat16, "form must be one of pointer, swap"),
        (TMA, 72, torch.float32, "2-byte numbers"),
        (TMA, 70, torch.bfloat16, "rows of out"),
        (dataclasses.replace(TMA, split_k=2), 72, torch.bfloat16, "do not split K"),
    ],
)
def test_a_config_that_cannot_run_is_an_error(config: Config, n: int, out_dtype: torch.dtype, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        w8a8_int8_gemm(codes("int8", 18, 64, 1), ones(18), codes("int8", n, 64, 2), ones(n), None, out_dtype, config)


@pytest.mark.parametrize("config", [POINTER, dataclasses.replace(BLOCK_CONFIGS["tma"], block_n=256)])
def test_tiles_must_fit_the_blocks_of_scales(config: Config) -> None:
    x, w = codes("fp8", 18, 64, 1), codes("fp8", 72, 64, 2)
    with pytest.raises(ValueError, match="block_k must be 128 and block_n divide it"):
        w8a8_fp8_block_gemm(x, *block_scales(18, 72, 64)[:1], w, block_scales(18, 72, 64)[1], None, torch.half, config)


def test_why_descriptors_cannot_be_used() -> None:
    x, w, out = codes("int8", 20, 64, 1), codes("int8", 8, 64, 2), torch.empty(20, 8, device=DEVICE, dtype=torch.half)
    assert tma_reason(x, w, out) is None
    assert "rows of x" in str(tma_reason(codes("int8", 20, 72, 1)[:, 8:], w, out))
    assert "rows of w" in str(tma_reason(x, codes("int8", 8, 72, 1)[:, :64], out))
    assert "2-byte" in str(tma_reason(x, w, out.float()))


@pytest.mark.parametrize("m", [1, 16, 32, 64, 100, 128, 256, 512, 4096, 20000])
@pytest.mark.parametrize(("n", "k"), [(576, 576), (4096, 4096), (28672, 8192), (8192, 28672), (1, 16)])
def test_candidates(m: int, n: int, k: int) -> None:
    problem = Problem(m=m, n=n, k=k)
    for family in FAMILIES:
        found = family.candidates(problem)
        assert len(set(found)) == len(found) <= MOST_CANDIDATES
        # Also what sm_89 and sm_80 hold, where there are no tensor descriptors.
        held = family.fitting(problem, (99 if family.name.endswith("pointer") else 227) << 10)
        assert held
        assert all(c.form == "swap" for c in held) == (m <= 64)
        if family in (INT8.pointer, FP8.pointer, FP8_BLOCK.pointer):
            assert {c.form for c in found} <= {"pointer", "swap"}
        if family in (FP8_BLOCK.pointer, FP8_BLOCK.tma):
            assert all(c.block_k == SCALE_BLOCK and SCALE_BLOCK % c.block_n == 0 for c in found)


def test_guesses_for_an_h100() -> None:
    cpu = torch.device("cpu")
    prefill = config_for(FP8.tma, Problem(m=4096, n=4096, k=4096), cpu)
    assert (prefill.form, prefill.block_m, prefill.block_n, prefill.stages) == ("tma", 128, 256, 4)
    decode = config_for(FP8.tma, Problem(m=1, n=4096, k=4096), cpu)
    assert (decode.form, decode.block_m, decode.block_n, decode.split_k) == ("swap", 16, 64, 4)
    assert config_for(INT8.tma, Problem(m=512, n=4096, k=4096), cpu).block_n == 128
