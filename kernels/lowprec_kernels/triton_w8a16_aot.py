"""What the W8A16 kernels promise without a GPU: each configuration that may be launched, compiled and counted.

The cases are the distinct variants among the candidates at decode, middle and prefill sizes, in bfloat16, the dtype
that costs more; on other devices than sm_90 weights are bytes in Triton's order. The bar on instructions per weight
holds for up to 64 rows in bfloat16, whose conversion alone is 2.
"""

from collections.abc import Iterator

from lowprec_kernels.aot import TARGETS, AotCase
from lowprec_kernels.triton_common import WARPGROUP
from lowprec_kernels.triton_w8a16 import (
    CONVERT,
    CONVERTED_TILE,
    CONVERTING_WARPS,
    FAMILY,
    LONG_M,
    READ,
    STRAIGHT,
)
from lowprec_kernels.triton_w8a16_kernels import BYTES, PERMUTED, READ_PERMUTED, convert_kernel, w8a16_kernel
from lowprec_kernels.tuning import Config, Problem

PROBLEMS = tuple(Problem(m=m, n=8192, k=8192) for m in (8, 16, 32, 64, 128, 512, 4096))
HOPPER = "sm_90"
AMD = "gfx942"
OTHERS = tuple(target for target in TARGETS if target not in (HOPPER, AMD))
MATRIX = {"sm_80": "HMMA.*BF16", "sm_89": "HMMA.*BF16", "sm_100": "UTCHMMA|HMMA.*BF16", "gfx942": "v_mfma_f32.*bf16"}
# Shared memory of a block, in KB: what does not fit is not launched there.
SHARED_KB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
# Rows of a tile -> instructions per weight on sm_90, at most.
LIMITS = {8: 3.2, 16: 3.5, 32: 4.5, 64: 4.6}
TYPES = {"x": "*bf16", "w_scale": "*fp32", "bias": "*bf16", "out": "*bf16", "workspace": "*fp32", "counters": "*i32"}


def _order(config: Config, target: str) -> int:
    if target != HOPPER or config.form == STRAIGHT or config.warps < WARPGROUP:
        return int(BYTES.value)
    return int((PERMUTED if config.block_m >= LONG_M and config.form != READ else READ_PERMUTED).value)


def _spills(config: Config, target: str) -> bool:
    """What is known to spill with Triton 3.6 or 3.9, elsewhere than on sm_90."""
    if target == "sm_100":
        straight = config.form == STRAIGHT and (config.block_n == 256 or config.block_m == 64)
        return straight or (config.block_m, config.block_k) in ((32, 256), (128, 128))
    if target == AMD:
        return config.block_n == 32
    return target in ("sm_80", "sm_89") and config.block_m == 256


def _case(config: Config, targets: tuple[str, ...]) -> AotCase:
    order = _order(config, targets[0])
    absent = () if config.split_k > 1 else ("workspace", "counters")
    types = TYPES | {"w": "*i8" if order == BYTES.value else "*i32"}
    integers = ("m", "n", "k", "stride_x", "stride_w", "stride_out")
    signature = {name: t for name, t in types.items() if name not in absent} | dict.fromkeys(integers, "i32")
    device = {HOPPER: "hopper", AMD: "amd"}.get(targets[0], "others")
    wgmma = "HGMMA.*BF16" if config.warps >= WARPGROUP else "HMMA.*BF16"
    return AotCase(
        name=f"w8a16 m{config.block_m} n{config.block_n} k{config.block_k} w{config.warps} s{config.stages} "
        f"{'split' if config.split_k > 1 else ''}{config.form} {device}",
        kernel=w8a16_kernel,
        signature=signature,
        constants=dict.fromkeys(absent, None)
        | {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "SPLIT_K": min(config.split_k, 2),
            "GROUP_M": config.group_m,
            "SWAPPED": config.form != STRAIGHT,
            "ORDER": order,
            "EVEN_K": True,
            "ASM": targets[0] != AMD,
        },
        divisible=tuple(name for name in signature if name != "m"),
        warps=config.warps,
        stages=config.stages,
        expected=MATRIX | {HOPPER: wgmma},
        weights_per_trip=config.block_n * config.block_k,
        limits={HOPPER: LIMITS[config.block_m]} if config.block_m in LIMITS and config.form == "" else {},
        targets=tuple(
            target
            for target in targets
            if FAMILY.shared_bytes(config) <= SHARED_KB[target] << 10 and not _spills(config, target)
        ),
    )


def _converting() -> AotCase:
    return AotCase(
        name="w8a16 convert",
        kernel=convert_kernel,
        signature={"w": "*i8", "w_scale": "*fp32", "out": "*bf16", "n": "i32", "k": "i32", "stride_w": "i32"},
        constants={"ROWS": 1, "COLUMNS": CONVERTED_TILE, "EVEN_K": True, "ASM": True},
        divisible=("w", "w_scale", "out", "n", "k", "stride_w"),
        warps=CONVERTING_WARPS,
        targets=(HOPPER, *OTHERS),
    )


def _cases() -> Iterator[AotCase]:
    yield _converting()
    for problem in PROBLEMS:
        for config in FAMILY.fitting(problem):
            if config.form != CONVERT:
                yield from (_case(config, targets) for targets in ((HOPPER,), OTHERS, (AMD,)))


AOT = tuple({case.name: case for case in _cases()}.values())
