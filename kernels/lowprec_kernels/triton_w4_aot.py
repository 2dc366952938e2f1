"""What the INT4 kernels promise without a GPU: each configuration that ships, compiled and counted.

That is, for sm_90, what the tuning tables hold, and for all targets the best guess of every family for few rows and for
many: what is launched where there is no table. The bar on instructions per weight holds for up to 16 rows, where
unpacking is what limits the kernel; with more rows the sums of groups are a growing part of the loop, and so they are
for INT4 times 8-bit activations with groups under 128.
"""

from collections.abc import Iterator

from lowprec_kernels.aot import AotCase
from lowprec_kernels.triton_common import WARPGROUP
from lowprec_kernels.triton_nested import FAMILIES as NESTED
from lowprec_kernels.triton_w4 import FAMILIES, LONG_M, READ_PERMUTED, step_of
from lowprec_kernels.triton_w4_kernels import PERMUTE_X, PERMUTED_X, PLAIN, w4_kernel
from lowprec_kernels.tuning import TABLES, Config, Family, Problem, load_table

PROBLEMS = tuple(Problem(m=m, n=8192, k=8192) for m in (8, 16, 32, 64, 512))
MATRIX = {
    "*bf16": {"sm_80": "HMMA.*BF16", "sm_89": "HMMA.*BF16", "sm_90": "HGMMA.*BF16", "sm_100": "UTCHMMA"},
    "*fp16": {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"},
    # Triton 3.6 multiplies int8 on sm_100 as on sm_80.
    "*i8": {"sm_80": "IMMA", "sm_89": "IMMA", "sm_90": "IGMMA", "sm_100": "UTCIMMA|IMMA"},
    # tf32 products take the offset of the operands off.
    "*fp8e4nv": {"sm_89": "QMMA|HMMA.*TF32", "sm_90": "QGMMA|HGMMA.*TF32", "sm_100": "UTCQMMA|UTCHMMA|HMMA"},
}
LIMITS = {"*bf16": 4.3, "*fp16": 4.3}
# Sums of a group are scaled in float32: that is 4 times as often with groups of 32.
LIMITS_8_BIT = {128: 1.5, 64: 2.3, 32: 3.5}
LIMITED_M = 16
LIMITED_TARGETS = ("sm_80", "sm_89", "sm_90")


def _type_of(family: Family) -> str:
    return {"w4a8-int8": "*i8", "w4a8-fp8": "*fp8e4nv"}.get(family.name.rpartition("-")[0], "*bf16")


def _case(family: Family, kind: str, config: Config, group: int, *, hopper: bool, zero: bool = False) -> AotCase:
    codes, nested = kind in ("*i8", "*fp8e4nv"), family.name.startswith("nested8")
    signature = {
        "x": kind, "w": "*u8" if codes else "*i32", "residual": "*i32", "ratio": "*bf16", "scale": "*bf16",
        "zero": "*bf16",
        "x_scale": "*fp32", "x_sums": "*fp32", "bias": "*fp32", "out": "*bf16" if codes else kind,
        "workspace": "*fp32", "counters": "*i32",
    }  # fmt: skip
    present = {
        "residual": nested, "ratio": nested, "zero": zero, "x_scale": codes, "x_sums": zero or kind == "*fp8e4nv",
        "bias": False,
        "workspace": config.split_k > 1, "counters": config.split_k > 1,
    }  # fmt: skip
    integers = ("m", "n", "k", "stride_x", "stride_w", "stride_g", "stride_o", "stride_xm", "stride_xg")
    absent = {name for name, there in present.items() if not there}
    typed = {name: t for name, t in signature.items() if name not in absent} | dict.fromkeys(integers, "i32")
    step = step_of(group)
    warpgroup = hopper and config.warps >= WARPGROUP and not codes
    permuted = PERMUTED_X if config.block_m >= LONG_M and config.form != READ_PERMUTED else PERMUTE_X
    # The finer level of nested weights, whose two planes fill the registers, was looked into for sm_90 alone.
    targets = ("sm_90",) if hopper else ("sm_100",) if nested else ("sm_80", "sm_89", "sm_100")
    matrix = MATRIX[kind]
    if config.warps < WARPGROUP:
        # With fewer than four warps later devices run the instructions of a warp, which they inherited.
        matrix = matrix | dict.fromkeys(("sm_90", "sm_100"), "HMMA|IMMA")
    most = LIMITS[kind] if kind in ("*bf16", "*fp16") else LIMITS_8_BIT[group]
    if zero:
        # Zero points are taken off by a small product in tf32.
        matrix = {target: f"{pattern}|.*TF32" for target, pattern in matrix.items()}
    limited = not nested and config.block_m <= LIMITED_M
    words = (
        "split" if config.split_k > 1 else "",
        config.form,
        "zero" if zero else "",
        "hopper" if hopper else "others",
    )
    return AotCase(
        name=f"{family.name} {kind[1:]} m{config.block_m} n{config.block_n} k{config.block_k} w{config.warps} "
        f"s{config.stages} {' '.join(word for word in words if word)}",
        kernel=w4_kernel,
        signature=typed,
        constants=dict.fromkeys(absent, None)
        | {
            # Rows of w adjacent, as `scale_layout` makes them.
            "stride_s": 1,
            "GROUP": group,
            "ORDER": permuted if warpgroup else PLAIN,
            "FAST": True,
            "SCALED": config.form == "scaled",
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "STEP": min(config.block_k, step),
            "EVEN_K": True,
            "SPLIT_K": min(config.split_k, 2),
            "GROUP_M": config.group_m,
        },
        divisible=(
            *(name for name in typed if typed[name][0] == "*"), "n", "k", "stride_x", "stride_w", "stride_g", "stride_o"
        ),
        warps=config.warps,
        stages=config.stages,
        expected=matrix,
        weights_per_trip=config.block_n * config.block_k,
        limits=dict.fromkeys(LIMITED_TARGETS if limited else (), most),
        targets=tuple(t for t in targets if t in MATRIX[kind]),
    )  # fmt: skip


def _tuned(family: Family) -> list[Config]:
    """What the tables that ship hold for a family."""
    found: list[Config] = []
    for path in sorted(TABLES.glob("*.json")):
        for (name, _), entries in load_table(path).items():
            found += [entry.config for entry in entries.values()] if name == family.name else []
    return found


def _cases() -> Iterator[AotCase]:
    for family in (*FAMILIES, *NESTED):
        group, kind = int(family.name.rpartition("-g")[2]), _type_of(family)
        guesses = [family.fitting(problem)[0] for problem in PROBLEMS]
        for hopper, configs in ((True, [*guesses, *_tuned(family)]), (False, guesses)):
            yield from (_case(family, kind, c, group, hopper=hopper) for c in configs if c.form != "dequantize")
        if family.name.startswith("w4a16"):
            yield from (_case(family, "*fp16", c, group, hopper=there) for c in guesses[:3] for there in (True, False))
        if kind == "*bf16":
            yield from (_case(family, kind, guesses[0], group, hopper=hopper, zero=True) for hopper in (True, False))


AOT = tuple({case.name: case for case in _cases()}.values())
