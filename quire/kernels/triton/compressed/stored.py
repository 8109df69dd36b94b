"""Vectors of a paged cache as kernels read them (reference/compressed/entries.py has the forms)."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from quire.kernels.triton.launch import INTERPRETED

GROUP = tl.constexpr(64)  # values of a packed key that share a scale
_SIZE_OF_ONE = tl.constexpr(2.0**120)


@cache
def converts_e4m3(device: torch.device) -> bool:
    """Whether the device has an instruction for it: NVIDIA's from Ada on."""
    if INTERPRETED or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def widen_e4m3(codes, NATIVE: tl.constexpr):
    """e4m3, as uint8, in float32. Where it is not NATIVE, codes of NaN are 480."""
    if NATIVE:
        wide = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        # A float32 with these bits has the exponent's bias of 127 in place of 7, subnormals too.
        bits = codes.to(tl.uint32)
        bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        wide = bits.to(tl.float32, bitcast=True) * _SIZE_OF_ONE
    return wide


@triton.jit
def slots_of(table_ptr, index, wanted, PER_BLOCK: tl.constexpr):
    """int64 slots of the `wanted` ones among the vectors `index` of a request, whose row of the
    block table this is."""
    block = tl.load(table_ptr + index // PER_BLOCK, mask=wanted, other=0)
    slot = block.to(tl.int64) * PER_BLOCK + index % PER_BLOCK
    # Triton 3.6 concludes that slots are multiples of PER_BLOCK, from the first in each block being
    # one, and reads vectors of 132 bytes by 16 at a time.
    return tl.multiple_of(slot, 1)


@triton.jit
def load_keys(
    memory_ptr, turned_ptr, slot, wanted,
    D: tl.constexpr, FIXED: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Keys [N, COLUMNS], zeros where none is `wanted`, in bfloat16 if they were packed.

    FIXED: how many values of a packed key do not rotate, 0 of plain keys. turned_ptr: the same
    memory, as bfloat16.
    """
    if FIXED:
        keys = _unpacked(memory_ptr, turned_ptr, slot, wanted, D, FIXED, WIDTH, COLUMNS, NATIVE)
    else:
        column = tl.arange(0, COLUMNS)[None, :]
        rows = memory_ptr + (slot * WIDTH)[:, None] + column
        keys = tl.load(rows, mask=wanted[:, None] & (column < D), other=0.0)
    return keys


@triton.jit
def _unpacked(
    memory_ptr, turned_ptr, slot, wanted,
    D: tl.constexpr, FIXED: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = GROUP if COLUMNS > GROUP else COLUMNS
    group = tl.arange(0, COLUMNS // SIZE)[None, :, None]
    column = group * SIZE + tl.arange(0, SIZE)[None, None, :]
    wanted = wanted[:, None, None]
    keys = memory_ptr + (slot * WIDTH)[:, None, None]
    codes = tl.load(keys + column, mask=wanted & (column < FIXED), other=0)
    scales = keys + (FIXED + 2 * (D - FIXED)) + group
    scale = tl.load(scales, mask=wanted & (group * SIZE < FIXED), other=0).to(tl.uint32)
    # The code 255 is NaN; 0 is not used.
    scale = tl.where(scale == 255, 0x7FC00000, scale << 23).to(tl.float32, bitcast=True)
    turned = turned_ptr + (slot * (WIDTH // 2))[:, None, None] + (column - FIXED // 2)
    rest = tl.load(turned, mask=wanted & (column >= FIXED) & (column < D), other=0.0)
    values = tl.where(column < FIXED, widen_e4m3(codes, NATIVE) * scale, rest.to(tl.float32))
    return tl.reshape(values.to(tl.bfloat16), (codes.shape[0], COLUMNS))
