"""Codes of fewer than 8 bits as they lie in files: densely in int32 words, as compressed-tensors packs them.

codes   [N, K]       -> [N, ceil(K b / 32)] along the columns; of 4 bits this is `lowprec_kernels.packing`
zeros   [N, K / G]   -> [ceil(N b / 32), K / G] along the rows, for formats with zero points
"""

import math

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.asymmetric import from_offset, offset_codes

WORD_BITS = 32
Shape = tuple[int, ...]


def code_shape(fmt: str, n: int, k: int) -> Shape:
    """Shape of the packed codes of [n, k] weights."""
    return n, math.ceil(k * WEIGHT_FORMATS[fmt].bits / WORD_BITS)


def zero_shape(fmt: str, n: int, k: int) -> Shape | None:
    """Shape of the packed zero points of [n, k] weights, None where the format has none."""
    form = WEIGHT_FORMATS[fmt]
    return None if form.symmetric else (math.ceil(n * form.bits / WORD_BITS), k // (form.group_size or k))


def pack_codes(weight: QuantizedWeight) -> Tensor:
    """The codes in words."""
    form = WEIGHT_FORMATS[weight.format]
    codes = weight.codes if form.symmetric else offset_codes(weight)[0]
    words: Tensor = pack_to_int32(codes.cpu(), form.bits)
    return words


def pack_zeros(weight: QuantizedWeight) -> Tensor:
    """The zero points in words, of a format that has them."""
    words: Tensor = pack_to_int32(offset_codes(weight)[1].cpu(), WEIGHT_FORMATS[weight.format].bits, packed_dim=0)
    return words


def unpack(fmt: str, words: Tensor, zeros: Tensor | None, scale: Tensor, k: int) -> QuantizedWeight:
    """The weight [N, k] of packed codes, packed zero points and scales [N, k / G]."""
    form = WEIGHT_FORMATS[fmt]
    codes = unpack_from_int32(words, form.bits, torch.Size((len(scale), k)))
    if zeros is not None:
        codes = from_offset(codes, unpack_from_int32(zeros, form.bits, scale.shape, packed_dim=0))
    return QuantizedWeight(format=fmt, codes=codes, scale=scale.to(torch.float32))
