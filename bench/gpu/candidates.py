"""The kernels under test behind one interface: random operands, the launch, the float64 truth, the tuning family.

Everything that depends on how a launcher is named or what it takes stands here, and only here. A weight is a tuple of
tensors whose first dimension are rows of w (experts before it, for a mixture of experts); an input is the tuple that
the kernel takes for x. Truths are `reference.py`'s in float64 wherever it has one.
"""

import functools
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.setting import Setting
from lowprec_kernels import reference
from lowprec_kernels.packing import CHUNK, PLANE, words_for
from lowprec_kernels.tuning import Config, Family, Problem

Tensors = tuple[Tensor, ...]
BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """x[m, k] @ w[n, k]^T; with `experts`, m sorted rows in all."""

    m: int
    n: int
    k: int
    experts: int = 1

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}" + (f"x{self.experts}" if self.experts > 1 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One kernel with one kind of operands.

    Attributes:
        name: unique, also in the results.
        module, launcher: where it is, `lowprec_kernels.triton_...`.
        weight: kind of weight ("int8", "fp8", "fp8-block", "int4", "int4-zero", "nested").
        cast: what becomes of x ("none", "int8", "fp8", "fp8-block").
        group: columns that share a scale, INT4 alone.
        rate: the precision that the matrix units compute in.
        scheme: lowprec's name for it, None where it has none.
        tolerance: largest ||y - truth|| / ||truth|| with a bfloat16 result.
        level: of a nested weight, 4 or 8.
        main: whether it is tuned and compared at every shape, not only at the first.
        tuned: the family's name with dashes, where it is not the op's.
        families: the module that has its families, where it is another one.
        experts: whether it is a mixture of experts.
    """

    name: str
    module: str
    launcher: str
    weight: str
    cast: str
    rate: str
    scheme: str | None = None
    group: int = 0
    tolerance: float = 5e-3
    level: int = 0
    main: bool = False
    tuned: str = ""
    families: str = ""
    experts: bool = False

    def loaded(self) -> Any:
        """The module; raises what its import raises."""
        return importlib.import_module(f"lowprec_kernels.triton_{self.module}")

    def missing(self) -> str | None:
        """Why it can be neither launched nor tuned here, or None."""
        try:
            getattr(self.loaded(), self.launcher)
            self.family()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def family(self) -> Family:
        """What it is tuned as."""
        return _family(self)

    def problem(self, case: Case) -> Problem:
        """The key of a case in the tuning table."""
        m = -(-case.m // case.experts)
        return Problem(m=m, n=case.n, k=case.k, experts=case.experts)

    def fits(self, case: Case) -> bool:
        """Whether the operands of a case can be made."""
        return not self.group or case.k % self.group == 0

    def integer(self) -> bool:
        """Whether it sums integers, exactly."""
        return self.rate == "int8"

    def bytes_per_weight(self) -> float:
        """Stored bytes of a weight with its scales, in a wide matrix."""
        codes = {"int8": 1.0, "fp8": 1.0, "fp8-block": 1.0, "nested": 1.0}.get(self.weight, 0.5)
        codes = 0.5 if self.level == 4 else codes
        return codes + (4 / self.group if self.group else 0.0)


def _op(name: str, module: str, launcher: str, **fields: Any) -> Op:
    return Op(name=name, module=module, launcher=launcher, **fields)


OPS = (
    _op("w8a16", "w8a16", "w8a16_gemm", weight="int8", cast="none", rate="bf16", scheme="w8a16", main=True),
    _op("w8a8-int8", "w8a8", "w8a8_int8_gemm", weight="int8", cast="int8", rate="int8", scheme="w8a8-int8", main=True,
        families="w8a8_forms"),
    _op("w8a8-fp8", "w8a8", "w8a8_fp8_gemm", weight="fp8", cast="fp8", rate="fp8", scheme="w8a8-fp8", main=True,
        families="w8a8_forms"),
    _op("w8a8-fp8-block", "w8a8_block", "w8a8_fp8_block_gemm", weight="fp8-block", cast="fp8-block", rate="fp8",
        main=True, families="w8a8_forms"),
    *(
        _op(f"{name}-g128", "w4", f"{name.replace('-', '_')}_gemm", weight="int4", cast=cast, rate=rate, group=128,
            scheme=f"{name}-g128", main=True)
        for name, cast, rate in (("w4a16", "none", "bf16"), ("w4a8-fp8", "fp8", "fp8"), ("w4a8-int8", "int8", "int8"))
    ),
    _op("w4a16-g64-zero", "w4", "w4a16_gemm", weight="int4-zero", cast="none", rate="bf16", group=64,
        tuned="w4a16-g64"),
    _op("w4a16-g32", "w4", "w4a16_gemm", weight="int4", cast="none", rate="bf16", group=32),
    *(
        _op(f"nested-level{level}", "nested", "nested_gemm", weight="nested", cast="none", rate="bf16", group=128,
            level=level, tuned=f"nested{level}a16-g128")
        for level in (4, 8)
    ),
    _op("moe-w8a8-fp8", "moe", "moe_w8a8_fp8_gemm", weight="fp8", cast="fp8", rate="fp8", experts=True),
    _op("moe-w8a8-fp8-block", "moe", "moe_w8a8_fp8_block_gemm", weight="fp8-block", cast="fp8-block", rate="fp8",
        experts=True),
    _op("moe-w8a8-int8", "moe", "moe_w8a8_int8_gemm", weight="int8", cast="int8", rate="int8", experts=True),
    _op("moe-w4a16-g128", "moe", "moe_w4a16_gemm", weight="int4", cast="none", rate="bf16", group=128, experts=True),
)  # fmt: skip


def config_label(config: Config) -> str:
    """Short: tile, warps, stages, splits of K, rows of tiles side by side, form."""
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"{tile} w{config.warps} s{config.stages} k{config.split_k} g{config.group_m} {config.form}".strip()


BY_NAME: dict[str, Op] = {op.name: op for op in OPS}
CASTS = ("int8", "fp8", "fp8-block")


@functools.cache
def _family(op: Op) -> Family:
    """The family of the op's name, or of the one that it is `tuned` as."""
    module = importlib.import_module(f"lowprec_kernels.triton_{op.families or op.module}")
    found = getattr(module, "FAMILIES", None) or (module.FAMILY,)
    families = {family.name.replace("_", "-"): family for family in found}
    name = op.tuned or op.name
    if name not in families:
        raise LookupError(f"{op.name}: no family {name} among {', '.join(families)}")
    return families[name]


def _scales(setting: Setting, *shape: int) -> Tensor:
    """Scales like those of weights of size one, exact in bfloat16."""
    scale = torch.rand(*shape, device=setting.device) / 64 + 1 / 128
    return scale.to(torch.bfloat16).to(torch.float32)


def _fp8(setting: Setting, *shape: int) -> Tensor:
    return (
        (torch.randn(*shape, device=setting.device, dtype=setting.dtype) * 64).clamp(-448, 448).to(torch.float8_e4m3fn)
    )


def _words(setting: Setting, *shape: int, k: int) -> Tensor:
    """Packed words of random codes [*shape, k]; in the last chunk, columns from K on hold code 0."""
    words = torch.randint(-(1 << 31), 1 << 31, (*shape, words_for(k)), device=setting.device, dtype=torch.int32)
    left = k % CHUNK
    if left:
        column = torch.arange(PLANE, device=setting.device)
        kept = torch.where(column < left, 0x0F, 0) + torch.where(column + PLANE < left, 0xF0, 0)
        chunks, last = words.view(torch.uint8).split((4 * words_for(k) - PLANE, PLANE), -1)
        kept = kept.to(torch.uint8)
        words = torch.cat((chunks, (last & kept) | (~kept & 0x88)), -1).view(torch.int32)
    return words


def make_weight(op: Op, case: Case, setting: Setting) -> Tensors:
    """A random weight [n, k] ([experts, n, k]) in the kernel's operands."""
    n, k = case.n, case.k
    rows = (case.experts, n) if op.experts else (n,)
    if op.weight == "int8":
        codes = torch.randint(-127, 128, (*rows, k), device=setting.device, dtype=torch.int8)
        return codes, _scales(setting, *rows, 1)
    if op.weight == "fp8":
        return _fp8(setting, *rows, k), _scales(setting, *rows, 1)
    if op.weight == "fp8-block":
        blocks = (*rows[:-1], -(-n // BLOCK), -(-k // BLOCK))
        return _fp8(setting, *rows, k), _scales(setting, *blocks)
    words, groups = _words(setting, *rows, k=k), k // op.group
    if op.experts:
        return words, _scales(setting, *rows, groups)
    # As `triton_w4.scale_layout` lays them out once for a layer: rows of w adjacent, bfloat16.
    scale = _scales(setting, groups, n).to(torch.bfloat16).t()
    if op.weight == "int4":
        return words, scale
    zero = torch.randint(-8, 8, (groups, n), device=setting.device).to(torch.bfloat16).t()
    if op.weight == "int4-zero":
        return words, scale, zero
    return words, _words(setting, *rows, k=k), scale, zero


def weight_rows(op: Op, weight: Tensors, first: int, last: int) -> Tensors:
    """Rows [first, last) of a weight; `first` is a multiple of a block's side."""
    if op.weight == "fp8-block":
        codes, scale = weight
        return codes[..., first:last, :], scale[..., first // BLOCK : -(-last // BLOCK), :]
    return tuple(tensor[..., first:last, :] for tensor in weight)


def quantize_block_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [M, K] e4m3fn, scales [M, ceil(K / 128)]: the plain form."""
    codes, scales = zip(*(reference.quantize_per_token_fp8(part) for part in x.split(BLOCK, 1)), strict=True)
    # PyTorch does not join tensors of 8-bit floats.
    joined = torch.cat([part.view(torch.uint8) for part in codes], 1).view(torch.float8_e4m3fn)
    return joined, torch.cat(scales, 1)


PLAIN_CASTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "int8": reference.quantize_per_token_int8,
    "fp8": reference.quantize_per_token_fp8,
    "fp8-block": quantize_block_fp8,
}


def fast_cast(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel that quantises activations."""
    module = importlib.import_module("lowprec_kernels.triton_cast")
    name = {"int8": "quantize_per_token_int8", "fp8": "quantize_per_token_fp8", "fp8-block": "quantize_per_block_fp8"}
    found: Callable[..., tuple[Tensor, Tensor]] = getattr(module, name[kind])
    return found


def cast_family() -> Family:
    """What the casts are tuned as."""
    family: Family = importlib.import_module("lowprec_kernels.triton_cast").FAMILY
    return family


def make_input(op: Op, case: Case, setting: Setting, dtype: torch.dtype | None = None) -> Tensors:
    """Random activations [m, k], quantised as the kernel wants them."""
    x = torch.randn(case.m, case.k, device=setting.device, dtype=dtype or setting.dtype)
    inputs: Tensors = (x,) if op.cast == "none" else PLAIN_CASTS[op.cast](x)
    return (*inputs, _offsets(case, setting)) if op.experts else inputs


def _offsets(case: Case, setting: Setting) -> Tensor:
    """[experts + 1] int32: where the experts' rows begin, for random routes of which some expert has none."""
    route = torch.randint(0, case.experts, (case.m,), device=setting.device).sort().values
    route = torch.where(route == case.experts // 2, max(case.experts // 2 - 1, 0), route)
    bounds = torch.arange(case.experts + 1, device=setting.device)
    return torch.searchsorted(route, bounds, out_int32=True)


def launch(
    op: Op, inputs: Tensors, weight: Tensors, bias: Tensor | None, dtype: torch.dtype, config: Config | None = None
) -> Tensor:
    """Runs the kernel: [m, n] in `dtype` (unquantised activations: in theirs)."""
    run = getattr(op.loaded(), op.launcher)
    out = () if op.cast == "none" else (dtype,)
    group = (op.group,) if op.group else ()
    result: Tensor
    if op.experts:
        *x, offsets = inputs
        result = run(*x, *weight, offsets, None, None, *group, *out, config=config)
    elif op.weight == "nested":
        words, residual, scale, ratio, zero = weight
        result = run(*inputs, words, residual, scale, ratio, zero, bias, op.group, op.level, config=config)
    elif op.weight == "int4-zero":
        words, scale, zero = weight
        result = run(*inputs, words, scale, bias, op.group, zero, config=config)
    else:
        result = run(*inputs, *weight, bias, *group, *out, config=config)
    return result


def truth(op: Op, inputs: Tensors, weight: Tensors, bias: Tensor | None) -> Tensor:
    """[m, n] float64 over the same operands."""
    if not op.experts:
        return _truth(op, inputs, weight, bias)
    *x, offsets = inputs
    bounds = offsets.tolist()
    parts = [
        _truth(op, tuple(t[first:last] for t in x), tuple(t[expert] for t in weight), bias)
        for expert, (first, last) in enumerate(itertools.pairwise(bounds))
    ]
    return torch.cat(parts)


def _truth(op: Op, inputs: Tensors, weight: Tensors, bias: Tensor | None) -> Tensor:
    float64 = torch.float64
    if op.weight == "fp8-block":
        return _block_truth(inputs, weight, bias)
    if op.weight == "nested":
        return _nested_truth(op, inputs[0], weight, bias)
    if op.weight == "int4-zero":
        words, scale, zero = weight
        return reference.w4a16_gemm(inputs[0].to(float64), words, scale, bias, op.group, zero)
    name = {("int8", "none"): "w8a16", ("int4", "none"): "w4a16"}.get((op.weight, op.cast))
    if name is not None:
        group = (op.group,) if op.group else ()
        return reference.REFERENCES[f"{name}_gemm"](inputs[0].to(float64), *weight, bias, *group)
    width = "w4a8" if op.group else "w8a8"
    group = (op.group,) if op.group else ()
    return reference.REFERENCES[f"{width}_{op.cast}_gemm"](*inputs, *weight, bias, *group, float64)


def _spread(scale: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Block scales [R, C] -> [rows, columns] float64, each repeated over `side` rows and a block's columns."""
    wide = scale.to(torch.float64).repeat_interleave(side, 0).repeat_interleave(BLOCK, 1)
    return wide[:rows, :columns]


def _nested_truth(op: Op, x: Tensor, weight: Tensors, bias: Tensor | None) -> Tensor:
    """Level 4 is the base, level 8 adds the residual in steps of a fraction of the base's."""
    words, residual, scale, ratio, zero = weight
    w = reference.grouped_weight(words, scale, op.group, zero)
    if op.level == 8:
        w = w + reference.grouped_weight(residual, scale / ratio, op.group)
    y = x.to(torch.float64) @ w.t()
    return y if bias is None else y + bias.to(torch.float64)


def _block_truth(inputs: Tensors, weight: Tensors, bias: Tensor | None) -> Tensor:
    (x, x_scale), (w, w_scale) = inputs, weight
    left = x.to(torch.float64) * _spread(x_scale, *x.shape, 1)
    right = w.to(torch.float64) * _spread(w_scale, *w.shape, BLOCK)
    y = left @ right.t()
    return y if bias is None else y + bias.to(torch.float64)
