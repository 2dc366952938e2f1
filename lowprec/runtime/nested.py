"""The linear layer that runs in two levels of one stored weight, and the model that is made of such layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.errors import ConfigError, ModelError
from lowprec.formats import WEIGHT_FORMATS
from lowprec.formats.asymmetric import offset_codes
from lowprec.formats.nested import LEVELS, NestedWeight, refuses
from lowprec.registry import closest
from lowprec.runtime.convert import linear_layers, weight_of
from lowprec.runtime.switch import Switch, vectors
from lowprec_kernels import cpu_nested
from lowprec_kernels.cpu_nested import NestedOperands
from lowprec_kernels.custom_op import launcher
from lowprec_kernels.packing import pack_int4, unpack_int4
from lowprec_kernels.reference import nested_gemm as reference

_BUFFERS = ("base", "residual", "scale", "ratio", "zero", "bias")


class NestedLinear(nn.Module):
    """y = x W^T + b, W at the level that the switch has for the layer's group.

    Buffers: `base` and `residual` (packed words), `scale` ([N, K/G] bfloat16), `ratio` and, where the format has zero
    points, `zero` ([N, K/G] int8), `bias` ([N] float32 or None). Converting the module to another dtype leaves them as
    they are; moving it to another device moves them.

    Args:
        weight: both planes.
        bias: [N] or None.
        switch: whose rung it follows.
        place: of its group in the switch.

    Raises:
        ConfigError: the parts are no nested weight.
    """

    base: Tensor
    residual: Tensor
    scale: Tensor
    ratio: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: NestedWeight, bias: Tensor | None, switch: Switch, place: int) -> None:
        super().__init__()
        if reason := refuses(weight):
            raise ConfigError(f"the weight cannot run in two levels: it {reason}")
        self.out_features, self.in_features = weight.base.codes.shape
        self.group_size, self.format = weight.group_size, weight.base.format
        self.switch, self.place = switch, place
        codes, zero = weight.base.codes, None
        if not WEIGHT_FORMATS[self.format].symmetric:
            codes, zero = offset_codes(weight.base)
        parts = {
            "base": pack_int4(codes),
            "residual": pack_int4(weight.residual),
            "scale": weight.base.scale.to(torch.bfloat16),
            "ratio": weight.ratio,
            "zero": zero,
            "bias": None if bias is None else bias.detach().to(torch.float32),
        }
        for name, part in parts.items():
            self.register_buffer(name, None if part is None else part.contiguous())
        self._laid_out: Any = None

    @property
    def form(self) -> str:
        """What computes few rows here; see `lowprec_kernels.cpu_nested`."""
        return "triton" if self.base.is_cuda else cpu_nested.few_rows_form(self.group_size)

    def operands(self) -> NestedOperands:
        """The stored weight as kernels take it (no copy)."""
        return NestedOperands(**{name: getattr(self, name) for name in _BUFFERS}, group_size=self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float -> [..., N] in x's dtype."""
        level = self.switch.level(self.place)
        y = self._multiply(self._flat(x), level)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _multiply(self, x: Tensor, level: int) -> Tensor:
        if self._laid_out is None:
            self._laid_out = self._on_gpu() if self.base.is_cuda else self.operands()
        if self.base.is_cuda:
            y: Tensor = launcher("nested_gemm")(x, *self._laid_out, self.group_size, level)
            return y
        exact = x if x.dtype in (torch.float32, torch.bfloat16) else x.to(torch.float32)
        return cpu_nested.nested_gemm(self._laid_out, exact, level).to(x.dtype)

    def _on_gpu(self) -> tuple[Tensor | None, ...]:
        """Operands in the strides that the kernels read fastest."""
        # Needs triton, which there is where a GPU is.
        from lowprec_kernels.triton_w4 import scale_layout, zero_layout

        scale = scale_layout(self.scale)
        zero = None if self.zero is None else zero_layout(self.zero, scale)
        return self.base, self.residual, scale, zero_layout(self.ratio, scale), zero, self.bias

    def reference(self, x: Tensor, level: int) -> Tensor:
        """x [..., K] -> [..., N] float64 over the same codes and scales."""
        y = reference(
            self._flat(x).to(torch.float64), self.base, self.residual, self.scale.float(), self.ratio, self.zero,
            self.bias, self.group_size, level,
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], self.out_features)

    def unpacked_codes(self) -> Tensor:
        """Codes [N, K] of level 4 as a solver gives them, for comparison with a plan."""
        codes = unpack_int4(self.base, self.in_features)
        if self.zero is None:
            return codes
        return (codes.view(*self.zero.shape, -1) - self.zero[..., None]).view_as(codes)

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input has {x.shape[-1]} features, the layer takes {self.in_features}")
        return x.reshape(-1, self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NestedLinear":
        """Moves with the model, but never changes a dtype: codes and scales are data, not parameters."""

        def moved(buffer: Tensor) -> Tensor:
            result = fn(buffer)
            return result if result.dtype == buffer.dtype else buffer.to(result.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self._laid_out = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies of the layer lay their own operands out."""
        return {**self.__dict__, "_laid_out": None}

    def extra_repr(self) -> str:
        """Shape, format, and what computes it."""
        return f"in={self.in_features}, out={self.out_features}, base={self.format}, levels={LEVELS}, form={self.form}"


def nest_(
    model: nn.Module,
    nested: Mapping[str, NestedWeight],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    rungs: Sequence[int | Mapping[str, int]] = LEVELS,
) -> Switch:
    """Replaces the layers named in `nested`, in place, and returns the switch that their levels follow.

    Args:
        model: its calls are the passes that see one rung each.
        nested: name of a linear layer -> both planes.
        groups: group -> its layers, which change their level together; None: each layer is a group.
        rungs: the cheapest first: a level for all groups, or group -> level.

    Raises:
        ConfigError: a name that is no linear layer of the model; a layer in no group, in two, or in a group but not
            nested; rungs that do not fit the groups; a level that does not exist.
        ModelError: codes of another shape than the layer.
    """
    known = linear_layers(model)
    if unknown := [name for name in nested if name not in known]:
        raise ConfigError(f"{unknown[0]!r} is no linear layer of this model: {closest(unknown[0], list(known))}")
    members = {name: (name,) for name in nested} if groups is None else {k: tuple(v) for k, v in groups.items()}
    place_of = _places(members, nested)
    switch = Switch(list(members), vectors(list(members), rungs))
    made = {}
    for name, weight in nested.items():
        shape = weight_of(known[name]).shape
        if weight.base.codes.shape != shape:
            raise ModelError(f"{name}: codes are {tuple(weight.base.codes.shape)}, the layer's weight {tuple(shape)}")
        bias = known[name].bias
        made[name] = NestedLinear(weight, bias if isinstance(bias, Tensor) else None, switch, place_of[name])
    # Nothing is replaced before everything could be built: an error leaves the model as it was.
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        layer.train(known[name].training)
        setattr(model.get_submodule(parent), child, layer)
    model.forward = _Forward(model.forward, switch)
    return switch


class _Forward:
    """A model's forward whose calls are passes of `switch`; a class, so that the model can be copied and pickled."""

    def __init__(self, forward: Callable[..., Any], switch: Switch) -> None:
        # Its parameters are asked for by name, which this lets `inspect.signature` see.
        self.__wrapped__, self._switch = forward, switch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._switch.in_pass(self.__wrapped__, *args, **kwargs)


def _places(groups: Mapping[str, Sequence[str]], nested: Mapping[str, NestedWeight]) -> dict[str, int]:
    """Layer -> place of its group."""
    found: dict[str, int] = {}
    for place, (group, layers) in enumerate(groups.items()):
        for layer in layers:
            if layer not in nested:
                raise ConfigError(f"group {group!r} has the layer {layer!r}, which has no nested weight")
            if layer in found:
                raise ConfigError(f"{layer!r} is in two groups; a layer has one level")
            found[layer] = place
    if missing := [layer for layer in nested if layer not in found]:
        raise ConfigError(f"{missing[0]!r} is in no group; every nested layer needs one")
    return found
