"""Bit layout of INT4 weights: eight codes to an int32, lowest nibble first, offset binary (code + 8).

One row of K codes becomes K / 8 words; within the word that holds codes c0 .. c7:

    bit  31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
        +--------+--------+--------+--------+--------+--------+--------+--------+
        | c7 + 8 | c6 + 8 | c5 + 8 | c4 + 8 | c3 + 8 | c2 + 8 | c1 + 8 | c0 + 8 |
        +--------+--------+--------+--------+--------+--------+--------+--------+

This is the `weight_packed` tensor of the compressed-tensors format `pack-quantized` with 4 bits, packed along the
columns. `pack_int4` and `unpack_int4` are exact inverses. Left out: other widths, and K that is no multiple of 8
(compressed-tensors pads; every group size here is a multiple of 32, so the case does not arise).
"""

import torch
from torch import Tensor

CODES_PER_WORD = 8
INT4_OFFSET = 8


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(0, 4 * CODES_PER_WORD, 4, dtype=torch.int32, device=device)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes [..., K] int8 in [-8, 7] -> words [..., K / 8] int32.

    Raises:
        ValueError: K is no multiple of 8, the dtype is not int8, or a code is out of range.
    """
    if codes.dtype != torch.int8 or codes.shape[-1] % CODES_PER_WORD:
        raise ValueError(f"pack_int4 needs int8 codes with K a multiple of 8, not {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"pack_int4 needs codes in [-8, 7], these lie in [{int(codes.min())}, {int(codes.max())}]")
    words = codes.shape[-1] // CODES_PER_WORD
    nibbles = (codes.to(torch.int32) + INT4_OFFSET).reshape(*codes.shape[:-1], words, CODES_PER_WORD)
    # The nibbles do not overlap, so the sum is their bitwise or; int32 wraps where the top nibble sets the sign.
    return (nibbles << _shifts(codes.device)).sum(-1, dtype=torch.int32)


def unpack_nibbles(words: Tensor) -> Tensor:
    """Words [..., K / 8] int32 -> nibbles [..., K] int32 in [0, 15], that is code + 8."""
    return ((words.unsqueeze(-1) >> _shifts(words.device)) & 15).flatten(-2)


def unpack_int4(words: Tensor) -> Tensor:
    """Words [..., K / 8] int32 -> codes [..., K] int8 in [-8, 7].

    Raises:
        ValueError: `words` is not int32.
    """
    if words.dtype != torch.int32:
        raise ValueError(f"unpack_int4 needs int32 words, not {words.dtype}")
    return (unpack_nibbles(words) - INT4_OFFSET).to(torch.int8)
