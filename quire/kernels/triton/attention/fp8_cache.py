"""Codes and scales of a cache in e4m3: quire/kernels/reference/attention/fp8_cache.py has the
layout of its blocks."""

from __future__ import annotations

import triton
import triton.language as tl

SCALE_BYTES = tl.constexpr(4)


@triton.jit
def e4m3_codes(values):
    """float32 as e4m3 in uint8: to nearest, ties to even, what is larger than 448 cut. By integers,
    since not every GPU has an instruction for it."""
    # The minimum also keeps a product that made the values out of the sum below.
    size = tl.minimum(tl.abs(values), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # 3 bits of mantissa stay, and exponents are 120 less.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Numbers from 2^14 on are as far apart as those of e4m3 below 2^-6.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(size < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def largest_magnitude(values, so_far):
    """Bits of the largest magnitude [rows, 1] of values [rows, columns] and of those `so_far`; of a
    NaN or an infinity where there is one, as these have the largest bits."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.maximum(so_far, tl.max(bits, axis=1, keep_dims=True))


@triton.jit
def scale_of(largest, fixed, FIXED: tl.constexpr):
    """Scales of heads whose largest magnitude has these bits: `fixed` where FIXED."""
    scale = fixed if FIXED else tl.div_rn(largest.to(tl.float32, bitcast=True), 448.0)
    scale = tl.maximum(scale, 1.1754943508222875e-38)
    return tl.where(largest < 0x7F800000, scale, float("nan"))


@triton.jit
def scales_at(cache_ptr, head, D: tl.constexpr, BLOCK: tl.constexpr):
    """Where the scales of a head's tokens begin in block 0. Blocks are a quarter of their bytes
    apart."""
    begin = head * (BLOCK * (D + SCALE_BYTES) // SCALE_BYTES) + BLOCK * D // SCALE_BYTES
    return cache_ptr.to(tl.pointer_type(tl.float32), bitcast=True) + begin
