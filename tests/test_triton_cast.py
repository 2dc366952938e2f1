"""The casts and the W8A16 kernel against plain torch: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

import interpreter  # noqa: F401, I001  switches the interpreter on before the first kernel is imported

import numpy as np
import pytest
import torch
from interpreter import DEVICE
from lowprec_kernels import reference, triton_cast, triton_w8a16
from lowprec_kernels.kernel import ActivationKind
from lowprec_kernels.reference import FP8_MAX, INT8_MAX, TINY_SCALE, rms_norm, silu_mul
from lowprec_kernels.triton_cast import Quantized, quantize
from lowprec_kernels.triton_common import counters
from lowprec_kernels.triton_w8a16 import CONVERT, READ, STRAIGHT, converted_weight, w8a16_gemm
from lowprec_kernels.tuning import Config, Family, Problem
from torch import Tensor

# K below, at and off a power of two, with one row more than a program's, and longer than a program holds.
SHAPES = [(1, 16), (5, 256), (3, 1000), (17, 272), (2, 4096), (2, 17000)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SMALL = Config(block_m=2, block_n=1, block_k=128, warps=2, stages=1)


def quantize_per_token(x: Tensor, kind: ActivationKind) -> tuple[Tensor, Tensor]:
    """Reference: x [M, K] -> codes [M, K], scale [M, 1], computed on the CPU, whose divisions are IEEE's."""
    codes, scale = reference.REFERENCES[f"quantize_per_token_{kind}"](x.cpu())
    return codes.to(x.device), scale.to(x.device)


def quantize_per_block(x: Tensor, kind: ActivationKind, block: int) -> tuple[Tensor, Tensor]:
    """Reference: x [M, K] -> codes [M, K], scale [M, ceil(K / block)], on the CPU as well."""
    codes, scale = reference.quantize(x.cpu(), kind, block)
    return codes.to(x.device), scale.to(x.device)


def values(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Heavy-tailed random values."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape, generator=generator).exp()
    return (torch.randn(shape, generator=generator) * spread).to(dtype).to(DEVICE)


def assert_same(found: Quantized, codes: Tensor, scale: Tensor) -> None:
    """The same numbers; the sign of a zero in e4m3 is free."""
    assert found.codes.dtype == codes.dtype
    torch.testing.assert_close(found.codes.float(), codes.float(), rtol=0, atol=0)
    torch.testing.assert_close(found.scale, scale, rtol=0, atol=0, equal_nan=True)


def assert_near(found: Quantized, codes: Tensor, scale: Tensor) -> None:
    """Where sums were taken in another order: scales to the last bits of bfloat16, few codes one step apart."""
    torch.testing.assert_close(found.scale, scale, rtol=2**-7, atol=0)
    a, b = found.codes.float(), codes.float()
    step = 1 if codes.dtype == torch.int8 else b.abs() / 8 + 2**-9
    assert ((a - b).abs() <= step).all()
    assert (a != b).float().mean() < 0.02


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_cast_gives_the_codes_of_the_reference(kind: ActivationKind, shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        x = values(*shape, dtype=dtype)
        assert_same(quantize(x, kind), *quantize_per_token(x, kind))
        assert_same(quantize(x, kind, block=128), *quantize_per_block(x, kind, 128))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_chunks_give_what_whole_rows_give(kind: ActivationKind) -> None:
    x = values(5, 1000)
    assert_same(quantize(x, kind, config=SMALL), *quantize_per_token(x, kind))
    assert_same(quantize(x, kind, block=64, config=SMALL), *quantize_per_block(x, kind, 64))


def test_named_casts_are_the_ops() -> None:
    x = values(3, 200)
    kinds: tuple[ActivationKind, ...] = ("int8", "fp8")
    for kind in kinds:
        cast = getattr(triton_cast, f"quantize_per_token_{kind}")
        for found, wanted in zip(cast(x), quantize_per_token(x, kind), strict=True):
            torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=0)
    codes, scale = triton_cast.quantize_per_block_fp8(x)
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == (3, 2)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_halfway_values_round_to_even(kind: ActivationKind) -> None:
    largest = INT8_MAX if kind == "int8" else FP8_MAX
    halves = torch.arange(-126.5, 127) if kind == "int8" else torch.arange(-447.0, 448) / 32
    x = torch.cat([halves, torch.tensor([largest])]).repeat(40, 1) * torch.linspace(0.01, 3, 40)[:, None]
    x = torch.cat([x, torch.cat([halves, torch.tensor([largest])])[None]])
    codes, scale = quantize_per_token(x, kind)
    assert_same(quantize(x.to(DEVICE), kind), codes.to(DEVICE), scale.to(DEVICE))
    if kind == "int8":
        # Why the kernel divides: a reciprocal moves halfway values.
        assert ((x * scale.reciprocal()).round().to(torch.int8) != codes).any()


def test_two_corrections_round_a_quotient_correctly() -> None:
    # The kernel's arithmetic with fma in 64 bits of mantissa: products of float32 are exact there.
    generator = np.random.default_rng(0)
    scale = generator.uniform(1e-3, 2e-3, 200_000).astype(np.float32)
    x = ((generator.integers(-127, 127, len(scale)) + 0.5) * scale).astype(np.float32)

    def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (a.astype(np.longdouble) * b + c).astype(np.float32)

    reciprocal = np.float32(1) / scale
    quotient = x * reciprocal
    assert (quotient != x / scale).any()
    for _ in range(2):
        quotient = fma(fma(-quotient, scale, x), reciprocal, quotient)
    assert (quotient == x / scale).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_row_that_is_not_finite_is_marked_and_touches_no_other(kind: ActivationKind) -> None:
    x = values(6, 300)
    x[0, 5], x[2, 299], x[3, 0] = torch.nan, torch.inf, -torch.inf
    x[4] = 0
    x[5] = 1e-30
    found = quantize(x, kind)
    assert_same(found, *quantize_per_token(x, kind))
    assert found.scale.isnan().flatten().tolist() == [True, False, True, True, False, False]
    assert found.scale[4].item() == pytest.approx(TINY_SCALE)
    assert_same(quantize(x, kind, block=128), *quantize_per_block(x, kind, 128))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("config", [None, SMALL], ids=["whole rows", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_forms(kind: ActivationKind, config: Config | None, dtype: torch.dtype) -> None:
    x, residual = values(7, 520, dtype=dtype), values(7, 520, dtype=dtype, seed=1)
    weight = values(520, dtype=dtype, seed=2)
    normed = quantize(x, kind, norm_weight=weight, eps=1e-5, config=config)
    assert_near(normed, *quantize_per_token(rms_norm(x, weight, 1e-5), kind))
    added = quantize(x, kind, norm_weight=weight, residual=residual, eps=1e-5, block=128, config=config)
    assert added.residual is not None
    torch.testing.assert_close(added.residual, x + residual, rtol=0, atol=0)
    assert_near(added, *quantize_per_block(rms_norm(x + residual, weight, 1e-5), kind, 128))
    assert_near(quantize(x, kind, silu=True, config=config), *quantize_per_token(silu_mul(x), kind))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_group_sums_are_sums_of_codes(kind: ActivationKind) -> None:
    for config in (None, SMALL):
        found = quantize(values(5, 640), kind, group_size=64, config=config)
        wanted = found.codes.to(torch.float64).reshape(5, 10, 64).sum(-1)
        assert found.group_sums is not None
        torch.testing.assert_close(
            found.group_sums.to(torch.float64), wanted, rtol=0 if kind == "int8" else 1e-6, atol=0
        )


def test_strides_and_no_rows() -> None:
    x = values(8, 600)
    for view in (x[::2, 100:400], x.t(), x[:, ::3]):
        assert_same(quantize(view, "int8"), *quantize_per_token(view, "int8"))
    empty = quantize(x[:0], "fp8", block=128, group_size=None)
    assert empty.codes.shape == (0, 600)
    assert empty.scale.shape == (0, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 100}, "block must be 16"),
        ({"group_size": 64}, "not made of groups"),
        ({"silu": True, "norm_weight": torch.ones(200)}, "no norm"),
        ({"norm_weight": torch.ones(7)}, "weight must be"),
        ({"residual": torch.ones(2, 200)}, "before a norm"),
    ],
)
def test_wrong_calls_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(values(2, 200), "int8", **options)  # type: ignore[arg-type]


def w8a16_operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w_codes (every int8 code occurs), w_scale, bias."""
    generator = torch.Generator().manual_seed(m + n)
    x = torch.randn(m, k, generator=generator).to(dtype)
    codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(n, 1, generator=generator) / 64 + 1e-3
    bias = torch.randn(n, generator=generator)
    return x.to(DEVICE), codes.to(DEVICE), scale.to(DEVICE), bias.to(DEVICE)


def assert_product(found: Tensor, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Within the rounding of the result's dtype and of a float32 sum, relative to the sum of magnitudes."""
    wanted = reference.w8a16_gemm(x.double(), codes, scale, bias)
    magnitude = reference.w8a16_gemm(x.double().abs(), codes.double().abs(), scale, None)
    assert found.dtype == x.dtype
    assert ((found.double() - wanted).abs() <= torch.finfo(x.dtype).eps * wanted.abs() + 1e-6 * magnitude).all()


FORMS = [
    Config(block_m=8, block_n=16, block_k=32, warps=2, split_k=1),
    Config(block_m=8, block_n=16, block_k=32, warps=2, split_k=3),
    Config(block_m=8, block_n=16, block_k=32, warps=2, split_k=7, form=STRAIGHT),
    Config(block_m=16, block_n=32, block_k=64, group_m=2, form=STRAIGHT),
    # Words, x read permuted and permuted in memory.
    Config(block_m=16, block_n=64, block_k=64, group_m=2),
    Config(block_m=16, block_n=64, block_k=128, split_k=3),
    Config(block_m=64, block_n=64, block_k=128, form=READ),
    Config(block_m=64, block_n=64, block_k=128, split_k=2),
]


@pytest.mark.parametrize("config", FORMS, ids=lambda c: f"{c.form or 'swapped'}, {c.block_m} rows, {c.split_k} splits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_w8a16_in_every_form(config: Config, dtype: torch.dtype) -> None:
    # K: whole blocks, a part of one, fewer blocks than splits (some have no work).
    # Also K without whole words.
    for m, n, k in ((5, 40, 256), (17, 33, 200), (1, 16, 64), (2, 8, 70)):
        x, codes, scale, bias = w8a16_operands(m, n, k, dtype)
        for terms in (None, bias, bias.to(dtype)):
            assert_product(w8a16_gemm(x, codes, scale, terms, config), x, codes, scale, terms)
    assert not counters(x.device).any()


@pytest.mark.parametrize("m", [1, 8, 9, 33, 64, 65, 130])
def test_w8a16_chooses_a_configuration(m: int) -> None:
    x, codes, scale, bias = w8a16_operands(m, 72, 1040, torch.bfloat16)
    assert_product(w8a16_gemm(x, codes, scale, bias), x, codes, scale, bias)


@pytest.mark.parametrize("block_m", [16, 64])
def test_w8a16_meets_each_weight_with_its_own_column(block_m: int) -> None:
    """x is one-hot, row i at column i: y is a copy of w, whatever the order is that K is summed in."""
    k = 152
    codes = w8a16_operands(1, 72, k, torch.bfloat16)[1]
    x, ones = torch.eye(k, device=DEVICE, dtype=torch.bfloat16), torch.ones(72, 1, device=DEVICE)
    found = w8a16_gemm(x, codes, ones, None, Config(block_m=block_m, block_n=64, block_k=64))
    assert torch.equal(found.to(torch.int8), codes.t())


@pytest.mark.parametrize("shape", [(40, 256), (33, 200), (16, 7), (3, 2050)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_w8a16_writes_weights_out(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, codes, scale, bias = w8a16_operands(5, *shape, dtype)
    rounded = (codes.double() * scale.double()).to(dtype)
    assert torch.equal(converted_weight(codes, scale, dtype), rounded)
    found = w8a16_gemm(x, codes, scale, bias, Config(block_m=16, block_n=16, block_k=16, form=CONVERT))
    torch.testing.assert_close(found, torch.nn.functional.linear(x, rounded, bias.to(dtype)))


def test_w8a16_takes_strides_and_no_rows() -> None:
    x, codes, scale, bias = w8a16_operands(6, 40, 128, torch.bfloat16)
    wide = w8a16_operands(6, 40, 256, torch.bfloat16)
    views = [(wide[0][:, 64:192], codes), (x.t().contiguous().t(), codes), (x, wide[1][:, ::2])]
    # Words begin at multiples of four bytes or are none.
    views += [(x, wide[1][:, 4:132]), (x, wide[1][:, 3:131])]
    for left, right in views:
        for config in (None, FORMS[-2], FORMS[-1]):
            assert_product(w8a16_gemm(left, right, scale, bias, config), left, right, scale, bias)
    assert w8a16_gemm(x[:0], codes, scale, bias).shape == (0, 40)


def test_w8a16_keeps_a_row_that_is_not_finite_to_itself() -> None:
    x, codes, scale, _ = w8a16_operands(4, 20, 128, torch.bfloat16)
    x[2, 5] = torch.nan
    found = w8a16_gemm(x, codes, scale, None)
    assert found.isnan().any(-1).tolist() == [False, False, True, False]


def test_w8a16_splits_give_the_same_bits_each_time() -> None:
    x, codes, scale, bias = w8a16_operands(3, 64, 512, torch.bfloat16)
    first, second = (w8a16_gemm(x, codes, scale, bias, FORMS[1]) for _ in range(2))
    assert torch.equal(first, second)


def test_w8a16_refuses_float32() -> None:
    x, codes, scale, bias = w8a16_operands(2, 16, 64, torch.float32)
    with pytest.raises(ValueError, match=r"float32.*convert x"):
        w8a16_gemm(x, codes, scale, bias)


@pytest.mark.parametrize("family", [triton_cast.FAMILY, triton_w8a16.FAMILY], ids=lambda f: f.name)
def test_candidates_fit_every_problem(family: Family) -> None:
    for m in (1, 8, 16, 32, 64, 65, 256, 257, 16384):
        for n, k in ((1, 16), (8192, 8192), (28672, 8192), (1024, 53248)):
            fitting = family.fitting(Problem(m=m, n=n, k=k))
            assert len(set(fitting)) == len(fitting)
            # 99 KB: what a block of sm_86 and sm_89 may hold.
            assert family.fitting(Problem(m=m, n=n, k=k), 99 << 10)
