"""The INT4 layout: exact inverses, and the bits that compressed-tensors writes."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec_kernels.packing import pack_int4, unpack_int4, unpack_nibbles


def _codes(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 9), words=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_pack_and_unpack_are_inverses(n: int, words: int, seed: int) -> None:
    codes = _codes(n, 8 * words, seed)
    packed = pack_int4(codes)
    assert packed.shape == (n, words)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_int4(packed), codes)
    assert torch.equal(unpack_nibbles(packed), codes.to(torch.int32) + 8)


@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (17, 96), (64, 576)])
def test_bits_are_those_of_compressed_tensors(shape: tuple[int, int]) -> None:
    codes = _codes(*shape, seed=3)
    theirs = pack_to_int32(codes, 4)
    assert torch.equal(pack_int4(codes), theirs)
    assert torch.equal(unpack_int4(theirs), unpack_from_int32(theirs, 4, torch.Size(shape)))


def test_every_word_value_survives_the_way_back() -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    words = torch.cat([words, torch.tensor([[-(2**31), -1, 0, 1, 2**31 - 1, 7, -8]])]).to(torch.int32)
    assert torch.equal(pack_int4(unpack_int4(words)), words)


def test_the_lowest_nibble_is_the_first_code() -> None:
    codes = torch.tensor([[-8, 7, -7, 0, 1, 2, 3, 7]], dtype=torch.int8)
    word = int(pack_int4(codes)[0, 0]) & 0xFFFFFFFF
    assert [(word >> (4 * i)) & 15 for i in range(8)] == [0, 15, 1, 8, 9, 10, 11, 15]


def test_non_contiguous_and_leading_dimensions() -> None:
    codes = _codes(64, 24, seed=1)
    assert torch.equal(unpack_int4(pack_int4(codes.t())), codes.t())
    assert torch.equal(unpack_int4(pack_int4(codes.reshape(4, 16, 24))), codes.reshape(4, 16, 24))


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, 7, dtype=torch.int8),
        torch.zeros(2, 8),
        torch.full((2, 8), 8, dtype=torch.int8),
        torch.full((2, 8), -9, dtype=torch.int8),
    ],
)
def test_what_cannot_be_packed_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="pack_int4"):
        pack_int4(bad)


def test_words_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="int32"):
        unpack_int4(torch.zeros(1, 1, dtype=torch.int64))
