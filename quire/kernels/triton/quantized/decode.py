"""Codes of quantised weights made bfloat16 in registers, without tables.

e2m1 has the bits of a bfloat16 whose other exponent bits are 0, hence its value times 2^-126, and
the multiplication by the group's scale, which is needed anyway, takes that back. Both halves of a
32-bit word are done at once. A 4-bit integer c put into the mantissa of 128 is 128 + c.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def float_pair(words, D: tl.constexpr):
    """Codes d of both halves of uint32 words (pack.py): bfloat16 pairs, 2^-126 of their values."""
    if D == 0:
        pair = (words & 0x81808180) | ((words >> 8) & 0x00400040)
    elif D == 1:
        pair = (words << 6) & 0x81C081C0
    elif D == 2:
        pair = (words << 2) & 0x81C081C0
    else:
        pair = ((words >> 4) | (words << 28)) & 0x81C081C0
    return pair


@triton.jit
def integer_pair(words, D: tl.constexpr):
    """Codes d of both halves of uint32 words: bfloat16 pairs, 128 more than they are."""
    return ((words >> (4 * D)) & 0x000F000F) | 0x43004300


@triton.jit
def _neighbours(low, high):
    """[.., W] and [.., W] as [.., 2 W]: the halves of word 0, of word 1, ..."""
    both = tl.join(low, high)
    wide: tl.constexpr = both.shape[:-2] + [2 * both.shape[-2]]  # noqa: RUF005
    return tl.reshape(both, wide)


@triton.jit
def _halves(pair):
    """uint32 words [.., W] as bfloat16 [.., 2 W]."""
    low = pair.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return _neighbours(low, (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True))


@triton.jit
def wide_pair(pair):
    """The lower and the upper bfloat16 of uint32 words as float32, subnormal ones too."""
    low = (pair << 16).to(tl.float32, bitcast=True)
    return low, (pair & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def times(pair, factor, PACKED: tl.constexpr):
    """Products of bfloat16 pairs [.., W], which must be exact, as bfloat16 [.., 2 W]. PACKED: by
    NVIDIA's instruction for two."""
    if PACKED:
        pair = tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
            "=r,r,r",
            [pair, factor],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
        return _halves(pair)
    low, high = wide_pair(pair)
    low_factor, high_factor = wide_pair(factor)
    return _neighbours((low * low_factor).to(tl.bfloat16), (high * high_factor).to(tl.bfloat16))


@triton.jit
def plus(pair, term, PACKED: tl.constexpr):
    """Sums of bfloat16 pairs [.., W], which must be exact, as bfloat16 [.., 2 W]."""
    if PACKED:
        pair = tl.inline_asm_elementwise(
            "{ .reg .b32 one; mov.b32 one, 0x3F803F80; fma.rn.bf16x2 $0, $1, one, $2; }",
            "=r,r,r",
            [pair, term],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
        return _halves(pair)
    low, high = wide_pair(pair)
    low_term, high_term = wide_pair(term)
    return _neighbours((low + low_term).to(tl.bfloat16), (high + high_term).to(tl.bfloat16))


@triton.jit
def _twice(byte, FORMAT: tl.constexpr):
    """A scale's byte (pack.py) as a bfloat16 pair: 2^126 of the scale over the format's factor."""
    if FORMAT == "nvfp4":
        # 8 * (exponent + 10) + mantissa; an exponent of 8 gets bfloat16's largest.
        return byte * 0x00100010 + 0x76007600
    # The exponent is 127 too high in both; 126 - 64 more.
    return (byte + 62) * 0x00800080


@triton.jit
def scale_pairs(scales, D: tl.constexpr, FORMAT: tl.constexpr):
    """What codes d of the words of blocks are multiplied by, [.., BLOCKS * 16], as bfloat16 pairs,
    from the scales of blocks [.., BLOCKS]."""
    if FORMAT == "nvfp4":
        both = (scales >> (16 * D)).to(tl.uint32)
        pairs = tl.join(_twice(both & 0xFF, FORMAT), _twice((both >> 8) & 0xFF, FORMAT))
    else:
        pairs = tl.expand_dims(_twice((scales.to(tl.uint32) >> (8 * D)) & 0xFF, FORMAT), -1)
    each: tl.constexpr = 16 // pairs.shape[-1]
    wide = tl.broadcast_to(tl.expand_dims(pairs, -1), pairs.shape + [each])  # noqa: RUF005
    words: tl.constexpr = scales.shape[:-1] + [16 * scales.shape[-1]]  # noqa: RUF005
    return tl.reshape(wide, words)


# Four e4m3 in $2 to bfloat16 by way of float16 and float32: from float16 directly is slow.
_CAST = tl.constexpr("""{
    .reg .b16 first, second, a, b, c, d;
    .reg .b32 low, high;
    .reg .f32 wa, wb, wc, wd;
    mov.b32 {first, second}, $2;
    cvt.rn.f16x2.e4m3x2 low, first;
    cvt.rn.f16x2.e4m3x2 high, second;
    mov.b32 {a, b}, low;
    mov.b32 {c, d}, high;
    cvt.f32.f16 wa, a;
    cvt.f32.f16 wb, b;
    cvt.f32.f16 wc, c;
    cvt.f32.f16 wd, d;
    cvt.rn.bf16x2.f32 $0, wb, wa;
    cvt.rn.bf16x2.f32 $1, wd, wc;
}""")
# The same by shifts: the bits of 2^-120 of the values, times 2^120.
_SHIFT = tl.constexpr("""{
    .reg .b32 low, high, sign, zero, large;
    mov.b32 zero, 0x80008000;
    mov.b32 large, 0x7B807B80;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    and.b32 sign, low, 0x80008000;
    shr.u32 low, low, 4;
    and.b32 low, low, 0x07F007F0;
    or.b32 low, low, sign;
    and.b32 sign, high, 0x80008000;
    shr.u32 high, high, 4;
    and.b32 high, high, 0x07F007F0;
    or.b32 high, high, sign;
    fma.rn.bf16x2 $0, low, large, zero;
    fma.rn.bf16x2 $1, high, large, zero;
}""")


@triton.jit
def _fp8_float(bits):
    small = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
    return small * 1.329227995784916e36  # 2^120


@triton.jit
def fp8_values(codes, PACKED: tl.constexpr, CAST: tl.constexpr, PURE: tl.constexpr = True):
    """uint8 codes of e4m3 as bfloat16, exactly. CAST: the GPU has an instruction for it. PURE: the
    compiler may exchange codes, instead of values, between threads."""
    if PACKED:
        values = tl.inline_asm_elementwise(
            _CAST if CAST else _SHIFT, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=PURE, pack=4
        )
    else:
        values = _fp8_float(codes.to(tl.uint32)).to(tl.bfloat16)
    return values


# Four e4m3 in $4 to float32.
_CAST_FLOATS = tl.constexpr("""{
    .reg .b16 first, second, a, b, c, d;
    .reg .b32 low, high;
    mov.b32 {first, second}, $4;
    cvt.rn.f16x2.e4m3x2 low, first;
    cvt.rn.f16x2.e4m3x2 high, second;
    mov.b32 {a, b}, low;
    mov.b32 {c, d}, high;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}""")


@triton.jit
def fp8_floats(words, CAST: tl.constexpr):
    """The four e4m3 codes of each of int32 words as float32, four tensors. CAST: as fp8_values'."""
    if CAST:
        return tl.inline_asm_elementwise(
            _CAST_FLOATS, "=f,=f,=f,=f,r", [words], dtype=(tl.float32,) * 4, is_pure=True, pack=1
        )
    bits = words.to(tl.uint32, bitcast=True)
    first, second = _fp8_float(bits), _fp8_float(bits >> 8)
    return first, second, _fp8_float(bits >> 16), _fp8_float(bits >> 24)


@triton.jit
def int8_values(codes, zero):
    """uint8 codes less their zero (float32) as bfloat16, exactly: 2^23's mantissa takes a code."""
    whole = (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
    return (whole - (zero + 8388608.0)).to(tl.bfloat16)
