"""Small kernels to be compiled in a process of its own: `python aot_kernels.py` prints what became of them as JSON."""

import json
from dataclasses import asdict
from typing import Any

import triton
import triton.language as tl

from lowprec_kernels.aot import TARGETS, Compiled, compile_for

GEMM = {"x": "*bf16", "w": "*bf16", "y": "*bf16", "n": "i32", "k": "i32"}
TILES = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}
DESCRIPTORS = GEMM | dict.fromkeys(("x", "w"), "tensordesc<bf16[128, 32]>") | {"y": "tensordesc<bf16[128, 128]>"}


@triton.jit
def gemm(x, w, y, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    summed = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        a = tl.load(x + rows[:, None] * k + (start + summed)[None, :])
        b = tl.load(w + columns[None, :] * k + (start + summed)[:, None])
        total = tl.dot(a, b, total)
    tl.store(y + rows[:, None] * n + columns[None, :], total.to(y.dtype.element_ty))


@triton.jit
def described(x, w, y, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * BLOCK_M
    column = tl.program_id(1) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        total = tl.dot(x.load([row, start]), w.load([column, start]).T, total)
    y.store([row, column], total.to(tl.bfloat16))


@triton.jit
def matvec(w, x, y, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    summed = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, k, BLOCK_K):
        weights = tl.load(w + columns[:, None] * k + (start + summed)[None, :])
        total += weights.to(tl.float32) * tl.load(x + start + summed).to(tl.float32)[None, :]
    tl.store(y + columns, tl.sum(total, 1))


@triton.jit
def copy(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + i, tl.load(x + i))


def compiled() -> dict[str, Compiled]:
    """Name of what is shown, and target -> result."""

    def run(kernel: Any, target: str, signature: dict[str, str], constants: dict[str, Any], **options: Any) -> Compiled:
        pointers = tuple(name for name, kind in signature.items() if kind.startswith("*"))
        integers = tuple(name for name, kind in signature.items() if kind == "i32")
        return compile_for(kernel, signature, constants, target, pointers + integers, **options)

    found = {f"gemm {target}": run(gemm, target, GEMM, TILES, num_warps=8) for target in TARGETS}
    found["descriptors sm_90"] = run(described, "sm_90", DESCRIPTORS, TILES, num_warps=8)
    found["spilling sm_80"] = run(gemm, "sm_80", GEMM, TILES, num_warps=4, maxnreg=96)
    vectors = {"w": "*i8", "x": "*bf16", "y": "*fp32", "k": "i32"}
    for target in ("sm_90", "gfx942"):
        found[f"matvec {target}"] = run(matvec, target, vectors, {"BLOCK_N": 8, "BLOCK_K": 512})
    found["copy sm_90"] = run(copy, "sm_90", {"x": "*fp32", "y": "*fp32"}, {"N": 1024})
    return found


if __name__ == "__main__":
    print(json.dumps({name: asdict(result) for name, result in compiled().items()}))
