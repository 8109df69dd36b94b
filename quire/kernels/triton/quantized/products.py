"""The sum over K of every product with a quantised weight.

One function for all formats and kernels, with or without a leading dimension of parts, each of
which is a warp's own: parts of K that are added at the end, or a token's experts. Weights are on
the tall side of the matrix instruction and are decoded in the registers it takes them from.

Scales of nvfp4 and mxfp4 are multiplied into the values, which is exact in bfloat16. Those of
int4, int8 and fp8_block would round there: they are multiplied into the float32 sum over their
group. Sums over K are in one order, which FORMAT and GROUP fix for one part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.gemm.multiply import multiply_add
from quire.kernels.triton.quantized.decode import (
    float_pair,
    fp8_values,
    int8_values,
    integer_pair,
    plus,
    scale_pairs,
    times,
)


@triton.jit
def across(values, PARTED: tl.constexpr):
    """[C] as a row, [(1,) 1, C]."""
    return values[None, None, :] if PARTED else values[None, :]


@triton.jit
def down(values, PARTED: tl.constexpr):
    """[C] as a column, [(1,) C, 1]."""
    return values[None, :, None] if PARTED else values[:, None]


@triton.jit
def _inputs(x_rows, x_inside, column, k, EVEN: tl.constexpr):
    """x at some columns, [.., columns, tokens]; zero where a token or column is not there."""
    if EVEN:
        return tl.load(x_rows + column, mask=x_inside, other=0.0)
    return tl.load(x_rows + column, mask=x_inside & (column < k), other=0.0)


@triton.jit
def _codes(code_rows, column, end, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(code_rows + column)
    return tl.load(code_rows + column, mask=column < end, other=0)


@triton.jit
def _scales(scale_rows, index, end, stride, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(scale_rows + index * stride)
    return tl.load(scale_rows + index * stride, mask=index < end, other=0)


@triton.jit
def sum_products(
    y, x_rows, x_inside, k, code_rows, scale_rows, zero_rows, scale_stride, part, blocks,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
    EVEN: tl.constexpr, PACKED: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """y + W x, [(parts,) rows, tokens] float32.

    Pointers to the beginnings of rows: `x_rows` [(.,) 1, tokens], of which `x_inside` exist,
    `code_rows`, `scale_rows` and `zero_rows` [(.,) rows, 1]; from one group's scales to the next
    are `scale_stride` elements. `part`: of K's PARTS, each program's or [parts, 1, 1]. `blocks`:
    of 128 columns in all; BLOCKS: in a step of a part, 1 for int4, int8 and fp8_block. EVEN: all
    steps are whole and have no padding.
    """
    PARTED: tl.constexpr = len(y.shape) == 3
    EIGHT: tl.constexpr = FORMAT == "fp8" or FORMAT == "fp8_block" or FORMAT == "int8"
    STEP: tl.constexpr = GROUP if FORMAT == "int8" and GROUP < 128 else 128 * BLOCKS
    WORDS: tl.constexpr = 16 * BLOCKS
    word = tl.arange(0, WORDS)
    half = tl.arange(0, 2 * WORDS)
    half_column = half // 32 * 128 + half % 32  # of x, for codes 0
    step_column = tl.arange(0, STEP)
    own_block = tl.arange(0, BLOCKS)
    for start in range(0, blocks, BLOCKS * PARTS):
        block = start + part * BLOCKS
        if EIGHT:
            for piece in tl.static_range(128 * BLOCKS // STEP):
                first = block * 128 + piece * STEP
                codes = _codes(code_rows, first + across(step_column, PARTED), blocks * 128, EVEN)
                x = _inputs(x_rows, x_inside, first + down(step_column, PARTED), k, EVEN)
                if FORMAT == "fp8":
                    y = multiply_add(fp8_values(codes, PACKED, CAST), x, y)
                else:
                    index = first // GROUP
                    scale = _scales(scale_rows, index, blocks * 128 // GROUP, scale_stride, EVEN)
                    if FORMAT == "fp8_block":
                        values = fp8_values(codes, PACKED, CAST)
                    elif zero_rows is None:
                        values = int8_values(codes, 128.0)
                    else:
                        zero = _scales(zero_rows, index, blocks * 128 // GROUP, scale_stride, EVEN)
                        values = int8_values(codes, zero.to(tl.float32))
                    y += multiply_add(values, x, tl.zeros_like(y)) * scale.to(tl.float32)
        else:
            words = _codes(code_rows, block * 16 + across(word, PARTED), blocks * 16, EVEN)
            words = words.to(tl.uint32, bitcast=True)
            if FORMAT != "int4":
                index = block + across(own_block, PARTED)
                scales = _scales(scale_rows, index, blocks, scale_stride, EVEN)
            for d in tl.static_range(4):
                column = block * 128 + 32 * d + down(half_column, PARTED)
                x = _inputs(x_rows, x_inside, column, k, EVEN)
                if FORMAT == "int4":
                    if 32 * d % GROUP == 0:
                        index = (block * 128 + 32 * d) // GROUP
                        end = blocks * 128 // GROUP
                        scale = _scales(scale_rows, index, end, scale_stride, EVEN)
                        minus_zero = 0xC308C308
                        if zero_rows is not None:
                            zero = _scales(zero_rows, index, end, scale_stride, EVEN)
                            minus_zero = (zero.to(tl.uint32) + 0xC300) * 0x00010001
                        group_sum = tl.zeros_like(y)
                    pair = integer_pair(words, d)
                    term = tl.zeros_like(pair) + minus_zero
                    group_sum = multiply_add(plus(pair, term, PACKED), x, group_sum)
                    if 32 * (d + 1) % GROUP == 0 or d == 3:
                        y += group_sum * scale.to(tl.float32)
                else:
                    factor = tl.broadcast_to(scale_pairs(scales, d, FORMAT), words.shape)
                    y = multiply_add(times(float_pair(words, d), factor, PACKED), x, y)
    return y
