"""A vector into its slot of a cache, as quire/kernels/reference/compressed/entries.py packs it.

Codes and scales are made of the bits of numbers: exactly the reference's on every target, NaN too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.compressed import Paged
from quire.kernels.reference.compressed.entries import (
    GROUP,
    LEAST_MAGNITUDE,
    PackedIndex,
    PackedKeys,
    Plain,
)
from quire.kernels.triton.quantized.encode import e4m3_codes

KINDS = (Plain, PackedKeys, PackedIndex)
_PLAIN, _KEYS = tl.constexpr(0), tl.constexpr(1)
_GROUP = tl.constexpr(GROUP)
_LEAST = tl.constexpr(int(torch.tensor(LEAST_MAGNITUDE).view(torch.int32)))
_INFINITY = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def _scale_code(largest):
    """ue8m0 of the smallest power of two that takes the bits of a magnitude to 448 at most."""
    # 448 is 1.75 * 2^8, and 0x600000 is the mantissa of 1.75: beyond it the next power counts.
    code = ((tl.maximum(largest, _LEAST) + 0x1FFFFF) >> 23) - 8
    return tl.where(largest < _INFINITY, code, tl.where(largest == _INFINITY, 254, 255))


@triton.jit
def _inverse(code):
    """1 / the scale that `code` stands for."""
    bits = tl.where(code == 254, 1 << 22, (254 - code) << 23)
    return tl.where(code == 255, _NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def store_entry(
    y, cache_ptr, slot,
    KIND: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store float32 y [1, BLOCK], of which D values count, in `slot` (int64) of a cache."""
    BLOCK: tl.constexpr = y.shape[1]
    place = cache_ptr + slot * WIDTH
    column = tl.arange(0, BLOCK)[None, :]
    if KIND == _PLAIN:
        tl.store(place + column, y.to(cache_ptr.dtype.element_ty), mask=column < D)
    else:
        CODES: tl.constexpr = D - ROTARY if KIND == _KEYS else D
        SIZE: tl.constexpr = _GROUP if KIND == _KEYS else BLOCK
        size = tl.where(column < CODES, y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        # As integers, of which NaN's are the largest.
        largest = tl.max(tl.reshape(size, (BLOCK // SIZE, SIZE)), axis=1, keep_dims=True)
        code = _scale_code(largest)
        scaled = tl.reshape(y, (BLOCK // SIZE, SIZE)) * _inverse(code)
        tl.store(place + column, tl.reshape(e4m3_codes(scaled), (1, BLOCK)), mask=column < CODES)
        if KIND == _KEYS:
            END: tl.constexpr = CODES + 2 * ROTARY
            GROUPS: tl.constexpr = (CODES + SIZE - 1) // SIZE
            turned = (place + CODES).to(tl.pointer_type(tl.bfloat16)) + (column - CODES)
            tl.store(turned, y.to(tl.bfloat16), mask=(column >= CODES) & (column < D))
            group = tl.arange(0, BLOCK // SIZE)[:, None]
            tl.store(place + END + group, code.to(tl.uint8), mask=group < GROUPS)
            rest = END + GROUPS + tl.arange(0, 8)
            tl.store(place + rest, tl.zeros([8], tl.uint8), mask=rest < WIDTH)
        else:
            scale = tl.where(code == 255, _NAN, code << 23)
            byte = tl.arange(0, 4)[None, :]
            tl.store(place + D + byte, (scale >> (8 * byte)).to(tl.uint8))


def entry_constants(cache: Paged, size: int, rotary: int) -> dict[str, int]:
    """What store_entry and its tile are compiled for. Raises ValueError where the cache holds
    something else than vectors of `size` values whose last `rotary` rotate."""
    entries, memory = cache.entries, cache.memory
    if (
        not isinstance(entries, KINDS)
        or entries.size != size
        or (isinstance(entries, PackedKeys) and entries.rotary != rotary)
        or (memory.dtype == torch.uint8) == isinstance(entries, Plain)
    ):
        raise ValueError(
            f"vectors of {size} values, {rotary} of them rotated, do not fit a cache of "
            f"{memory.dtype} with {entries}"
        )
    if memory.shape[1] != entries.width or not memory.is_contiguous():
        raise ValueError(f"cache: expected contiguous [slots, {entries.width}]")
    if size % 2 or rotary % 2 or not 0 < rotary <= size:
        raise ValueError(f"{rotary} of {size} values are not whole pairs at the end of pairs")
    return {
        "KIND": KINDS.index(type(entries)),
        "D": size,
        "ROTARY": rotary,
        "WIDTH": entries.width,
        "BLOCK": max(GROUP, triton.next_power_of_2(size)),
    }
