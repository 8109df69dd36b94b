"""e2m1 pairs against the definition of their bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.formats.float4 import decode_e2m1, encode_e2m1, pack_nibbles, unpack_nibbles

BYTES = torch.arange(256, dtype=torch.int16).to(torch.uint8)


def value_of(code: int) -> float:
    """Sign, two bits of exponent with bias 1, one bit of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if code & 8 else size


def test_every_pair_decodes_low_half_first_and_encodes_to_itself() -> None:
    expected = torch.tensor([[value_of(b & 15), value_of(b >> 4)] for b in range(256)])
    found = decode_e2m1(BYTES[:, None])
    assert torch.equal(found, expected)
    assert torch.equal(torch.signbit(found), torch.stack([BYTES & 8, BYTES & 128], 1) != 0)
    assert torch.equal(encode_e2m1(found)[:, 0], BYTES)


@given(x=st.floats(width=32, allow_nan=False))
def test_encoding_rounds_to_the_nearest_ties_to_even_and_saturates(x: float) -> None:
    code = int(encode_e2m1(torch.tensor([[x, 0.0]]))) & 15
    size = min(abs(x), 6.0)
    distance = [abs(value_of(c) - size) for c in range(8)]
    nearest = [c for c in range(8) if distance[c] == min(distance)]
    assert code & 7 == (nearest[0] if len(nearest) == 1 else next(c for c in nearest if not c & 1))
    assert code >> 3 == (math.copysign(1.0, x) < 0)


@pytest.mark.parametrize("x", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
def test_ties_go_to_even_codes(x: float) -> None:
    low, high = (int(c) for c in unpack_nibbles(encode_e2m1(torch.tensor([x, -x]))))
    assert low % 2 == 0 and high == low + 8


def test_nan_has_no_code() -> None:
    with pytest.raises(ValueError, match="NaN"):
        encode_e2m1(torch.tensor([math.nan, 0.0]))


def test_nibbles_round_trip_with_no_rows_and_any_shape() -> None:
    for shape in ((0, 4), (3, 0), (2, 3, 6)):
        codes = torch.randint(0, 16, shape, dtype=torch.uint8)
        assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
