"""Gumbel noise that is a function of (seed, choice, position, token) and of nothing else.

The words are those of quire/kernels/reference/ops.py, Philox-4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011), bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LN_2 = tl.constexpr(0.6931471805599453)
# Bits of sqrt(1/2): mantissas are taken from there to sqrt(2), so that logarithms near 1 are small.
_SQRT_HALF = tl.constexpr(0x3F3504F3)


@triton.jit
def philox(counter, position, choice, seed_low, seed_high):
    """Four uint32 words each of the uint32 counters (counter, position, choice, 0)."""
    c0, c1, c2 = counter, position, choice
    c3 = tl.zeros_like(seed_low)
    key0, key1 = seed_low, seed_high
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = a.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _log(fraction, exponent):
    """log((1 + fraction) 2^exponent) for fraction from sqrt(1/2) - 1 to sqrt(2) - 1.

    log1p(f) = f - f^2 / 2 + f^3 q(f), q fitted by weighted least squares; with rounding, results
    are within 1.6 x 2^-24 of themselves. Each product is fused with its sum, here and wherever
    bits matter, so that every kernel that calls this gets the same bits.
    """
    q = tl.fma(fraction, 0.08700360, -0.14267476)
    q = tl.fma(q, fraction, 0.14914787)
    q = tl.fma(q, fraction, -0.16577587)
    q = tl.fma(q, fraction, 0.19963062)
    q = tl.fma(q, fraction, -0.25001338)
    q = tl.fma(q, fraction, 0.33333910)
    q = tl.fma(q, fraction, -0.5)
    log1p = tl.fma(q, fraction * fraction, fraction)
    return tl.fma(exponent.to(tl.float32), _LN_2, log1p)


@triton.jit
def gumbel(word):
    """-log(-log((k + 0.5) 2^-24)) of the upper 24 bits k of uint32 words, float32."""
    # u = odd 2^-25 need not be a float32. Its distance from a power of two is one, which keeps
    # the small -log(u) near u = 1 exact: from there come the largest values.
    odd = (word >> 8).to(tl.int32) * 2 + 1
    exponent = (odd.to(tl.float32).to(tl.int32, bitcast=True) - _SQRT_HALF) >> 23
    scale = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    fraction = (odd - (1 << exponent)).to(tl.float32) * scale
    bits = (-_log(fraction, exponent - 25)).to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    return -_log(mantissa - 1.0, exponent)


@triton.jit
def noise_of(token, position, choice, seed_low, seed_high):
    """Gumbel noise of any tokens int32."""
    w0, w1, w2, w3 = philox((token // 4).to(tl.uint32), position, choice, seed_low, seed_high)
    low = tl.where(token % 2 == 0, w0, w1)
    high = tl.where(token % 2 == 0, w2, w3)
    return gumbel(tl.where(token % 4 < 2, low, high))


@triton.jit
def noise_of_tile(first, position, choice, seed_low, seed_high, TILE: tl.constexpr):
    """Gumbel noise [TILE // 4, 4] of the tokens from `first` on, a multiple of 4: the same bits
    with a quarter of the work."""
    counter = (first // 4 + tl.arange(0, TILE // 4)).to(tl.uint32)
    w0, w1, w2, w3 = philox(counter, position, choice, seed_low, seed_high)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return gumbel(tl.reshape(words, [TILE // 4, 4]))
