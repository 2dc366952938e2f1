"""What a kernel is: one form of computing y = x W^T + b from stored codes, in two steps.

`prepare` turns operands (codes, scales, bias) into the layout that the form wants, once; `run` computes from it. A
kernel says which weight and activation format it computes ("int8" weights with "int8" activations, ...), so two
kernels of equal formats compute the same numbers up to rounding, those of the op that `ops.GEMMS` names for the pair,
and differ in speed alone. Which one is best is
never assumed: it depends on the processor and is measured (`timing.py`).

A module of this package that has a tuple `KERNELS` adds its kernels to `registered()`; nothing else is edited. Modules
called `triton_*` need triton and are left out where it is not installed.
"""

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

import lowprec_kernels
from lowprec_kernels.reference import FP8_MAX, INT8_MAX, per_token_scale

WeightKind = Literal["bf16", "int8", "fp8", "int4"]
ActivationKind = Literal["int8", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Operands:
    """One layer's weight as it is stored.

    Attributes:
        weight: the weight format's kind.
        codes: [N, K] bfloat16 (bf16), int8 or float8_e4m3fn, or [N, words_for(K)] int32 (int4, see `packing.py`).
        scale: [N, 1] or, int4, [N, K/G] float32 that holds bfloat16 values; None for bf16.
        group_size: int4 alone: G, the columns that share a scale.
        multiples: int4 alone, and only where the scales of each row are whole multiples, 1 to 15, of one step: those,
            [N, K/G] int8. Codes times multiples are then INT8 codes of the same weight, with the step for a scale.
        zero: int4 alone: [N, K/G] int8, the code (in [-8, 7]) that stands for zero in each group; None for 0.
        bias: [N] or None.
        activation_scale: calibrated scale of the activations (scalar), None when they are scaled per token.
    """

    weight: WeightKind
    codes: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    activation_scale: Tensor | None = None
    zero: Tensor | None = None
    group_size: int | None = None
    multiples: Tensor | None = None

    @property
    def n(self) -> int:
        """Output width."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Input width."""
        return self.codes.shape[1] if self.group_size is None else self.scales().shape[1] * self.group_size

    def rows(self, which: slice) -> "Operands":
        """Some of the N rows as a weight of their own."""
        names = ("codes", "scale", "bias", "zero", "multiples")
        cut: dict[str, Any] = {name: None if (part := getattr(self, name)) is None else part[which] for name in names}
        return replace(self, **cut)

    def steps(self) -> Tensor:
        """[N] float32: of each row the step that its scales are multiples of."""
        if self.multiples is None:
            raise ValueError("the scales of these weights are no multiples of a step")
        return self.scales()[:, 0] / self.multiples[:, 0]

    def scales(self) -> Tensor:
        """`scale`, which every quantised weight has."""
        if self.scale is None:
            raise ValueError(f"a weight of kind {self.weight} needs scales")
        return self.scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """Operands and what a kernel's `prepare` made of them."""

    operands: Operands
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kernel:
    """One form of computing a linear layer.

    Attributes:
        name: unique among the kernels of equal weight, activation and device.
        weight, activation: kinds of format that it computes; activation None for unquantised ones.
        device: "cpu", "cuda", or "any".
        bytes_per_weight: bytes that a call reads per weight, scales aside.
        check: (n, k, group_size) -> None, or why it cannot run.
        layout: operands -> the tensors it computes from.
        compute: (state, x [M, K] contiguous, M > 0) -> [M, N] float; bias included.
        by_rows: whether it needs weights that are INT8 by rows as well (`Operands.multiples`); `supports`, which is
            told of shapes alone, cannot say.
    """

    name: str
    weight: WeightKind
    activation: ActivationKind | None
    device: str
    bytes_per_weight: float
    check: Callable[[int, int, int | None], str | None]
    layout: Callable[[Operands], tuple[Tensor, ...]]
    compute: Callable[[State, Tensor], Tensor]
    by_rows: bool = False

    def supports(self, m: int, n: int, k: int, group_size: int | None = None) -> str | None:
        """None if x[m, k] @ w[n, k]^T can be computed, else the reason."""
        if min(n, k) < 1 or m < 0:
            return f"{self.name}: empty matrix {m} x {n} x {k}"
        return self.check(n, k, group_size)

    def prepare(self, operands: Operands) -> State:
        """Lays the operands out; ValueError when they are of another kind."""
        if operands.weight != self.weight:
            raise ValueError(f"{self.name} computes {self.weight} weights, not {operands.weight}")
        if operands.zero is not None and self.activation is not None:
            raise ValueError(f"{self.name} computes symmetric weights, these have zero points")
        if self.by_rows and operands.multiples is None:
            raise ValueError(f"{self.name} computes weights whose scales are multiples of a step of their row")
        return State(operands=operands, tensors=self.layout(operands))

    def run(self, state: State, x: Tensor) -> Tensor:
        """x [M, K] float32 or bfloat16, any strides -> [M, N] in x's dtype; M may be 0."""
        if x.shape[0] == 0:
            return x.new_empty((0, state.operands.n))
        return self.compute(state, x.contiguous()).to(x.dtype)


def quantize_activation(x: Tensor, kind: ActivationKind, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes as float32 values [M, K], scale [M, 1] or scalar.

    The same numbers as `reference.quantize_per_token_*` for finite rows; where a row is not finite its scale is NaN
    and the codes do not matter.
    """
    largest = INT8_MAX if kind == "int8" else FP8_MAX
    x = x.to(torch.float32)
    scale = per_token_scale(x, largest) if static_scale is None else static_scale
    codes = x / scale
    if kind == "int8":
        codes = codes.round_()
    if static_scale is not None or kind == "fp8":
        codes = codes.clamp_(-largest, largest)
    return (codes.to(torch.float8_e4m3fn).to(torch.float32) if kind == "fp8" else codes), scale


@functools.cache
def registered() -> tuple[Kernel, ...]:
    """Every kernel of every module of this package, in order of module name."""
    found: list[Kernel] = []
    with_triton = importlib.util.find_spec("triton") is not None
    for module in sorted(m.name for m in pkgutil.iter_modules(lowprec_kernels.__path__)):
        if module.startswith("triton_") and not with_triton:
            continue
        found += getattr(importlib.import_module(f"lowprec_kernels.{module}"), "KERNELS", ())
    keys = [(k.name, k.weight, k.activation, k.device) for k in found]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"kernel {key} is registered twice")
    return tuple(found)


def kernels_for(weight: str, activation: str | None, device: str) -> dict[str, Kernel]:
    """The forms that compute these formats on this device type, by name; "reference" is the slow truth."""
    return {
        k.name: k
        for k in registered()
        if k.weight == weight and k.activation == activation and k.device in (device, "any")
    }
