"""Numbers as codes of e4m3 by their bits alone: the same on every target, which need not have an
instruction for it."""

from __future__ import annotations

import triton
import triton.language as tl

_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def e4m3_codes(values):
    """float32 to the bits of the nearest e4m3, ties to even; what is larger than 448 becomes it."""
    bits = values.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Three bits of mantissa stay, and the exponent counts from -7 instead of -127.
    code = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count 2^-9s, the last place of a float32 just above 2^14.
    counted = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
    code = tl.where(size < (121 << 23), counted - (141 << 23), tl.minimum(code, 0x7E))
    code = tl.where(size > _INFINITY, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
