"""The references as kernels: every pair of formats has a form called "reference", on any device.

It is right rather than fast (float64 sums of dequantised or integer operands) and takes part in no automatic choice
as long as another form can run.
"""

import torch
from torch import Tensor

from lowprec_kernels import reference
from lowprec_kernels.kernel import ActivationKind, Kernel, Operands, State, WeightKind

NAME = "reference"


def _always(n: int, k: int, group_size: int | None) -> str | None:
    return None


def _as_stored(operands: Operands) -> tuple[Tensor, ...]:
    return (operands.codes,)


def _weight64(operands: Operands) -> Tensor:
    """[N, K] float64: the weight that the codes stand for."""
    if operands.weight == "bf16":
        return operands.codes.to(torch.float64)
    if operands.weight == "int4":
        assert operands.group_size is not None
        return reference.grouped_weight(operands.codes, operands.scales(), operands.group_size)
    return operands.codes.to(torch.float64) * operands.scales().to(torch.float64)


def quantized_input(x: Tensor, activation: ActivationKind | None, static_scale: Tensor | None) -> Tensor:
    """x [M, K] -> float64 values that the quantised activations stand for (x itself when `activation` is None)."""
    if activation is None:
        return x.to(torch.float64)
    if static_scale is None:
        quantize = reference.quantize_per_token_int8 if activation == "int8" else reference.quantize_per_token_fp8
        codes, scale = quantize(x)
    else:
        codes, scale = reference.quantize_static(x, static_scale, activation), static_scale
    return codes.to(torch.float64) * scale.to(torch.float64)


def linear64(operands: Operands, activation: ActivationKind | None, x: Tensor) -> Tensor:
    """[M, K] -> [M, N] float64 over the quantised operands: what every form is held against."""
    y = quantized_input(x, activation, operands.activation_scale) @ _weight64(operands).t()
    return y if operands.bias is None else y + operands.bias.to(torch.float64)


def _kernel(weight: WeightKind, activation: ActivationKind | None, bytes_per_weight: float) -> Kernel:
    def compute(state: State, x: Tensor) -> Tensor:
        return linear64(state.operands, activation, x)

    return Kernel(
        name=NAME,
        weight=weight,
        activation=activation,
        device="any",
        bytes_per_weight=bytes_per_weight,
        check=_always,
        layout=_as_stored,
        compute=compute,
    )


KERNELS: tuple[Kernel, ...] = (
    _kernel("bf16", None, 2.0),
    _kernel("int8", None, 1.0),
    _kernel("int8", "int8", 1.0),
    _kernel("fp8", "fp8", 1.0),
    _kernel("int4", None, 0.5),
    _kernel("int4", "int8", 0.5),
    _kernel("int4", "fp8", 0.5),
)
