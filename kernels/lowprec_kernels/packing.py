"""Bit layout of INT4 weights: chunks of 64 columns, each in two planes of nibbles, offset binary (code + 8).

A row of K codes is cut into chunks of 64, the last one filled up with code 0. A chunk is 32 bytes, that is 8 words of
32 bits; byte j of the chunk holds column j in its low nibble and column 32 + j in its high one. Word i of the chunk:

    bit  31      28 27      24 23      20 19      16 15      12 11       8 7        4 3        0
        +----------+----------+----------+----------+----------+----------+----------+----------+
        | c[35+4i] | c[ 3+4i] | c[34+4i] | c[ 2+4i] | c[33+4i] | c[ 1+4i] | c[32+4i] | c[  4i ] |
        +----------+----------+----------+----------+----------+----------+----------+----------+

Why two planes: a matmul kernel masks a tile of bytes once for the low plane and once for the high one, and each is a
tile of 32 consecutive columns per chunk, so nothing is ever interleaved in registers; a group of 32 columns is one
plane of a chunk. `pack_int4` and `unpack_int4` are exact inverses. Files have a layout of their own (compressed-tensors
packs eight consecutive columns to a word): weights are laid out anew when they are loaded.
"""

import math

import torch
from torch import Tensor

CHUNK = 64
PLANE = CHUNK // 2
CODES_PER_WORD = 8
WORDS_PER_CHUNK = CHUNK // CODES_PER_WORD
INT4_OFFSET = 8


def words_for(k: int) -> int:
    """Words that a row of K codes takes."""
    return -(-k // CHUNK) * WORDS_PER_CHUNK


def pack_int4(codes: Tensor) -> Tensor:
    """Codes [..., K] int8 in [-8, 7] -> words [..., words_for(K)] int32.

    Raises:
        ValueError: the dtype is not int8, or a code is out of range.
    """
    if codes.dtype != torch.int8 or codes.ndim < 1:
        raise ValueError(f"pack_int4 needs int8 codes [..., K], not {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"pack_int4 needs codes in [-8, 7], these lie in [{int(codes.min())}, {int(codes.max())}]")
    k = codes.shape[-1]
    filled = torch.nn.functional.pad(codes, (0, words_for(k) * CODES_PER_WORD - k))
    nibbles = (
        (filled + INT4_OFFSET).view(torch.uint8).reshape(*codes.shape[:-1], words_for(k) // WORDS_PER_CHUNK, 2, PLANE)
    )
    # Bytes are put together as bytes, so that the order within a word is the machine's own (little-endian).
    packed: Tensor = nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)
    return packed.flatten(-2).contiguous().view(torch.int32)


def unpack_nibbles(words: Tensor, k: int) -> Tensor:
    """Words [..., words_for(k)] int32 -> nibbles [..., k] uint8 in [0, 15], that is code + 8."""
    stored = words.contiguous().view(torch.uint8)
    planes = stored.reshape(*words.shape[:-1], words_for(k) // WORDS_PER_CHUNK, 1, PLANE)
    return torch.cat((planes & 15, planes >> 4), dim=-2).flatten(-3)[..., :k]


def unpack_int4(words: Tensor, k: int) -> Tensor:
    """Words [..., words_for(k)] int32 -> codes [..., k] int8 in [-8, 7].

    Raises:
        ValueError: `words` is not int32, or holds another number of columns.
    """
    if words.dtype != torch.int32 or words.shape[-1] != words_for(k):
        raise ValueError(f"{k} codes are {words_for(k)} int32 words, not {words.dtype} {tuple(words.shape)}")
    return unpack_nibbles(words, k).view(torch.int8) - INT4_OFFSET


def row_blocks(n: int, k: int, most: int) -> list[slice]:
    """All rows of a weight [n, k] in order, about `most` weights at a time: what is upcast at once."""
    rows = math.ceil(n / math.ceil(n * k / most))
    return [slice(start, start + rows) for start in range(0, n, rows)]
