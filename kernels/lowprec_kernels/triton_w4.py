"""INT4 weights in groups, times bfloat16, float16, INT8 or FP8 activations.

    w4a16   y[m, n] = sum_g s[n, g] sum_{k in g} x[m, k] (c[n, k] - z[n, g]) + b[n]
    w4a8    y[m, n] = s[m] sum_g s[n, g] sum_{k in g} xc[m, k] c[n, k] + b[n]

Codes lie in two planes of nibbles (`packing.py`): a tile of words gives two operands (`triton_unpack.py`), each to be
multiplied with its own columns of x. Weights are the tall side of the matrix instruction and stay in registers, x is
read from shared memory, so 16 rows of x cost what one costs. For few rows K is split over blocks until memory is busy.
On Hopper's own instructions 16-bit operands have their columns permuted: a short x is read permuted, a long one is
permuted in memory first. Elsewhere columns stay in order.

The scale of a group goes on the float32 sum of that group, so that weights are exact operands and w4a8-int8 sums a
group exactly. Two forms for many rows give that up or go around it: "scaled" multiplies the weights by their scales,
rounded to x's dtype, and keeps one sum (no sums of groups in registers: twice the tile); "dequantize" writes the scaled
weights out once and leaves the product to the vendor's matmul.

int8 operands are 16 times the code. Where weights are not scaled, zero points are not in the operands: they add
sum_g s[n, g] z[n, g] X[m, g] with X the sums of x over each group (`group_sums`), a small product that is taken off
once, before the loop. So is the offset of e4m3 operands, which are code + 8 (z = -8 for all groups). An infinite x
times a zero point is NaN there.

Nested weights (`nested_gemm`) hold a second packed tensor of nibbles r in [-8, 7], for each group a ratio m, and two
levels over one storage:

    level 4   c = q - z, scale s            reads the base alone: half the bytes
    level 8   c = m (q - z) + r, scale s/m  reads all; c fits in 8 bits, which bfloat16 holds exactly

Left out: groups that are no power of two from 32 on, zero points with quantised activations.
Sources: Marlin (arXiv 2408.11743) for few rows; DeepSeek-V3 (arXiv 2412.19437, section 3.3) for sums of groups that
are promoted to float32; GPTQ kernels at large and Marlin for scaled weights.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec_kernels.packing import CHUNK, PLANE, words_for
from lowprec_kernels.triton_common import WARPGROUP, is_hopper, on_device, on_nvidia, split_buffers
from lowprec_kernels.triton_w4_kernels import PERMUTE_X, PERMUTED_X, PLAIN, dequantize_kernel, sums_kernel, w4_kernel
from lowprec_kernels.tuning import Config, Family, Problem, config_for


def group_sums(x: Tensor, group_size: int) -> Tensor:
    """x [M, K] or its codes -> [M, K / G] float32: sums over each group of columns."""
    m, k = x.shape
    sums = torch.empty(m, k // group_size, dtype=torch.float32, device=x.device)
    block_m = 16
    with on_device(x):
        sums_kernel[triton.cdiv(m, block_m), k // group_size](x, sums, m, k, x.stride(0), group_size, block_m)
    return sums


def dequantize(w_packed: Tensor, w_scale: Tensor, group_size: int, w_zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[N, words] int32, [N, K/G], [N, K/G] int8 or None -> [N, K] `dtype`: codes times scales, rounded once."""
    n, k = w_packed.shape[0], w_scale.shape[1] * group_size
    out = torch.empty(n, k, dtype=dtype, device=w_packed.device)
    w_packed, w_zero = w_packed.contiguous(), None if w_zero is None else zero_layout(w_zero, w_scale)
    block_n, chunks = 32, 4
    grid = triton.cdiv(n, block_n), triton.cdiv(triton.cdiv(k, CHUNK), chunks)
    with on_device(w_packed):
        dequantize_kernel[grid](
            w_packed, w_scale, w_zero, out, n, k, w_packed.stride(0), *w_scale.stride(),
            GROUP=group_size, BLOCK_N=block_n, CHUNKS=chunks, FAST=on_nvidia(w_packed),
        )  # fmt: skip
    return out


def in_fragment_order(x: Tensor) -> Tensor:
    """x [M, K] -> the same with its columns permuted within chunks of 64 as 16-bit operands are, K filled up to chunks.

    Column 8 l + 4 b + 2 h + i of a plane goes to place 16 b + 8 h + 2 l + i (`triton_unpack.fragment_columns`).
    """
    m, k = x.shape
    x = torch.nn.functional.pad(x, (0, -k % CHUNK)) if k % CHUNK else x
    return x.reshape(m, -1, PLANE // 8, 2, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(m, -1)


# Splits of K that are compiled for: each is a variant of its own.
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# From so many rows in a tile on, x is permuted in memory instead of while it is read.
LONG_M = 64
READ_PERMUTED = "read"
MOST_GROUPS = 4
LONGEST_OFFSET = 1 << 31
# From so many rows on, writing the weights out first is the best guess.
DEQUANTIZED_M = 1024


def _splits(n: int, k: int, block_n: int, block_k: int, blocks: int) -> int:
    """The split that comes nearest to `blocks` blocks, each left with at least two steps."""
    tiles = triton.cdiv(n, block_n)
    fitting = [s for s in SPLITS if s == 1 or 2 * s * block_k <= k]
    return min(fitting, key=lambda s: abs(tiles * s - blocks))


def step_of(group_size: int) -> int:
    """Columns of a step: one group, at most 128; two groups of 32."""
    return 128 if group_size % 128 == 0 else CHUNK


# For few rows: (block_n, warps, stages, blocks aimed at, steps of a trip). A trip of several steps reads more of a row
# in one piece and asks for its scales earlier. With fewer than four warps the matrix instructions are those of a warp,
# which take 16 x 8 of a tile at a time; Hopper's own take 64 rows of weights and, with few rows of x, wait for operands
# in registers.
_FEW_16_BIT = (
    (64, 2, 3, 528, 2), (64, 2, 3, 528, 4), (64, 2, 2, 792, 4), (64, 2, 3, 264, 4), (32, 1, 3, 1056, 4),
    (64, 2, 4, 528, 2), (64, 2, 3, 1056, 2), (64, 2, 5, 396, 2), (128, 2, 3, 396, 2), (32, 1, 4, 1056, 2),
    (128, 4, 3, 396, 2), (256, 8, 3, 132, 2), (256, 8, 4, 132, 2), (64, 2, 6, 528, 1), (64, 2, 4, 1056, 1),
    (128, 4, 5, 396, 1), (128, 4, 6, 264, 1), (256, 8, 5, 132, 1),
)  # fmt: skip
_FEW_8_BIT = (
    (128, 4, 3, 396, 2), (128, 4, 3, 132, 4), (128, 4, 3, 264, 4), (128, 4, 2, 396, 4), (128, 4, 2, 528, 4),
    (256, 8, 2, 132, 4), (128, 4, 4, 264, 2), (128, 4, 3, 528, 2), (256, 8, 3, 132, 2), (128, 4, 6, 264, 1),
)  # fmt: skip
# INT8 has matrix instructions of a warp; e4m3 would become fp16 with them on sm_90.
_FEW_INT8 = (
    (64, 2, 4, 528, 2), *_FEW_8_BIT, (64, 2, 3, 264, 4), (64, 2, 3, 528, 4), (64, 2, 2, 792, 4), (64, 2, 3, 1056, 2),
    (128, 2, 3, 396, 2),
)  # fmt: skip
# For more rows: (block_m, block_n, warps, stages, blocks aimed at, steps of a trip).
_MIDDLE = (
    (64, 128, 8, 3, 132, 2), (64, 128, 4, 3, 264, 1), (64, 128, 4, 3, 264, 2), (64, 64, 4, 3, 264, 2),
    (64, 256, 8, 3, 132, 1), (128, 128, 8, 3, 132, 1), (64, 128, 4, 4, 132, 1), (64, 64, 4, 5, 396, 1),
    (128, 64, 4, 3, 264, 1), (64, 128, 8, 4, 132, 1),
)  # fmt: skip


def _few_rows(
    problem: Problem, group_size: int, tiles: tuple[tuple[int, int, int, int, int], ...], *, float_x: bool
) -> list[Config]:
    """Up to 32 rows in one tile of rows, K split."""
    found, step = [], step_of(group_size)
    for block_n, warps, stages, blocks, steps in tiles:
        # Instructions of a warpgroup have 16 rows of x at least where they are used at all.
        rows = next(r for r in (8 if warps < WARPGROUP else 16, 16, 32) if problem.m <= r or r == 32)
        if rows == 32 and float_x and (warps == 1 or block_n > 32 * warps or steps > (1 if warps == 4 else 2)):
            # It spills.
            continue
        if group_size <= CHUNK and (block_n, warps) == (64, 2) and (rows == 16 or group_size == PLANE):
            # Triton 3.6 gives it few registers, and it spills some.
            continue
        # Scales of more than four groups of a row do not stay in one thread.
        steps = min(steps, MOST_GROUPS * group_size // step)
        split = _splits(problem.n, problem.k, block_n, steps * step, blocks)
        found.append(
            Config(
                block_m=rows, block_n=block_n, block_k=steps * step, warps=warps, stages=stages, split_k=split,
                group_m=1,
            )
        )  # fmt: skip
    return list(dict.fromkeys(found))


def _middle(problem: Problem, step: int, *, float_x: bool) -> list[Config]:
    """Up to a few hundred rows: exact sums of groups, K split where tiles alone do not fill a device."""
    found = []
    # Eight warps leave each lane registers enough for 16-bit operands on any device; for 8 bits four do.
    for block_m, block_n, warps, stages, blocks, steps in _MIDDLE if float_x else (_MIDDLE[1], *_MIDDLE):
        if float_x and steps > 1 and block_n > 16 * warps:
            # It spills.
            continue
        rows = triton.cdiv(problem.m, block_m)
        split = _splits(problem.n * rows, problem.k, block_n, steps * step, blocks)
        config = Config(
            block_m=block_m, block_n=block_n, block_k=steps * step, warps=warps, stages=stages, split_k=split
        )
        found.append(config)
        if float_x and (block_m, block_n, warps) == (LONG_M, 128, 8):
            found.append(replace(config, form=READ_PERMUTED))
    return list(dict.fromkeys(found))


def _many_rows(problem: Problem) -> list[Config]:
    """Scaled weights and one sum: the largest tiles."""
    found = []
    for block_m, block_n, warps, stages in (
        (128, 128, 8, 4), (256, 128, 8, 4), (128, 256, 8, 4), (64, 128, 4, 4), (64, 256, 8, 4), (64, 64, 4, 5),
    ):  # fmt: skip
        split = _splits(problem.n * triton.cdiv(problem.m, block_m), problem.k, block_n, CHUNK, 264)
        # The end of a split needs registers that the largest tiles do not leave.
        split = 1 if block_m * block_n > 128 * 128 else min(split, 4)
        found.append(
            Config(
                block_m=block_m,
                block_n=block_n,
                block_k=CHUNK,
                warps=warps,
                stages=stages,
                split_k=split,
                form="scaled",
            )
        )
    return found


_DEQUANTIZE = Config(block_m=128, block_n=128, block_k=CHUNK, form="dequantize")


def family(name: str, group_size: int, bytes_x: float = 2.0, bytes_w: float = 0.5, *, float_x: bool = True) -> Family:
    """A family of these kernels; `float_x` says that weights may be scaled or dequantised."""
    step = step_of(group_size)

    tiles = _FEW_16_BIT if float_x else _FEW_INT8 if "int8" in name else _FEW_8_BIT

    def candidates(problem: Problem) -> list[Config]:
        if problem.m <= 32:
            return _few_rows(problem, group_size, tiles, float_x=float_x)
        found = _middle(problem, step, float_x=float_x)
        if not float_x:
            return found
        many = _many_rows(problem)
        if problem.m <= 128:
            return [*found, *many[3:]]
        return [_DEQUANTIZE, *many, *found] if problem.m >= DEQUANTIZED_M else [*many, _DEQUANTIZE, *found]

    return Family(name=f"{name}-g{group_size}", candidates=candidates, bytes_x=bytes_x, bytes_w=bytes_w)


_KINDS = {torch.bfloat16: "w4a16", torch.float16: "w4a16", torch.int8: "w4a8-int8", torch.float8_e4m3fn: "w4a8-fp8"}
FAMILIES = tuple(
    family(name, group, 2.0 if name == "w4a16" else 1.0, float_x=name == "w4a16")
    for name in ("w4a16", "w4a8-int8", "w4a8-fp8")
    for group in (32, 64, 128)
)
_BY_NAME = {found.name: found for found in FAMILIES}


def unsupported(group_size: int) -> str | None:
    """None, or why these kernels cannot take groups of this size."""
    if group_size >= PLANE and group_size & (group_size - 1) == 0:
        return None
    return f"the Triton kernels take groups of a power of two of columns, {PLANE} at least, not {group_size}"


def tuned_group(group_size: int) -> int:
    """The group size that larger ones are tuned as."""
    return min(group_size, 2 * CHUNK)


def family_of(dtype: torch.dtype, group_size: int) -> Family:
    """The family that multiplies x of `dtype`; groups larger than 128 are tuned as 128.

    Raises:
        ValueError: no kernel takes that group size or dtype.
    """
    reason = unsupported(group_size)
    if dtype not in _KINDS:
        reason = f"x must be bfloat16 or float16, or codes in int8 or float8_e4m3fn, not {dtype}"
    if reason is not None:
        raise ValueError(reason)
    return _BY_NAME[f"{_KINDS[dtype]}-g{tuned_group(group_size)}"]


def scale_layout(w_scale: Tensor) -> Tensor:
    """[N, K/G] -> the same, as the kernels read it fastest: rows of w adjacent, in bfloat16 where that is exact."""
    short = w_scale.to(torch.bfloat16)
    return (short if torch.equal(short.to(w_scale.dtype), w_scale) else w_scale).t().contiguous().t()


def zero_layout(zero: Tensor, scale: Tensor) -> Tensor:
    """Zero points, or ratios, as the kernels read them: in strides and dtype of the scales."""
    if zero.stride() == scale.stride() and zero.dtype == scale.dtype:
        return zero
    return torch.empty_strided(scale.shape, scale.stride(), dtype=scale.dtype, device=zero.device).copy_(zero)


def _order(x: Tensor, config: Config) -> tl.constexpr:
    """How columns are ordered: permuted only for the 16-bit operands of Hopper's matrix instructions."""
    plain = x.dtype in (torch.int8, torch.float8_e4m3fn) or config.warps < WARPGROUP
    if plain or not is_hopper(x.device):
        return PLAIN
    return PERMUTED_X if config.block_m >= LONG_M and config.form != READ_PERMUTED else PERMUTE_X


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _chosen(family: Family, problem: Problem, x: Tensor) -> Config:
    """The tables' choice; for float16, in which scaled weights may be subnormal, among the forms with exact ones."""
    config = config_for(family, problem, x.device)
    if x.dtype != torch.float16 or config.form in ("", READ_PERMUTED):
        return config
    return next(c for c in family.fitting(problem) if c.form in ("", READ_PERMUTED))


def launch(
    family: Family,
    x: Tensor,
    x_scale: Tensor | None,
    x_sums: Tensor | None,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    w_zero: Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None,
    residual: Tensor | None = None,
    ratio: Tensor | None = None,
) -> Tensor:
    """Multiplies in a configuration of `family`, the tables' one where `config` is None."""
    (m, k), n = x.shape, w_packed.shape[0]
    if w_packed.shape[1] != words_for(k) or tuple(w_scale.shape) != (n, k // group_size) or k % group_size:
        given = f"words {tuple(w_packed.shape)}, scales {tuple(w_scale.shape)}"
        raise ValueError(f"x with K = {k} in groups of {group_size} does not fit {given}")
    out = torch.empty(m, n, dtype=out_dtype, device=x.device)
    if m == 0 or n == 0:
        return out
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    config = config or _chosen(family, Problem(m=m, n=n, k=k), x)
    w_packed = w_packed.contiguous()
    # Offsets along a row of scales are 32 bits wide.
    w_scale = w_scale if w_scale.stride(1) * w_scale.shape[1] < LONGEST_OFFSET else w_scale.contiguous()
    w_zero = None if w_zero is None else zero_layout(w_zero, w_scale)
    if config.form == "dequantize":
        dense = dequantize(w_packed, w_scale, group_size, w_zero, x.dtype)
        return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype)).to(out_dtype)
    if config.block_k % group_size and group_size % config.block_k:
        raise ValueError(f"steps of {config.block_k} columns do not fit groups of {group_size}")
    if w_zero is not None and x_sums is None and config.form != "scaled":
        x_sums = group_sums(_dense(x), group_size)
    order = _order(x, config)
    x = in_fragment_order(x) if order == PERMUTED_X else _dense(x)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    workspace, counters = split_buffers(x, tiles, config, torch.float32)
    w = w_packed.view(torch.uint8) if x.dtype in (torch.int8, torch.float8_e4m3fn) else w_packed
    with on_device(x):
        w4_kernel[tiles, config.split_k](
            x,
            w,
            None if residual is None else residual.contiguous(),
            None if ratio is None else zero_layout(ratio, w_scale),
            w_scale,
            w_zero,
            None if x_scale is None else x_scale.contiguous(),
            x_sums,
            None if bias is None else bias.contiguous(),
            out,
            workspace,
            counters,
            m,
            n,
            k,
            x.stride(0),
            w.stride(0),
            w_scale.stride(0),
            w_scale.stride(1),
            out.stride(0),
            *((0, 0) if x_sums is None else x_sums.stride()),
            GROUP=group_size,
            ORDER=order,
            FAST=on_nvidia(x),
            SCALED=config.form == "scaled",
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            STEP=min(config.block_k, step_of(group_size)),
            EVEN_K=k % config.block_k == 0,
            SPLIT_K=config.split_k,
            GROUP_M=config.group_m,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out


def w4a16_gemm(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    w_zero: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """x [M, K] bfloat16 or float16, [N, words] int32, [N, K/G], [N]?, [N, K/G]? -> [M, N] in x's dtype."""
    return launch(
        family_of(x.dtype, group_size), x, None, None, w_packed, w_scale, bias, group_size, w_zero, x.dtype, config
    )


def w4a8_int8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """[M, K] int8, [M, 1], [N, words] int32, [N, K/G], [N]? -> [M, N]."""
    return launch(
        family_of(x_codes.dtype, group_size),
        x_codes,
        x_scale,
        None,
        w_packed,
        w_scale,
        bias,
        group_size,
        None,
        out_dtype,
        config,
    )


def w4a8_fp8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
    x_sums: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """[M, K] e4m3, [M, 1], [N, words] int32, [N, K/G], [N]?; `x_sums` [M, K/G] as `group_sums` gives -> [M, N]."""
    x_codes = _dense(x_codes)
    if x_sums is None and len(x_codes):
        x_sums = group_sums(x_codes, group_size)
    return launch(
        family_of(x_codes.dtype, group_size),
        x_codes,
        x_scale,
        x_sums,
        w_packed,
        w_scale,
        bias,
        group_size,
        None,
        out_dtype,
        config,
    )
