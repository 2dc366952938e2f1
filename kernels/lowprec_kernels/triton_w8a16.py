"""Float activations times INT8 weights with a scale per row: y = s_n sum_k x_tk wc_nk + b.

x [M, K] bfloat16 or float16, w_codes [N, K] int8, w_scale [N, 1] float32, y [M, N] in x's dtype. A weight travels as
one byte and becomes a float of x's dtype in registers, which is exact; the scale meets the float32 sum.

With few rows the time is that of reading the weights, so the operands are swapped (y^T = W x^T: the weights take the
tall side of a matrix instruction, from the registers they were converted in), K is split until every multiprocessor has
several blocks, and many stages keep enough bytes under way. Blocks have two warps there: with four, Triton takes wgmma,
whose order of operands in registers costs two byte permutations more a weight (6.3 instructions instead of 2.8). The
swapped form serves many rows, too, as it never writes converted weights back to shared memory; `form` "straight"
(y = x W^T) is its alternative.

The conversion is inline PTX on NVIDIA. To bfloat16, 2 instructions a weight: 0x4300 is 128.0, with a step of 1 in its
last bit, and 0x4380 is 256.0, so with the byte's low bits v and its sign bit s, (0x4300 | v) - (0x4300 | s << 7) is
v - 128 s. To float16, 1.25: 0x6400 | (byte ^ 0x80) is 1152 more than the code. Triton's own conversion is as good to
bfloat16 from sm_90 on; elsewhere it is I2F, of which a multiprocessor does about as many as the memory has weights.

Left out: float32 activations (a bfloat16 or tf32 product would not be float32's), converting the whole weight once for
very many rows.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec_kernels.triton_common import finish_tile, on_device, on_nvidia, split_buffers, tile_of
from lowprec_kernels.tuning import Config, Family, Problem, config_for

STRAIGHT = "straight"
MOST_SPLITS = 16
# Multiprocessors that the first guess fills (H100); another device's count only moves the guess.
MULTIPROCESSORS = 132
MULTIPROCESSOR_BYTES = 228 << 10
# What CUDA keeps of each block's shared memory.
RESERVED_BYTES = 1 << 10
# Four int8 in $2 -> two pairs of floats. 0xBF80 is -1 in bfloat16: sm_80 has fma in pairs, but no subtraction.
TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 low, high, low_sign, high_sign, minus;
    prmt.b32 low, $2, 0, 0x4140;
    prmt.b32 high, $2, 0, 0x4342;
    lop3.b32 low_sign, low, 0x00800080, 0x43004300, 0xEA;
    lop3.b32 high_sign, high, 0x00800080, 0x43004300, 0xEA;
    lop3.b32 low, low, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 high, high, 0x007F007F, 0x43004300, 0xEA;
    mov.b32 minus, 0xBF80BF80;
    fma.rn.bf16x2 $0, low_sign, minus, low;
    fma.rn.bf16x2 $1, high_sign, minus, high;
}""")
TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 bytes, low, high, bias;
    xor.b32 bytes, $2, 0x80808080;
    prmt.b32 low, bytes, 0x64, 0x4140;
    prmt.b32 high, bytes, 0x64, 0x4342;
    mov.b32 bias, 0x64806480;
    sub.rn.f16x2 $0, low, bias;
    sub.rn.f16x2 $1, high, bias;
}""")


@triton.jit
def converted(codes, dtype: tl.constexpr, ASM: tl.constexpr):
    """int8 -> `dtype`, exact."""
    if ASM and dtype == tl.bfloat16:
        found = tl.inline_asm_elementwise(TO_BFLOAT16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif ASM:
        found = tl.inline_asm_elementwise(TO_FLOAT16, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        found = codes.to(dtype)
    return found


@triton.jit
def w8a16_kernel(
    x,
    w,
    w_scale,
    bias,
    out,
    workspace,
    counters,
    m,
    n,
    k,
    stride_x,
    stride_w,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAPPED: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """One tile of y, or a share of K of it: program (tile, split)."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tile_m, tile_n = tile_of(tile, tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    share = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K) * BLOCK_K
    first = split * share

    # Rows of w beyond N are read as row 0 and not stored; rows of x beyond M are not even read.
    at_x = x + rows_m.to(tl.int64) * stride_x + first
    at_w = w + tl.where(rows_n < n, rows_n, 0).to(tl.int64) * stride_w + first
    inside_m = rows_m < m
    if SWAPPED:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        pointers_x = at_x[None, :] + columns[:, None]
        pointers_w = at_w[:, None] + columns[None, :]
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        pointers_x = at_x[:, None] + columns[None, :]
        pointers_w = at_w[None, :] + columns[:, None]
    for start in range(first, tl.minimum(first + share, k), BLOCK_K):
        inside_k = start + columns < k
        if SWAPPED:
            mask_x = inside_m[None, :] if EVEN_K else inside_m[None, :] & inside_k[:, None]
            mask_w = None if EVEN_K else inside_k[None, :]
        else:
            mask_x = inside_m[:, None] if EVEN_K else inside_m[:, None] & inside_k[None, :]
            mask_w = None if EVEN_K else inside_k[:, None]
        values = tl.load(pointers_x, mask=mask_x, other=0.0)
        codes = tl.load(pointers_w, mask=mask_w, other=None if EVEN_K else 0)
        weights = converted(codes, values.dtype, ASM)
        acc = tl.dot(weights, values, acc) if SWAPPED else tl.dot(values, weights, acc)
        pointers_x += BLOCK_K
        pointers_w += BLOCK_K
    finish_tile(
        acc,
        out,
        None,
        w_scale,
        bias,
        workspace,
        counters,
        rows_m,
        rows_n,
        m,
        n,
        stride_out,
        1,
        tile,
        split,
        BLOCK_M,
        BLOCK_N,
        SWAPPED,
        SPLIT_K,
    )


def _split(problem: Problem, config: Config, blocks: int) -> int:
    """Splits that fill `blocks` blocks at once without a second wave, with at least four steps of work each."""
    tiles = triton.cdiv(problem.m, config.block_m) * triton.cdiv(problem.n, config.block_n)
    return int(max(1, min(blocks // tiles, problem.k // (4 * config.block_k), MOST_SPLITS)))


def _few_rows(problem: Problem) -> tuple[Config, ...]:
    block_m = max(8, triton.next_power_of_2(problem.m))
    # (block_n, block_k, warps, stages); from 64 rows on two warps would need more registers than there are.
    shapes = [(64, 128, 2, 4), (64, 256, 2, 3), (64, 128, 4, 4), (128, 128, 4, 4), (128, 128, 8, 3)]
    if block_m <= 16:
        shapes.append((32, 256, 2, 4))
    if block_m >= 64:
        shapes = [(64, 128, 4, 4), (128, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 4)]
    found: list[Config] = []
    for block_n, block_k, warps, stages in shapes:
        whole = Config(block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=stages)
        # One stage is in registers: Triton holds stages - 1 tiles in shared memory.
        shared = FAMILY.shared_bytes(replace(whole, stages=stages - 1)) + RESERVED_BYTES
        resident = max(1, int(MULTIPROCESSOR_BYTES // shared))
        counts = dict.fromkeys((resident, (resident + 1) // 2))
        splits = dict.fromkeys(_split(problem, whole, count * MULTIPROCESSORS) for count in counts)
        found += [replace(whole, split_k=split) for split in splits]
    return tuple(found)


def _many_rows(problem: Problem) -> tuple[Config, ...]:
    # (block_m, block_n, block_k, warps, stages)
    shapes = [(128, 128, 64, 8, 4), (128, 128, 128, 8, 3), (128, 128, 64, 4, 4)]
    shapes += [(64, 128, 128, 8, 3), (128, 64, 128, 4, 3)] if problem.m <= 256 else []
    large = [(128, 256, 64, 8, 3), (256, 128, 64, 8, 3)] if problem.m > 256 else []
    found: list[Config] = []
    for block_m, block_n, block_k, warps, stages in [*shapes, *large]:
        for form in ("", STRAIGHT):
            whole = Config(block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=stages, form=form)
            # The end of a split tile of the large ones would spill registers.
            split = 1 if block_m * block_n > 128 * 128 else _split(problem, whole, MULTIPROCESSORS)
            found.append(replace(whole, split_k=split))
    return tuple(found)


def _candidates(problem: Problem) -> tuple[Config, ...]:
    return _few_rows(problem) if problem.m <= 64 else _many_rows(problem)


FAMILY = Family(name="w8a16", candidates=_candidates, bytes_x=2, bytes_w=1)


def _check(x: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"w8a16_gemm takes a bfloat16 or float16 matrix [M, K], not {x.dtype} {tuple(x.shape)}; "
            "convert x, or use the reference kernel"
        )
    if w_codes.dtype != torch.int8 or w_codes.ndim != 2 or w_codes.shape[1] != x.shape[1]:
        raise ValueError(f"w_codes must be [N, {x.shape[1]}] int8, not {w_codes.dtype} {tuple(w_codes.shape)}")
    n = w_codes.shape[0]
    if tuple(w_scale.shape) != (n, 1) or w_scale.dtype != torch.float32:
        raise ValueError(f"w_scale must be [{n}, 1] float32, not {w_scale.dtype} {tuple(w_scale.shape)}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must be [{n}], not {tuple(bias.shape)}")


def w8a16_gemm(
    x: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, config: Config | None = None
) -> Tensor:
    """x [M, K], w_codes [N, K] int8, w_scale [N, 1], bias [N] or None -> [M, N] in x's dtype.

    Rows of x and w may be strided; where columns are, the operand is made contiguous first.

    Raises:
        ValueError: a shape or dtype that there is no kernel for; float32 x above all.
    """
    _check(x, w_codes, w_scale, bias)
    (m, k), n = x.shape, w_codes.shape[0]
    out = x.new_empty((m, n))
    if m == 0 or n == 0:
        return out
    config = config or config_for(FAMILY, Problem(m=m, n=n, k=k), x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    w_codes = w_codes if w_codes.stride(1) == 1 else w_codes.contiguous()
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    workspace, counters = split_buffers(x, tiles, config, torch.float32)
    with on_device(x):
        w8a16_kernel[(tiles, config.split_k)](
            x,
            w_codes,
            w_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            workspace,
            counters,
            m,
            n,
            k,
            x.stride(0),
            w_codes.stride(0),
            out.stride(0),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            SPLIT_K=config.split_k,
            GROUP_M=config.group_m,
            SWAPPED=config.form != STRAIGHT,
            EVEN_K=k % config.block_k == 0,
            ASM=on_nvidia(x),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out
