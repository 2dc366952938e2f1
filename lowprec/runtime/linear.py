"""The linear layer that runs in a scheme: stored codes, and for each number of rows the kernel chosen for it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.errors import ConfigError
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight, resolve
from lowprec.formats.asymmetric import from_offset
from lowprec.records import Scheme
from lowprec.runtime.dispatch import KernelTable, bucket_of, choose, group_size_of, kinds, operands_of
from lowprec_kernels.kernel import Kernel, Operands, State
from lowprec_kernels.packing import unpack_int4
from lowprec_kernels.slow import linear64

DENSE_TOLERANCE = 1e-2


class QuantLinear(nn.Module):
    """y = x W^T + b with W in codes.

    Buffers: `codes` ([N, K], or packed words for INT4), `scale` ([N, K/G] float32), `zero` ([N, K/G] int8,
    where the format has zero points), `multiples` (the same, where scales are of two levels), `bias` ([N]),
    `activation_scale` (scalar, static schemes only). Converting the module to another dtype leaves them as they are;
    moving it to another device moves them. Layouts that kernels prepare are made on first use and kept.

    Args:
        operands: the stored weight.
        scheme: what it computes; a scheme without a group size is resolved by K.
        kernels: a table to choose from, or the name of one kernel, which is then used or refused.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    bias: Tensor | None
    activation_scale: Tensor | None
    multiples: Tensor | None

    def __init__(self, operands: Operands, scheme: Scheme, kernels: "KernelTable | str") -> None:
        super().__init__()
        self.in_features, self.out_features = operands.k, operands.n
        self.scheme = resolve(scheme, operands.k)
        self._weight_kind = kinds(self.scheme)[0]
        if operands.weight != self._weight_kind:
            raise ConfigError(f"scheme {self.scheme.name} needs {self._weight_kind} codes, these are {operands.weight}")
        static = self.scheme.activation is not None and self.scheme.activation.endswith("-static")
        if static != (operands.activation_scale is not None):
            wanted = "needs a calibrated activation scale" if static else "scales activations itself"
            raise ConfigError(f"scheme {self.scheme.name} {wanted}; calibrate the layer or choose another scheme")
        for name in ("codes", "scale", "zero", "multiples", "bias", "activation_scale"):
            self.register_buffer(name, getattr(operands, name))
        self.kernels = choose(kernels, self.scheme, operands.n, operands.k, operands.codes.device.type)
        self._states: dict[str, State] = {}
        if operands.codes.is_cuda:
            # Laying out allocates and waits for the device, which a CUDA graph that is captured later cannot hold.
            self._states = {kernel.name: kernel.prepare(operands) for kernel in set(self.kernels)}

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        scheme: Scheme,
        bias: Tensor | None = None,
        *,
        kernels: "KernelTable | str",
        activation_scale: Tensor | None = None,
    ) -> "QuantLinear":
        """Builds the layer from a solved weight.

        Raises:
            ConfigError: weight and scheme are of different formats, or a static scheme has no activation scale.
            UnsupportedError: no kernel runs it, or the named one does not.
        """
        resolved = resolve(scheme, weight.codes.shape[1])
        if resolved.weight != weight.format:
            raise ConfigError(f"scheme {scheme.name} wants weights in {resolved.weight}, these are in {weight.format}")
        bias = None if bias is None else bias.detach()
        return cls(operands_of(weight, bias, activation_scale), resolved, kernels)

    def operands(self) -> Operands:
        """The stored weight as kernels take it (no copy)."""
        return Operands(
            weight=self._weight_kind,
            codes=self.codes,
            scale=self.scale,
            zero=self.zero,
            bias=self.bias,
            activation_scale=self.activation_scale,
            group_size=group_size_of(self.scheme),
            multiples=self.multiples,
        )

    def unpacked_codes(self) -> Tensor:
        """Codes [N, K] as a solver gives them, for comparison with a plan."""
        if self._weight_kind != "int4":
            return self.codes
        codes = unpack_int4(self.codes, self.in_features)
        return codes if self.zero is None else from_offset(codes, self.zero)

    @property
    def tolerance(self) -> float:
        """Largest relative error (Frobenius) against `reference` that the format allows."""
        return DENSE_TOLERANCE if self.scheme.weight is None else WEIGHT_FORMATS[self.scheme.weight].tolerance

    def kernel_for(self, rows: int) -> Kernel:
        """The kernel that computes `rows` rows."""
        return self.kernels[bucket_of(rows)]

    def kernel_of(self, x: Tensor) -> Kernel:
        """The kernel that computes x [..., K]."""
        return self.kernel_for(x.numel() // self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float -> [..., N] in x's dtype."""
        flat = self._flat(x)
        kernel = self.kernel_for(flat.shape[0])
        state = self._states.get(kernel.name)
        if state is None:
            state = self._states[kernel.name] = kernel.prepare(self.operands())
        return kernel.run(state, flat).reshape(*x.shape[:-1], self.out_features)

    def reference(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] float64 over the same codes, scales and activations, rounded where `forward` does."""
        y = linear64(self.operands(), self.kernel_of(x).activation, self._flat(x))
        return y.reshape(*x.shape[:-1], self.out_features)

    def relative_error(self, x: Tensor) -> float:
        """||forward(x) - reference(x)|| / ||reference(x)||."""
        truth = self.reference(x)
        return float((self(x).to(torch.float64) - truth).norm() / truth.norm().clamp_min(1e-30))

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input has {x.shape[-1]} features, the layer takes {self.in_features}")
        return x.reshape(-1, self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Moves with the model, but never changes a dtype: codes and scales are data, not parameters."""

        def moved(buffer: Tensor) -> Tensor:
            result = fn(buffer)
            return result if result.dtype == buffer.dtype else buffer.to(result.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self._states.clear()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies of the layer prepare their own layouts."""
        return {**self.__dict__, "_states": {}}

    def extra_repr(self) -> str:
        """Shape, scheme and the kernel of each bucket."""
        forms = ", ".join(kernel.name for kernel in self.kernels)
        return f"in={self.in_features}, out={self.out_features}, scheme={self.scheme.name}, kernels=({forms})"
