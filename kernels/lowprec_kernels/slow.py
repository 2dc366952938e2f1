"""The references as kernels: every pair of formats has a form called "reference", on any device.

It calls the reference of the pair's op, never the op, which on a GPU runs a fast kernel: this is what those are held
against. It is right rather than fast (float64 sums of dequantised or integer operands) and takes part in no automatic
choice as long as another form can run.
"""

import torch
from torch import Tensor

from lowprec_kernels import ops, reference
from lowprec_kernels.kernel import ActivationKind, Kernel, Operands, State, WeightKind

NAME = "reference"
ROWS_AT_ONCE = 4096


def _always(n: int, k: int, group_size: int | None) -> str | None:
    return None


def _as_stored(operands: Operands) -> tuple[Tensor, ...]:
    return (operands.codes,)


def _quantized(x: Tensor, activation: ActivationKind, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [M, K], scale [M, 1]."""
    if static_scale is None:
        return reference.quantize(x, activation)
    return reference.quantize_static(x, static_scale, activation), static_scale.expand(len(x), 1)


def linear64(operands: Operands, activation: ActivationKind | None, x: Tensor) -> Tensor:
    """[M, K] -> [M, N] float64: the reference of the pair's op on these operands, which every form is held against.

    Some rows of the weight at a time: a head of 49,152 would take a gigabyte in float64.
    """
    slices = [slice(start, start + ROWS_AT_ONCE) for start in range(0, operands.n, ROWS_AT_ONCE)]
    return torch.cat([_linear64(operands.rows(rows), activation, x) for rows in slices], 1)


def _linear64(operands: Operands, activation: ActivationKind | None, x: Tensor) -> Tensor:
    if operands.weight == "bf16":
        y = x.to(torch.float64) @ operands.codes.to(torch.float64).t()
        return y if operands.bias is None else y + operands.bias.to(torch.float64)
    left = (x.to(torch.float64),) if activation is None else _quantized(x, activation, operands.activation_scale)
    group: tuple[object, ...] = () if operands.group_size is None else (operands.group_size,)
    if operands.zero is not None:
        group = (*group, operands.zero)
    dtype = () if activation is None else (torch.float64,)
    gemm = reference.REFERENCES[ops.GEMMS[operands.weight, activation]]
    found: Tensor = gemm(*left, operands.codes, operands.scales(), operands.bias, *group, *dtype)
    return found


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


STORED_BYTES: dict[WeightKind, float] = {"bf16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5}
KERNELS: tuple[Kernel, ...] = (
    _kernel("bf16", None, STORED_BYTES["bf16"]),
    *(_kernel(weight, activation, STORED_BYTES[weight]) for weight, activation in ops.GEMMS),
)
