"""Heads in registers as words of two neighbouring columns, and what is done to new ones.

A head of D columns is a tuple: for each CHUNK of columns the even ones [CHUNK / 2], then the odd
ones, as words of 16 bits and pairs of float32 give them. Columns that rotate together are in the
same places of two elements where half of the columns that rotate are whole chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.quantized.decode import wide_pair
from quire.kernels.triton.rotary.rotary_cache import inverse_rms, rotated


@triton.jit
def words_at(pointer):
    return pointer.to(tl.pointer_type(tl.uint32), bitcast=True)


@triton.jit
def wide(words, dtype: tl.constexpr):
    """Both columns of words, in float32."""
    if dtype == tl.bfloat16:
        low, high = wide_pair(words)
    else:
        low = words.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def load_head(head, column, D: tl.constexpr, CHUNK: tl.constexpr, dtype: tl.constexpr):
    """The head at a pointer to words; `column`: 0 to CHUNK / 2 - 1."""
    x = ()
    for first in tl.static_range(0, D, CHUNK):
        inside = column < (D - first) // 2
        x = x + wide(tl.load(head + first // 2 + column, mask=inside, other=0), dtype)
    return x


@triton.jit
def load_floats(pointer, column, D: tl.constexpr, CHUNK: tl.constexpr):
    """D values in float32, such as a head's weights, as the head lies in registers."""
    pairs = pointer.to(tl.pointer_type(tl.uint64), bitcast=True)
    x = ()
    for first in tl.static_range(0, D, CHUNK):
        inside = column < (D - first) // 2
        pair = tl.load(pairs + first // 2 + column, mask=inside, other=0)
        low = pair.to(tl.uint32).to(tl.float32, bitcast=True)
        high = (pair >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
        x = x + (low, high)  # type: ignore[assignment]  # noqa: RUF005
    return x


@triton.jit
def normed(x, weights, eps, D: tl.constexpr):
    """The head's RMS norm times its weights; as it is where there are none."""
    y = x
    if len(weights) > 0:
        squares = tl.zeros(x[0].shape, tl.float32)
        for i in tl.static_range(len(x)):
            squares += x[i] * x[i]
        inverse, y = inverse_rms(tl.sum(squares, 0), D, eps), ()
        for i in tl.static_range(len(x)):
            y = y + (x[i] * inverse * weights[i],)  # noqa: RUF005
    return y


@triton.jit
def turned(x, table):
    """The head rotated by a row of the table, cosines and then sines: as many of its columns."""
    HALF: tl.constexpr = len(table) // 2
    a, b, rest = (), (), ()
    for i in tl.static_range(HALF):
        first, second = rotated(x[i], x[HALF + i], table[i], table[HALF + i])
        a, b = a + (first,), b + (second,)  # type: ignore[assignment]  # noqa: RUF005
    for i in tl.static_range(2 * HALF, len(x)):
        rest = rest + (x[i],)  # type: ignore[assignment]  # noqa: RUF005
    return a + b + rest


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Words of the head rounded to `dtype`, one [CHUNK / 2] for each chunk."""
    words = ()
    for i in tl.static_range(0, len(x), 2):
        low = x[i].to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = x[i + 1].to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        words = words + (low | (high << 16),)  # type: ignore[assignment]  # noqa: RUF005
    return words


@triton.jit
def dot_words(a, b, dtype: tl.constexpr):
    """The product of two heads in words."""
    products = tl.zeros(a[0].shape, tl.float32)
    for i in tl.static_range(len(a)):
        a_low, a_high = wide(a[i], dtype)
        b_low, b_high = wide(b[i], dtype)
        products += a_low * b_low + a_high * b_high
    return tl.sum(products, 0)


@triton.jit
def spread(words, column, dtype: tl.constexpr):
    """The head of which each thread has some words, for threads that need others: without these
    exchanges the compiler has every thread compute all that it needs."""
    x = ()
    for i in tl.static_range(len(words)):
        x = x + wide(tl.gather(words[i], column, 0), dtype)
    return x
