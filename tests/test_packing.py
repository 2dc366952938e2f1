"""The INT4 layout: exact inverses, and the bits that `packing.py` draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec_kernels.packing import pack_int4, unpack_int4, unpack_nibbles, words_for


def _codes(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 9), k=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_pack_and_unpack_are_inverses(n: int, k: int, seed: int) -> None:
    codes = _codes(n, k, seed)
    packed = pack_int4(codes)
    assert packed.shape == (n, words_for(k))
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_int4(packed, k), codes)
    assert torch.equal(unpack_nibbles(packed, k).to(torch.int32), codes.to(torch.int32) + 8)


def test_every_word_value_survives_the_way_back() -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (5, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    words = torch.cat([words, torch.tensor([[-(2**31), -1, 0, 1, 2**31 - 1, 7, -8, 9]])]).to(torch.int32)
    assert torch.equal(pack_int4(unpack_int4(words, 64)), words)


def test_the_planes_are_where_the_drawing_has_them() -> None:
    codes = _codes(1, 128, seed=5)
    words = pack_int4(codes)[0].tolist()
    for chunk, i, j in ((c, i, j) for c in range(2) for i in range(8) for j in range(4)):
        word = words[8 * chunk + i] & 0xFFFFFFFF
        low, high = (word >> (8 * j)) & 15, (word >> (8 * j + 4)) & 15
        assert low == int(codes[0, 64 * chunk + 4 * i + j]) + 8
        assert high == int(codes[0, 64 * chunk + 32 + 4 * i + j]) + 8


def test_what_fills_a_chunk_up_is_code_zero() -> None:
    assert torch.equal(unpack_int4(pack_int4(_codes(3, 96, seed=1)), 128)[:, 96:], torch.zeros(3, 32, dtype=torch.int8))


def test_non_contiguous_and_leading_dimensions() -> None:
    codes = _codes(64, 24, seed=1)
    assert torch.equal(unpack_int4(pack_int4(codes.t()), 64), codes.t())
    assert torch.equal(unpack_int4(pack_int4(codes.reshape(4, 16, 24)), 24), codes.reshape(4, 16, 24))
    words = pack_int4(_codes(16, 128, seed=2))
    assert torch.equal(unpack_int4(words[::2], 128), unpack_int4(words, 128)[::2])


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, 8),
        torch.full((2, 8), 8, dtype=torch.int8),
        torch.full((2, 8), -9, dtype=torch.int8),
    ],
)
def test_bad_codes_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="pack_int4"):
        pack_int4(bad)


@pytest.mark.parametrize("words", [torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 7, dtype=torch.int32)])
def test_bad_words_are_refused(words: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="int32 words"):
        unpack_int4(words, 64)
