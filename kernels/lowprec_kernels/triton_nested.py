"""Nested weights: one storage, two levels, chosen by an argument of the call (the layout and maths: `triton_w4.py`).

The base is an ordinary INT4 weight and gives level 4 bit for bit; level 8 reads the residual as well. A level is a
variant of the kernel, compiled once; pointers are the same, so changing it moves nothing.

Left out: quantised activations.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lowprec_kernels.packing import CHUNK
from lowprec_kernels.triton_w4 import family, launch, step_of, tuned_group, unsupported
from lowprec_kernels.tuning import Config, Family, Problem

LEVELS = (4, 8)


def _narrow(config: Config) -> bool:
    return config.block_n * config.block_m <= 1024 * config.warps


def _family(group_size: int, level: int) -> Family:
    base = family(f"nested{level}a16", group_size, bytes_w=level / 8)
    step = step_of(group_size)

    def candidates(problem: Problem) -> list[Config]:
        found = [c for c in base.candidates(problem) if c.form != "dequantize"]
        if level == 4:
            return found
        # Two planes of each kind, and the ratios, take twice the registers: trips of more than a chunk for few rows, of
        # several steps for more, and wide tiles with more rows would spill.
        short = [c for c in found if c.block_k <= step and (c.block_m <= 16 or _narrow(c))]
        return [replace(c, block_k=CHUNK) if c.block_m <= 16 else c for c in short]

    return Family(name=base.name, candidates=candidates, bytes_x=base.bytes_x, bytes_w=base.bytes_w)


_BY_GROUP = {(group, level): _family(group, level) for group in (32, 64, 128) for level in LEVELS}
FAMILIES = tuple(_BY_GROUP.values())


def nested_gemm(
    x: Tensor,
    w_base: Tensor,
    w_residual: Tensor,
    w_scale: Tensor,
    w_ratio: Tensor,
    w_zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    level: int,
    config: Config | None = None,
) -> Tensor:
    """x [M, K] bfloat16 or float16, base and residual [N, words] int32, three of [N, K/G], of which
    the last may be None, [N]? -> [M, N].

    Raises:
        ValueError: `level` is neither 4 nor 8, the group size or the dtype of x is none that the kernels take.
    """
    reason = unsupported(group_size)
    if level not in LEVELS:
        reason = f"level must be one of {LEVELS}, not {level}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        reason = f"x must be bfloat16 or float16, not {x.dtype}"
    if reason is not None:
        raise ValueError(f"nested_gemm: {reason}")
    residual = w_residual if level == 8 else None
    return launch(
        _BY_GROUP[tuned_group(group_size), level],
        x,
        None,
        None,
        w_base,
        w_scale,
        bias,
        group_size,
        w_zero,
        x.dtype,
        config,
        residual,
        w_ratio if level == 8 else None,
    )
