"""What the W8A8 kernels promise without a GPU: the configurations that may be launched, compiled for each target.

The cases are the distinct variants among the candidates of every family at decode, middle and prefill sizes: the right
matrix instruction, nothing spilled. Splits are compiled as the 2 or 8 that they are at these sizes.
"""

from collections.abc import Iterator
from typing import Any

from lowprec_kernels import triton_w8a8, triton_w8a8_block
from lowprec_kernels.aot import AotCase
from lowprec_kernels.triton_w8a8_forms import FP8, FP8_BLOCK, INT8, Families, W8A8Family
from lowprec_kernels.tuning import Config, Problem

PROBLEMS = tuple(Problem(m=m, n=4096, k=8192) for m in (16, 64, 128, 4096))
EXACT = {"sm_80": "IMMA", "sm_89": "IMMA", "sm_90": "IGMMA", "sm_100": "IMMA|UTCIMMA", "gfx942": "v_mfma_i32.*i8"}
# gfx942's own 8-bit float is another one: it multiplies fp16.
FLOAT = {"sm_89": "QMMA", "sm_90": "QGMMA", "sm_100": "UTCQMMA", "gfx942": "v_mfma_f32.*f16"}
# Shared memory of a block, in KB: what does not fit is not launched there.
SHARED_KB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
TARGETS_OF_FORM = {"tma": ("sm_90", "sm_100")}
SCALES = ("scale_m", "scale_n", "scale_x", "scale_w")
NOT_DIVISIBLE = ("m", "stride_scale_xm", "stride_scale_wn")


def _constants(config: Config, *, block: bool, exact: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    found |= {"stride_scale_xk": 1, "stride_scale_wk": 1} if block else {"STEP_M": 1, "STEP_N": 1, "EXACT": exact}
    if config.form == "tma":
        return found
    found |= {"SPLIT_K": config.split_k, "SWAPPED": config.form == "swap", "WHOLE_K": True}
    return found if config.split_k > 1 else found | {"workspace": None, "counters": None}


def _spills(config: Config, target: str) -> bool:
    """What is known to spill: two tiles by pointers on sm_100."""
    size = config.block_m * config.block_n
    return (
        target == "sm_100"
        and config.form == "pointer"
        and (size == 128 * 256 or (size, config.split_k) == (64 * 64, 2))
    )


def _case(family: W8A8Family, config: Config) -> AotCase:
    block, exact = not family.halves, family.name.startswith("w8a8-int8")
    module: Any = triton_w8a8_block if block else triton_w8a8
    kernel = module._tma_kernel if config.form == "tma" else module._pointer_kernel
    constants = _constants(config, block=block, exact=exact)
    codes = "i8" if exact else "fp8e4nv"
    types = dict.fromkeys(SCALES, "*fp32") | {"x": f"*{codes}", "w": f"*{codes}", "out": "*bf16", "bias": "*bf16"}
    types |= {"workspace": "*i32" if exact else "*fp32", "counters": "*i32"}
    if config.form == "tma":
        columns = config.block_n // 2 if family.halves else config.block_n
        types["x"] = f"tensordesc<{codes}[{config.block_m}, {config.block_k}]>"
        types["w"] = f"tensordesc<{codes}[{config.block_n}, {config.block_k}]>"
        types["out"] = f"tensordesc<bf16[{config.block_m}, {columns}]>"
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants and name.islower()}
    expected = EXACT if exact else FLOAT
    return AotCase(
        name=f"{family.name} {config.form} {config.block_m}x{config.block_n}x{config.block_k} w{config.warps} "
        f"s{config.stages} split{config.split_k}",
        kernel=kernel,
        signature=signature,
        constants=constants,
        divisible=tuple(n for n, t in signature.items() if t[0] != "t" and n not in NOT_DIVISIBLE),
        warps=config.warps,
        stages=config.stages,
        expected=expected,
        targets=tuple(
            target
            for target in TARGETS_OF_FORM.get(config.form, tuple(expected))
            if family.shared_bytes(config) <= SHARED_KB[target] << 10 and not _spills(config, target)
        ),
    )


def _cases(families: Families) -> Iterator[AotCase]:
    for problem in PROBLEMS:
        for config in families.tma.fitting(problem):
            if config.form == "tma":
                yield _case(families.tma, config)
        for config in families.pointer.fitting(problem):
            # Splits in between differ in how many parts are added, and in nothing else.
            if config.split_k in (1, 2, 8):
                yield _case(families.pointer, config)


AOT = tuple({case.name: case for families in (INT8, FP8, FP8_BLOCK) for case in _cases(families)}.values())
