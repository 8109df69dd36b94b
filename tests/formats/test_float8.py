"""Every code of e4m3, e5m2 and ue8m0 against its bits, and rounding against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.formats import float8

CODES = torch.arange(256, dtype=torch.int16).to(torch.uint8)


def value_of(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The value of a code by the definition of a binary float with this many bits."""
    sign = -1.0 if code >> 7 else 1.0
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def e4m3(code: int) -> float:
    return math.nan if code & 0x7F == 0x7F else value_of(code, 4, 3)


def e5m2(code: int) -> float:
    if code >> 2 & 31 == 31:
        return math.nan if code & 3 else math.copysign(math.inf, -1.0 if code >> 7 else 1.0)
    return value_of(code, 5, 2)


KINDS = {
    "e4m3": (e4m3, float8.decode_e4m3, float8.encode_e4m3, torch.float8_e4m3fn, 448.0),
    "e5m2": (e5m2, float8.decode_e5m2, float8.encode_e5m2, torch.float8_e5m2, 57344.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_decodes_to_what_its_bits_say_and_encodes_to_itself(kind: str) -> None:
    value, decode, encode, dtype, largest = KINDS[kind]
    expected = torch.tensor([value(c) for c in range(256)])
    found = decode(CODES)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(found)[~found.isnan()], CODES[~found.isnan()] >= 128)
    finite = expected.isfinite()
    assert float(expected[finite].max()) == largest
    assert torch.equal(encode(found).view(torch.uint8)[finite], CODES[finite])
    assert torch.equal(decode(CODES.view(dtype))[finite], expected[finite])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_too_large_saturates_and_nan_stays_nan(kind: str) -> None:
    _, decode, encode, _, largest = KINDS[kind]
    given_ = torch.tensor([math.inf, -math.inf, 1e30, -1e30, largest * 1.01, math.nan, 0.0, -0.0])
    found = decode(encode(given_))
    assert found[:5].tolist() == [largest, -largest, largest, -largest, largest]
    assert found[5].isnan()
    assert found[6:].tolist() == [0.0, 0.0] and torch.signbit(found[6:]).tolist() == [False, True]


@pytest.mark.parametrize("kind", KINDS)
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_encoding_rounds_to_the_nearest_code_and_ties_to_the_even_one(kind: str, x: float) -> None:
    value, _, encode, _, largest = KINDS[kind]
    code = int(encode(torch.tensor(x)).view(torch.uint8))
    finite = [c for c in range(128) if math.isfinite(value(c))]
    size = min(Fraction(abs(x)), Fraction(largest))
    distance = {c: abs(Fraction(value(c)) - size) for c in finite}
    nearest = [c for c in finite if distance[c] == min(distance.values())]
    assert code & 0x7F == (
        nearest[0] if len(nearest) == 1 else next(c for c in nearest if not c & 1)
    )
    assert code >> 7 == (math.copysign(1.0, x) < 0)


def test_ue8m0_codes_are_powers_of_two() -> None:
    found = float8.decode_ue8m0(CODES)
    assert [float(v) for v in found[:255]] == [2.0 ** (c - 127) for c in range(255)]
    assert found[255].isnan()
    torch_own = CODES.view(torch.float8_e8m0fnu)
    assert torch.equal(float8.decode_ue8m0(torch_own)[:255], torch_own.float()[:255])
    assert torch.equal(float8.encode_ue8m0(found), CODES)


@given(x=st.floats(min_value=2.0**-126, max_value=2.0**127, width=32))
def test_ue8m0_rounds_up_to_the_next_power_of_two(x: float) -> None:
    code = int(float8.encode_ue8m0(torch.tensor(x)))
    assert 2.0 ** (code - 128) < x <= 2.0 ** (code - 127)


def test_ue8m0_ends() -> None:
    given_ = torch.tensor([0.0, 1e-45, 2.0**-127, 3e38, math.inf, math.nan, -1.0])
    assert float8.encode_ue8m0(given_).tolist() == [0, 0, 0, 254, 254, 255, 255]
