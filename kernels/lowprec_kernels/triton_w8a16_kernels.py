"""The kernels of `triton_w8a16.py`, whose docstring says what they compute and why they are built so."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from lowprec_kernels.triton_common import finish_tile, tile_of

# Order of K: as in memory; of words, x read so; of words, x permuted so in memory.
BYTES = tl.constexpr(0)
READ_PERMUTED = tl.constexpr(1)
PERMUTED = tl.constexpr(2)
# Columns that are permuted among themselves: four words for each of the four lanes that share a row.
CHUNK = tl.constexpr(64)


def _asm(body: str, codes: str, results: str) -> tl.constexpr:
    """PTX: `body` makes two pairs of floats, low and high, of the four int8 in `codes`."""
    return tl.constexpr("{" + body.replace("CODES", codes) + results + "}")


# 0xBF80 is -1 in bfloat16: sm_80 has fma in pairs, but no subtraction.
_BFLOAT16 = """
    .reg .b32 low, high, low_sign, high_sign, minus;
    prmt.b32 low, CODES, 0, 0x4140;
    prmt.b32 high, CODES, 0, 0x4342;
    lop3.b32 low_sign, low, 0x00800080, 0x43004300, 0xEA;
    lop3.b32 high_sign, high, 0x00800080, 0x43004300, 0xEA;
    lop3.b32 low, low, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 high, high, 0x007F007F, 0x43004300, 0xEA;
    mov.b32 minus, 0xBF80BF80;
    fma.rn.bf16x2 low, low_sign, minus, low;
    fma.rn.bf16x2 high, high_sign, minus, high;
"""
_FLOAT16 = """
    .reg .b32 bytes, low, high, bias;
    xor.b32 bytes, CODES, 0x80808080;
    prmt.b32 low, bytes, 0x64, 0x4140;
    prmt.b32 high, bytes, 0x64, 0x4342;
    mov.b32 bias, 0x64806480;
    sub.rn.f16x2 low, low, bias;
    sub.rn.f16x2 high, high, bias;
"""
_PAIRS = "mov.b32 $0, low; mov.b32 $1, high;"
_SINGLES = "mov.b32 {$0, $1}, low; mov.b32 {$2, $3}, high;"
BYTES_TO_BFLOAT16 = _asm(_BFLOAT16, "$2", _PAIRS)
BYTES_TO_FLOAT16 = _asm(_FLOAT16, "$2", _PAIRS)
WORD_TO_BFLOAT16 = _asm(_BFLOAT16, "$4", _SINGLES)
WORD_TO_FLOAT16 = _asm(_FLOAT16, "$4", _SINGLES)


@triton.jit
def converted(codes, dtype: tl.constexpr, ASM: tl.constexpr):
    """int8 -> `dtype`, exact."""
    if ASM and dtype == tl.bfloat16:
        found = tl.inline_asm_elementwise(
            BYTES_TO_BFLOAT16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif ASM:
        found = tl.inline_asm_elementwise(BYTES_TO_FLOAT16, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        found = codes.to(dtype)
    return found


@triton.jit
def fragment_columns(COUNT: tl.constexpr):
    """[COUNT] int32: the column of what stands at each place of the permuted K."""
    at = tl.arange(0, COUNT)
    return at // CHUNK * CHUNK + at // 2 % 4 * 16 + at // 16 % 4 * 4 + at // 8 % 2 * 2 + at % 2


@triton.jit
def words_in_fragment_order(words, dtype: tl.constexpr, ASM: tl.constexpr):
    """Words [ROWS, WORDS] int32 of four codes -> [ROWS, 4 WORDS] `dtype`, exact, as in `fragment_columns`.

    Column 16 l + 4 b + 2 h + i of a chunk goes to place 16 b + 8 h + 2 l + i: lane l has the words 4 l .. 4 l + 3.
    """
    ROWS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    if ASM:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            WORD_TO_BFLOAT16 if dtype == tl.bfloat16 else WORD_TO_FLOAT16,
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
    else:
        c0, c1 = (words << 24 >> 24).to(dtype), (words << 16 >> 24).to(dtype)
        c2, c3 = (words << 8 >> 24).to(dtype), (words >> 24).to(dtype)
    found = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    found = tl.permute(tl.reshape(found, (ROWS, WORDS // 16, 4, 4, 2, 2)), (0, 1, 3, 4, 2, 5))
    return tl.reshape(found, (ROWS, 4 * WORDS)).to(dtype, bitcast=True)


@triton.jit
def convert_kernel(
    w, w_scale, out, n, k, stride_w, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr
):
    """out [n, k] contiguous = codes times scales, rounded once; program: a tile."""
    dtype: tl.constexpr = out.dtype.element_ty
    tiles_k = tl.cdiv(k, COLUMNS)
    rows = tl.program_id(0) // tiles_k * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % tiles_k * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] if EVEN_K else (rows < n)[:, None] & (columns < k)[None, :]
    rows_64 = rows.to(tl.int64)[:, None]
    codes = tl.load(w + rows_64 * stride_w + columns[None, :], mask=inside, other=0)
    factors = tl.load(w_scale + rows, mask=rows < n, other=0.0)
    values = converted(codes, dtype, ASM).to(tl.float32) * factors[:, None]
    tl.store(out + rows_64 * k + columns[None, :], values.to(dtype), mask=inside)


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
    ORDER: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """One tile of y, or a share of K of it: program (tile, split). w: bytes, or words if ORDER is not BYTES."""
    UNIT: tl.constexpr = 1 if ORDER == BYTES else 4
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tile_m, tile_n = tile_of(tile, tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    places = tl.arange(0, BLOCK_K)
    columns = fragment_columns(BLOCK_K) if ORDER == READ_PERMUTED else places
    # Columns permuted in memory end with a whole chunk.
    known = places // CHUNK * CHUNK if ORDER == PERMUTED else columns
    units = tl.arange(0, BLOCK_K // UNIT)
    share = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K) * BLOCK_K
    first = split * share

    # Rows of w beyond N are read as the tile's first and not stored; rows of x beyond M are not even read.
    inside_m = rows_m < m
    row_x = tl.arange(0, BLOCK_M) * stride_x
    row_w = tl.where(rows_n < n, tl.arange(0, BLOCK_N), 0) * stride_w
    at_x = row_x[None, :] + columns[:, None] if SWAPPED else row_x[:, None] + columns[None, :]
    at_w = row_w[:, None] + units[None, :] if SWAPPED else row_w[None, :] + units[:, None]
    x += (tile_m * BLOCK_M).to(tl.int64) * stride_x + first
    w += (tile_n * BLOCK_N).to(tl.int64) * stride_w + first // UNIT
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAPPED else [BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, tl.minimum(first + share, k), BLOCK_K):
        inside_k = known < k - start
        inside_w = units < (k - start) // UNIT
        if SWAPPED:
            mask_x = inside_m[None, :] if EVEN_K else inside_m[None, :] & inside_k[:, None]
            mask_w = None if EVEN_K else inside_w[None, :]
        else:
            mask_x = inside_m[:, None] if EVEN_K else inside_m[:, None] & inside_k[None, :]
            mask_w = None if EVEN_K else inside_w[:, None]
        values = tl.load(x + at_x, mask=mask_x, other=0.0)
        codes = tl.load(w + at_w, mask=mask_w, other=None if EVEN_K else 0)
        if ORDER == BYTES:
            weights = converted(codes, values.dtype, ASM)
        else:
            weights = words_in_fragment_order(codes, values.dtype, ASM)
        acc = tl.dot(weights, values, acc) if SWAPPED else tl.dot(values, weights, acc)
        x += BLOCK_K
        w += BLOCK_K // UNIT
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
