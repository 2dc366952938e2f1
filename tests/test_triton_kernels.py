"""The runtime's forms for CUDA devices: in Triton's interpreter on CPU tensors, or on a GPU with TRITON_INTERPRET=0."""

import dataclasses

import pytest
import torch
from torch import Tensor

from interpreter import DEVICE
from lowprec_kernels import slow
from lowprec_kernels.kernel import Kernel, Operands
from lowprec_kernels.packing import pack_int4
from lowprec_kernels.triton_kernels import KERNELS

FORMS = [kernel for kernel in KERNELS if kernel.name == "triton"]
N, K, GROUP = 40, 256, 64
TOLERANCE = 1e-2


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _integers(low: int, high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8).to(DEVICE)


def _operands(kernel: Kernel, group: int = GROUP) -> Operands:
    columns = K // group if kernel.weight == "int4" else 1
    scale = ((_random(N, columns, seed=2).abs() + 1) / 128).to(torch.bfloat16).to(torch.float32)
    if kernel.weight == "int4":
        return Operands(weight="int4", codes=pack_int4(_integers(-8, 8, N, K)), scale=scale, group_size=group)
    codes = _integers(-127, 128, N, K)
    if kernel.weight == "fp8":
        codes = (_random(N, K, seed=3) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Operands(weight=kernel.weight, codes=codes, scale=scale)


def _check(kernel: Kernel, operands: Operands, x: Tensor) -> None:
    y = kernel.run(kernel.prepare(operands), x)
    truth = slow.linear64(operands, kernel.activation, x)
    assert (y.shape, y.dtype) == ((len(x), N), x.dtype)
    assert float((y.to(torch.float64) - truth).norm() / truth.norm()) <= TOLERANCE


@pytest.mark.parametrize("kernel", FORMS, ids=lambda k: f"{k.weight}-{k.activation}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activations_and_biases_of_any_dtype(dtype: torch.dtype, kernel: Kernel) -> None:
    assert kernel.supports(3, N, K, GROUP if kernel.weight == "int4" else None) is None
    for bias in (None, _random(N, seed=4), _random(N, seed=4).to(torch.bfloat16)):
        _check(kernel, dataclasses.replace(_operands(kernel), bias=bias), _random(3, 2 * K).to(dtype)[:, ::2])


@pytest.mark.parametrize(
    "kernel", [k for k in FORMS if k.activation is not None], ids=lambda k: f"{k.weight}-{k.activation}"
)
def test_fixed_scales(kernel: Kernel) -> None:
    static = torch.tensor(0.03, device=DEVICE)
    _check(kernel, dataclasses.replace(_operands(kernel), activation_scale=static), _random(3, K).to(torch.bfloat16))


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("kernel", [k for k in FORMS if k.weight == "int4"], ids=lambda k: str(k.activation))
def test_every_group_size(kernel: Kernel, group: int) -> None:
    _check(kernel, _operands(kernel, group), _random(5, K).to(torch.bfloat16))


def test_zero_points_where_activations_are_not_quantised() -> None:
    for kernel in (k for k in FORMS if k.weight == "int4"):
        operands = dataclasses.replace(_operands(kernel), zero=_integers(-8, 8, N, K // GROUP, seed=5))
        if kernel.activation is None:
            _check(kernel, operands, _random(5, K).to(torch.bfloat16))
        else:
            with pytest.raises(ValueError, match="zero points"):
                kernel.prepare(operands)


def test_a_group_size_that_no_kernel_takes_is_answered_with_a_reason() -> None:
    for kernel in (k for k in FORMS if k.weight == "int4"):
        assert "not 48" in str(kernel.supports(4, N, 96, 48))
