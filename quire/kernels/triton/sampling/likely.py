"""Finding the likeliest tokens of a row without sorting it.

Tokens are compared by int32 keys, smaller is likelier. First a cut is found that no token wanted
lies behind, then the tokens before it are listed, in any order. In that list a bracket is narrowed
around the last key wanted. All sums are sums of integers, so neither the list's order nor the
number of programs can change a bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.sampling.slots import INFINITY, scaled

PIVOTS = tl.constexpr(8)
# What the bracket is narrowed by.
BY_COUNT = tl.constexpr(0)
BY_MASS = tl.constexpr(1)
BY_TOKEN = tl.constexpr(2)  # among the tokens of one key, to their ids
_LAST = tl.constexpr(2**31 - 1)
_LAST_LOGIT = tl.constexpr(0x7F800000)  # the raw key of -inf
_ONE = tl.constexpr(2.0**40)  # the likeliest token's mass; 2^18 of them fit in an int64


@triton.jit
def scaled_key(x, largest, temperature):
    """Keys of logits: the bits of their distance from the largest, divided by the temperature."""
    return tl.abs(scaled(x, largest, temperature)).to(tl.int32, bitcast=True)


@triton.jit
def raw_key(x):
    """Keys of logits as they are, and back (it is its own inverse): an order of all floats."""
    # 0.0 makes -0.0 equal to it.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return ~(bits ^ (bits >> 31 & 0x7FFFFFFF))


@triton.jit
def raw_of_key(key):
    """The logits of raw keys."""
    bits = ~key
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def mass(key):
    """exp of scaled keys, in units of 2^-40."""
    return (tl.exp(-key.to(tl.float32, bitcast=True)) * _ONE).to(tl.int64)


@triton.jit
def cut_at(x, inside, count):
    """A raw key that at least `count` of the logits x [N] do not exceed, near the least of those;
    the largest int32 where `count` is more than there are."""
    key = tl.where(inside, raw_key(x), _LAST)
    low = tl.full([], -(2**31) - 1, dtype=tl.int64)
    high = tl.full([], 2**31 - 1, dtype=tl.int64)
    # 20 bits are enough for a bound: they are a float's sign, exponent and 11 bits of mantissa.
    for _ in range(20):
        middle = (low + high) >> 1
        reached = tl.sum((key <= middle).to(tl.int32)) >= count
        high = tl.where(reached, middle, high)
        low = tl.where(reached, low, middle)
    # Behind -inf lies no logit: a bound there stands for it.
    return tl.where(high > _LAST_LOGIT, tl.where(high < _LAST, _LAST_LOGIT, high), high).to(
        tl.int32
    )


@triton.jit
def list_candidates(
    key, token, wanted, count_ptr, list_key_ptr, list_id_ptr, CANDIDATES: tl.constexpr
):
    """Append the wanted of keys and tokens [N] to a row's list, where there is room."""
    count = tl.sum(wanted.to(tl.int32))
    if count > 0:
        at = tl.atomic_add(count_ptr, count) + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
        fits = wanted & (at < CANDIDATES)
        tl.store(list_key_ptr + at, key, mask=fits)
        tl.store(list_id_ptr + at, token, mask=fits)


@triton.jit
def load_candidates(
    start,
    count,
    list_key_ptr,
    list_id_ptr,
    logits_ptr,
    largest,
    temperature,
    V: tl.constexpr,
    CANDIDATES: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(keys, tokens, which exist) of candidates start, start + 1, ...: the list's, or where it
    was too short those of the vocabulary."""
    index = start + tl.arange(0, BLOCK)
    inside = index < tl.where(count <= CANDIDATES, count, V)
    if count <= CANDIDATES:
        key = tl.load(list_key_ptr + index, mask=inside, other=0)
        token = tl.load(list_id_ptr + index, mask=inside, other=0)
    else:
        x = tl.load(logits_ptr + index, mask=inside, other=-INFINITY).to(tl.float32)
        key = raw_key(x) if RAW else scaled_key(x, largest, temperature)
        token = index
    return key, token, inside


@triton.jit
def search(
    low,
    high,
    target,
    tie,
    count,
    list_key_ptr,
    list_id_ptr,
    logits_ptr,
    largest,
    temperature,
    BY: tl.constexpr,
    V: tl.constexpr,
    CANDIDATES: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(k, F(k - 1)) for the least k in (low, high] with F(k) >= target, or `high` if none has.

    F(k) is the number of candidates with a key of at most k, or their mass, or the number of
    candidates of key `tie` with a token of at most k.
    """
    total = tl.where(count <= CANDIDATES, count, V)
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    before = tl.zeros([], dtype=tl.int64)
    while high - low > 1:
        index = tl.arange(0, PIVOTS)
        pivot = low + (high - low) * (index + 1) // (PIVOTS + 1)
        sums = tl.zeros([BLOCK, PIVOTS], dtype=tl.int64)
        for start in range(0, total, BLOCK):
            key, token, inside = load_candidates(
                start, count, list_key_ptr, list_id_ptr, logits_ptr, largest, temperature,
                V, CANDIDATES, RAW, BLOCK,
            )  # fmt: skip
            if BY == BY_TOKEN:
                value = token
                weight = (inside & (key == tie)).to(tl.int64)
            elif BY == BY_MASS:
                value = key
                weight = tl.where(inside, mass(key), 0)
            else:
                value = key
                weight = inside.to(tl.int64)
            sums += tl.where(value[:, None] <= pivot[None, :], weight[:, None], 0)
        found = tl.sum(sums, axis=0)
        # Sums grow with the pivots: the first `few` are less than the target.
        few = tl.sum((found < target).to(tl.int64))
        before = tl.maximum(before, tl.sum(tl.where(index + 1 == few, found, 0)))
        width = high - low
        high = low + width * (few + 1) // (PIVOTS + 1)
        low += width * few // (PIVOTS + 1)
    return high.to(tl.int32), before
