"""The mended interpreter computes what torch computes; with `TRITON_INTERPRET=0` the same tests ask a GPU."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import interpreter
from interpreter import DEVICE, INTERPRETED

FINITE = [0.0, -0.0, 1.0, -1.97, 1.97, 0.0625, 17.0, 18.0, 19.0, 447.0, 448.0, -463.9, 2.0**-9, 1.5 * 2.0**-9, 2.0**-10]
BEYOND = [464.1, 1e4, -1e30, float("inf"), float("-inf"), float("nan")]


@triton.jit
def cast_kernel(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def dot_kernel(x, w, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    tl.store(y + tile, tl.dot(tl.load(x + tile), tl.load(w + tile)))


@triton.jit
def arithmetic_kernel(x, w, y, N: tl.constexpr, OP: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(w + i)
    if OP == "add":
        c = a + b
    elif OP == "sub":
        c = a - b
    elif OP == "mul":
        c = a * b
    elif OP == "maximum":
        c = tl.maximum(a, b)
    else:
        c = tl.minimum(a, b)
    tl.store(y + i, c)


@triton.jit
def less_kernel(x, w, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tl.store(y + i, (tl.load(x + i) < tl.load(w + i)).to(tl.int8))


@triton.jit
def constant_kernel(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i, mask=i < N // 2, other=-8.0) + tl.full((N,), 3.0, tl.bfloat16))


@triton.jit
def reduce_kernel(x, y, N: tl.constexpr, SUM: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(y, tl.sum(a, 0) if SUM else tl.max(a, 0))


@triton.jit
def add_kernel(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tl.atomic_add(y + i, tl.load(x + i))


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    cast_kernel[(1,)](x, y, N=x.numel())
    return y


def _every_code(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device=DEVICE).view(dtype)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_dot(source: torch.dtype) -> None:
    x, w = (_random(32, 32, seed=seed).mul(10).to(source) for seed in (1, 2))
    y = torch.empty(32, 32, dtype=torch.int32 if source == torch.int8 else torch.float32, device=DEVICE)
    dot_kernel[(1,)](x, w, y, N=32)
    torch.testing.assert_close(y.double(), x.double() @ w.double(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "maximum", "minimum"])
def test_arithmetic_of_bfloat16(op: str) -> None:
    x, w = (_random(1024, seed=seed).to(torch.bfloat16) for seed in (1, 2))
    y = torch.empty_like(x)
    arithmetic_kernel[(1,)](x, w, y, N=1024, OP=op)
    assert torch.equal(y, getattr(torch, op)(x, w))


def test_comparison_of_bfloat16() -> None:
    x, w = (_random(1024, seed=seed).to(torch.bfloat16) for seed in (1, 2))
    y = torch.empty(1024, dtype=torch.int8, device=DEVICE)
    less_kernel[(1,)](x, w, y, N=1024)
    assert torch.equal(y.bool(), x < w)


def test_constants_of_bfloat16() -> None:
    x = _random(32).to(torch.bfloat16)
    y = torch.empty_like(x)
    constant_kernel[(1,)](x, y, N=32)
    assert torch.equal(y[:16], x[:16] + 3)
    assert torch.equal(y[16:], torch.full_like(y[16:], -5))


def test_largest_of_bfloat16() -> None:
    x = -_random(128).abs().to(torch.bfloat16)
    y = torch.empty(1, device=DEVICE)
    reduce_kernel[(1,)](x, y, N=128, SUM=False)
    assert y.item() == x.max().item()


@pytest.mark.parametrize("source", [torch.float32, torch.int8, torch.int32], ids=str)
def test_rounding_to_bfloat16(source: torch.dtype) -> None:
    special = torch.tensor([1 + 3 / 256, 1 + 1 / 256, -1 - 3 / 256, 3e38, 1e-40, float("inf"), float("nan"), 0.0])
    x = torch.cat([special, torch.arange(-64, 0)]).repeat(2)[:64] if source == torch.float32 else torch.arange(-64, 64)
    x = x.to(source).to(DEVICE) * (5 if source == torch.int32 else 1)
    torch.testing.assert_close(_cast(x, torch.bfloat16), x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.int32], ids=str)
def test_widening_of_bfloat16(target: torch.dtype) -> None:
    x = (_random(256) * 100).to(torch.bfloat16)
    assert torch.equal(_cast(x, target), x.to(target))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_to_e4m3(source: torch.dtype) -> None:
    x = torch.cat([torch.tensor(FINITE + BEYOND), _random(1024).cpu() * 100])[:1024].to(source).to(DEVICE)
    expected = x.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    torch.testing.assert_close(_cast(x, torch.float8_e4m3fn).float(), expected.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_widening_of_every_e4m3(target: torch.dtype) -> None:
    codes = _every_code(torch.float8_e4m3fn)
    torch.testing.assert_close(_cast(codes, target), codes.to(target), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_what_is_not_mended_is_refused() -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="use fp32"):
        add_kernel[(1,)](x, x.clone(), N=16)
    with pytest.raises(Exception, match="use fp32"):
        reduce_kernel[(1,)](x, x.clone(), N=16, SUM=True)


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_a_second_mend_is_refused() -> None:
    assert not any(interpreter.defects().values())
    with pytest.raises(RuntimeError, match="bfloat16 dot"):
        interpreter.mend()
