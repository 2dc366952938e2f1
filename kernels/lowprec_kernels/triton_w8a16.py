"""Float activations times INT8 weights with a scale per row: y = s_n sum_k x_tk wc_nk + b.

x [M, K] bfloat16 or float16, w_codes [N, K] int8, w_scale [N, 1] float32, y [M, N] in x's dtype. A weight travels as
one byte and becomes a float of x's dtype in registers, which is exact; the scale meets the float32 sum.

| form | operands | for |
|---|---|---|
| (none) | y^T = W x^T: weights, the tall side, go from the registers they are converted in to the multiplier | any M |
| read | the same, and x is read in the order of K even where it has 64 rows or more in a tile (see below) | M <= 64 |
| straight | y = x W^T: converted weights go back to shared memory | M > 64 |
| convert | the weight is written out in x's dtype, scaled and rounded once, for the vendor's matmul | M >= 256 |

With few rows the time is that of reading the weights, so K is split until every multiprocessor has several blocks, and
many stages keep enough bytes under way. From 1024 rows on, writing a weight out costs less than a slower product does.

With four warps or more Triton takes Hopper's wgmma, of whose operand a lane holds columns 2 l, 2 l + 1, 2 l + 8 and
2 l + 9 of 16. A word holds four neighbours, so that its order would cost two byte permutations a weight. K may be
summed in any order: a lane takes the words that it loads, and x is read in the order this makes (`fragment_columns`)
or, where it is long, has its columns permuted in memory first: 3 to 4 instructions a weight instead of 6 to 7.
Instructions of a warp (fewer warps, other devices) and weights without whole words have Triton's own order.

The conversion is inline PTX on NVIDIA. To bfloat16, 2 instructions a weight: 0x4300 is 128.0, with a step of 1 in its
last bit, and 0x4380 is 256.0, so with the byte's low bits v and its sign bit s, (0x4300 | v) - (0x4300 | s << 7) is
v - 128 s. To float16, 1.25: 0x6400 | (byte ^ 0x80) is 1152 more than the code. Triton's own conversion is as good to
bfloat16 from sm_90 on; elsewhere it is I2F, of which a multiprocessor does about as many as the memory has weights.

Left out: float32 activations (a bfloat16 or tf32 product would not be float32's); scales on the result of "convert",
which would be exact, but a pass over y, and in float16 could overflow before it.
Source of the permuted columns: Marlin (arXiv 2408.11743, section 4), which permutes weights instead.
"""

import itertools
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec_kernels.triton_common import WARPGROUP, is_hopper, on_device, on_nvidia, split_buffers
from lowprec_kernels.triton_w8a16_kernels import BYTES, CHUNK, PERMUTED, READ_PERMUTED, convert_kernel, w8a16_kernel
from lowprec_kernels.tuning import Config, Family, Problem, config_for

STRAIGHT = "straight"
READ = "read"
CONVERT = "convert"
# From so many rows in a tile on, x is permuted in memory instead of while it is read, four bytes at a time.
LONG_M = 64
# Offsets within a tile are 32 bits wide, and a tile has at most 256 rows.
LONGEST_STRIDE = 1 << 22
MOST_SPLITS = 16
# Multiprocessors that the first guess fills (H100); another device's count only moves the guess.
MULTIPROCESSORS = 132
MULTIPROCESSOR_BYTES = 228 << 10
# What CUDA keeps of each block's shared memory.
RESERVED_BYTES = 1 << 10
# What "convert" writes in a program, in which every thread loads 8 bytes and stores 16.
CONVERTED_TILE = 1024
CONVERTING_WARPS = 4
# The tile is nobody's: the vendor's matmul has its own.
_CONVERT = Config(block_m=128, block_n=128, block_k=64, form=CONVERT)
# A guess: from here on a pass that writes the weight out takes less time than a slower product loses.
FIRST_CONVERTED = 1024


def _split(problem: Problem, config: Config, blocks: int) -> int:
    """Splits that fill `blocks` blocks at once without a second wave, with at least four steps of work each."""
    tiles = triton.cdiv(problem.m, config.block_m) * triton.cdiv(problem.n, config.block_n)
    return int(max(1, min(blocks // tiles, problem.k // (4 * config.block_k), MOST_SPLITS)))


def _few_rows(problem: Problem) -> tuple[Config, ...]:
    rows = max(8, triton.next_power_of_2(problem.m))
    # (block_n, block_k, warps, stages); from 64 rows on two warps would need more registers than there are.
    shapes = [(64, 128, 2, 4), (64, 256, 2, 3), (128, 128, 4, 4), (256, 128, 8, 4), (128, 128, 4, 5), (256, 64, 4, 4)]
    if rows <= 8:
        shapes.append((32, 256, 2, 4))
    forms = [""]
    if rows >= 64:
        shapes = [(256, 128, 8, 3), (128, 128, 4, 3), (128, 128, 8, 4), (64, 128, 4, 4)]
        forms = [READ, ""]
    found: list[Config] = []
    for (block_n, block_k, warps, stages), form in itertools.product(shapes, forms):
        # With fewer than 16 rows Triton uses the instructions of a warp.
        block_m = rows if warps < WARPGROUP else max(16, rows)
        whole = Config(block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=stages, form=form)
        # One stage is in registers: Triton holds stages - 1 tiles in shared memory.
        shared = FAMILY.shared_bytes(replace(whole, stages=stages - 1)) + RESERVED_BYTES
        resident = max(1, int(MULTIPROCESSOR_BYTES // shared))
        counts = dict.fromkeys((resident, (resident + 1) // 2))
        splits = dict.fromkeys(_split(problem, whole, count * MULTIPROCESSORS) for count in counts)
        found += [replace(whole, split_k=split) for split in splits]
    return tuple(found)


def _many_rows(problem: Problem) -> tuple[Config, ...]:
    # (block_m, block_n, block_k, warps, stages)
    shapes = [(128, 128, 64, 8, 4), (128, 128, 128, 8, 3)]
    shapes += [(64, 128, 128, 8, 3), (64, 256, 128, 8, 3), (128, 64, 64, 4, 4)] if problem.m <= 256 else []
    large = [(128, 256, 64, 8, 3), (256, 128, 64, 8, 3)] if problem.m > 256 else []
    found: list[Config] = []
    for block_m, block_n, block_k, warps, stages in [*shapes, *large]:
        for form in ("", STRAIGHT):
            whole = Config(block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=stages, form=form)
            # The end of a split tile of the large ones would spill registers.
            split = 1 if block_m * block_n > 64 * 32 * warps else _split(problem, whole, MULTIPROCESSORS)
            found.append(replace(whole, split_k=split))
    if problem.m < FIRST_CONVERTED:
        return (*found, _CONVERT) if problem.m >= 256 else tuple(found)
    return (_CONVERT, *found)


def _candidates(problem: Problem) -> tuple[Config, ...]:
    return _few_rows(problem) if problem.m <= 64 else _many_rows(problem)


FAMILY = Family(name="w8a16", candidates=_candidates, bytes_x=2, bytes_w=1)
FAMILIES = (FAMILY,)


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


def _dense(matrix: Tensor) -> Tensor:
    """`matrix` with adjacent columns, and rows that 32-bit offsets reach."""
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) < LONGEST_STRIDE else matrix.contiguous()


def _order(x: Tensor, w_codes: Tensor, config: Config) -> tl.constexpr:
    """The order that K is summed in."""
    aligned = (w_codes.shape[1], w_codes.stride(0), w_codes.storage_offset(), w_codes.data_ptr())
    words = all(number % 4 == 0 for number in aligned) and config.block_k % CHUNK.value == 0
    if (
        config.form == STRAIGHT
        or config.warps < WARPGROUP
        or config.block_m < 16
        or not words
        or not is_hopper(x.device)
    ):
        return BYTES
    return PERMUTED if config.block_m >= LONG_M and config.form != READ else READ_PERMUTED


def in_fragment_order(x: Tensor) -> Tensor:
    """x [M, K] -> the same with its columns permuted as in `fragment_columns`, K filled up to whole chunks."""
    m, k = x.shape
    x = torch.nn.functional.pad(x, (0, -k % CHUNK.value)) if k % CHUNK.value else x
    return x.reshape(m, -1, 4, 4, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(m, -1)


def converted_weight(w_codes: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K] int8 of adjacent columns, [N, 1] -> [N, K] `dtype`: codes times scales, rounded once."""
    n, k = w_codes.shape
    out = w_codes.new_empty((n, k), dtype=dtype)
    columns = min(CONVERTED_TILE, triton.next_power_of_2(k))
    rows = CONVERTED_TILE // columns
    with on_device(w_codes):
        convert_kernel[(triton.cdiv(n, rows) * triton.cdiv(k, columns),)](
            w_codes,
            w_scale.contiguous(),
            out,
            n,
            k,
            w_codes.stride(0),
            ROWS=rows,
            COLUMNS=columns,
            EVEN_K=k % columns == 0,
            ASM=on_nvidia(w_codes),
            num_warps=CONVERTING_WARPS,
        )
    return out


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
    w_codes = _dense(w_codes)
    if config.form == CONVERT:
        weight = converted_weight(w_codes, w_scale, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    order = _order(x, w_codes, config)
    x = in_fragment_order(x) if order == PERMUTED else _dense(x)
    w = w_codes if order == BYTES else w_codes.view(torch.int32)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    workspace, counters = split_buffers(x, tiles, config, torch.float32)
    with on_device(x):
        w8a16_kernel[(tiles, config.split_k)](
            x,
            w,
            w_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            workspace,
            counters,
            m,
            n,
            k,
            x.stride(0),
            w.stride(0),
            out.stride(0),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            SPLIT_K=config.split_k,
            GROUP_M=config.group_m,
            SWAPPED=config.form != STRAIGHT,
            ORDER=order,
            EVEN_K=k % config.block_k == 0,
            ASM=on_nvidia(x),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out
