"""Scales of a cache in e4m3. quire/kernels/reference/attention/fp8_cache.py has the layout."""

from __future__ import annotations

import triton
import triton.language as tl

SCALE_BYTES = tl.constexpr(4)


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
