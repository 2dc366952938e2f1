"""Words and bytes of nibbles (`packing.py`) -> tiles of matmul operands, in as few instructions as there are.

Each function gives the low and the high plane of a tile. FAST chooses inline PTX; the other branch is its twin in plain
Triton, which runs on other makers' GPUs and in the interpreter and gives the same values. Per eight weights:

    bf16   two PRMT spread the bytes to 16-bit lanes, LOP3 puts the nibble under the exponent of 128 (0x43), so the
           lane is 128 + nibble exactly; a packed FMA by one (sm_80 has no packed add) takes 136 off: 12 instructions
    fp16   the same under 1024 (0x64), where a lane's upper nibble also fits: (1024 + 16 n) / 16 - 72 = n - 8 is one
           FMA, so that nothing is shifted: 10
    int8   nibble to the upper half of its byte and its top bit flipped: the byte is 16 times the code. The factor 16
           goes into the scale: 3
    e4m3   bytes 0 .. 15 are the numbers n 2^-9 (subnormals and the first binade), so a nibble is an operand as it
           stands; 2^9 goes into the scale, and 8 times the sum of x has to come off the result: 3

8-bit operands keep their columns in order. For 16-bit ones a lane of Hopper's matrix instruction holds pairs of columns
that are eight apart, which no word does; there the columns are permuted (`fragment_columns`) and x is read likewise,
instead of shuffling. Elsewhere (PERMUTED is false) Triton gives a lane the columns of a word.

Sources: Kim et al., "Who Says Elephants Can't Run" (arXiv 2211.10017, section 3: magic-number conversion), Marlin
(arXiv 2408.11743, section 4).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

# What undoes the factor that operands carry.
FACTOR_INT8 = tl.constexpr(1.0 / 16.0)
FACTOR_FP8 = tl.constexpr(512.0)

_BF16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, m, one;
    prmt.b32 a, $8, 0, 0x4140;
    prmt.b32 b, $8, 0, 0x4342;
    shr.u32 c, a, 4;
    shr.u32 d, b, 4;
    lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
    mov.b32 m, 0xC308C308;
    mov.b32 one, 0x3F803F80;
    fma.rn.bf16x2 a, a, one, m;
    fma.rn.bf16x2 b, b, one, m;
    fma.rn.bf16x2 c, c, one, m;
    fma.rn.bf16x2 d, d, one, m;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
    mov.b32 {$4, $5}, c;
    mov.b32 {$6, $7}, d;
}""")
_FP16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, m, f, g;
    prmt.b32 a, $8, 0, 0x4140;
    prmt.b32 b, $8, 0, 0x4342;
    lop3.b32 c, a, 0x00F000F0, 0x64006400, 0xEA;
    lop3.b32 d, b, 0x00F000F0, 0x64006400, 0xEA;
    lop3.b32 a, a, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 b, b, 0x000F000F, 0x64006400, 0xEA;
    mov.b32 m, 0xE408E408;
    mov.b32 f, 0x2C002C00;
    mov.b32 g, 0xD480D480;
    add.rn.f16x2 a, a, m;
    add.rn.f16x2 b, b, m;
    fma.rn.f16x2 c, c, f, g;
    fma.rn.f16x2 d, d, f, g;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
    mov.b32 {$4, $5}, c;
    mov.b32 {$6, $7}, d;
}""")
_INT8 = tl.constexpr("""{
    .reg .b32 a;
    shl.b32 a, $2, 4;
    lop3.b32 $0, a, 0xF0F0F0F0, 0x80808080, 0x6A;
    lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
}""")
_FP8 = tl.constexpr("""{
    .reg .b32 a;
    shr.u32 a, $2, 4;
    and.b32 $0, $2, 0x0F0F0F0F;
    and.b32 $1, a, 0x0F0F0F0F;
}""")


@triton.jit
def _plane(c0, c1, c2, c3, PERMUTED: tl.constexpr):
    """Four columns of each word, [ROWS, 8 CHUNKS] each -> a plane [ROWS, 32 CHUNKS], in order or as in a fragment.

    Of 16 columns a lane of the matrix instruction holds 2 l, 2 l + 1, 2 l + 8 and 2 l + 9. Here it gets the columns of
    a word instead, and of eight words two neighbours: column 8 l + 4 b + 2 h + i goes to place 16 b + 8 h + 2 l + i.
    """
    ROWS: tl.constexpr = c0.shape[0]
    CHUNKS: tl.constexpr = c0.shape[1] // 8
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    if PERMUTED:
        words = tl.permute(tl.reshape(words, (ROWS, CHUNKS, 4, 2, 2, 2)), (0, 1, 3, 4, 2, 5))
    return tl.reshape(words, (ROWS, CHUNKS * 32))


@triton.jit
def fragment_columns(COUNT: tl.constexpr):
    """[COUNT] int32: the column, within chunks of 64, of what stands at each place of the low plane."""
    at = tl.arange(0, COUNT)
    return at // 32 * 64 + at // 2 % 4 * 8 + at // 16 % 2 * 4 + at // 8 % 2 * 2 + at % 2


@triton.jit
def nibbles_as_float(words, DTYPE: tl.constexpr, FAST: tl.constexpr, PERMUTED: tl.constexpr = True):
    """Words [ROWS, 8 CHUNKS] int32 -> codes in [-8, 7] as bfloat16 or float16, permuted as in `fragment_columns`."""
    if FAST and DTYPE == tl.bfloat16:
        c0, c1, c2, c3, d0, d1, d2, d3 = tl.inline_asm_elementwise(
            _BF16,
            "=h,=h,=h,=h,=h,=h,=h,=h,r",
            [words],
            dtype=(
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
            ),
            is_pure=True,
            pack=1,
        )
    elif FAST:
        c0, c1, c2, c3, d0, d1, d2, d3 = tl.inline_asm_elementwise(
            _FP16,
            "=h,=h,=h,=h,=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        c0, d0 = ((words & 0xF) - 8).to(DTYPE), ((words >> 4 & 0xF) - 8).to(DTYPE)
        c1, d1 = ((words >> 8 & 0xF) - 8).to(DTYPE), ((words >> 12 & 0xF) - 8).to(DTYPE)
        c2, d2 = ((words >> 16 & 0xF) - 8).to(DTYPE), ((words >> 20 & 0xF) - 8).to(DTYPE)
        c3, d3 = ((words >> 24 & 0xF) - 8).to(DTYPE), ((words >> 28 & 0xF) - 8).to(DTYPE)
    return _plane(c0, c1, c2, c3, PERMUTED), _plane(d0, d1, d2, d3, PERMUTED)


@triton.jit
def nibbles_as_int8(p, FAST: tl.constexpr):
    """Bytes [.., J] uint8 -> 16 times the codes, int8, [.., J] each."""
    if FAST:
        lo, hi = tl.inline_asm_elementwise(_INT8, "=r,=r,r", [p], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        lo = (((p << 4) & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
        hi = ((p & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
    return lo, hi


@triton.jit
def nibbles_as_fp8(p, FAST: tl.constexpr):
    """Bytes [.., J] uint8 -> nibbles (code + 8) times 2^-9, e4m3, [.., J] each."""
    if FAST:
        lo, hi = tl.inline_asm_elementwise(_FP8, "=r,=r,r", [p], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4)
    else:
        lo, hi = p & 0xF, p >> 4
    return lo.to(tl.float8e4nv, bitcast=True), hi.to(tl.float8e4nv, bitcast=True)
