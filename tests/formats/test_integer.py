"""Packed words against arithmetic on Python integers."""

from __future__ import annotations

import pytest
import torch

from quire.formats.integer import AWQ_ORDER, pack_awq, pack_words, unpack_awq, unpack_words


def word(codes: list[int], bits: int) -> int:
    value = sum(code << (bits * i) for i, code in enumerate(codes))
    return value - (1 << 32) if value >> 31 else value


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_words_hold_the_first_code_in_the_lowest_bits(bits: int, dim: int) -> None:
    per_word = 32 // bits
    codes = torch.randint(0, 1 << bits, (3 * per_word, 2 * per_word), dtype=torch.uint8)
    words = pack_words(codes, bits, dim)
    lines = codes.T if dim == 0 else codes
    expected = [
        [word(line[i : i + per_word].tolist(), bits) for i in range(0, len(line), per_word)]
        for line in lines
    ]
    found = words.T if dim == 0 else words
    assert words.dtype == torch.int32 and found.tolist() == expected
    assert torch.equal(unpack_words(words, bits, dim), codes)


def test_a_part_of_a_word_is_filled_with_zeros() -> None:
    codes = torch.tensor([[15, 1, 15]], dtype=torch.uint8)
    assert pack_words(codes, 4).tolist() == [[0xF1F]]
    assert unpack_words(pack_words(codes, 4), 4).tolist() == [[15, 1, 15, 0, 0, 0, 0, 0]]


def test_awq_words_interleave_their_columns() -> None:
    codes = torch.randint(0, 16, (5, 24), dtype=torch.uint8)
    words = pack_awq(codes)
    for row in range(5):
        for w in range(3):
            columns = codes[row, 8 * w : 8 * w + 8].tolist()
            assert int(words[row, w]) == word([columns[c] for c in AWQ_ORDER], 4)
    assert torch.equal(unpack_awq(words), codes)
