"""Quantised weights as bfloat16 in memory, for products of so many tokens that decoding them once
and multiplying with cuBLAS takes less time than decoding them for every tile of tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.quantized.decode import (
    float_pair,
    int8_values,
    integer_pair,
    plus,
    scale_pairs,
    times,
)
from quire.kernels.triton.quantized.operands import format_of, instructions
from quire.kernels.triton.quantized.pack import PackedQuantized

FORMATS = ("nvfp4", "mxfp4", "int4", "int8")
ROWS = 32


@triton.jit
def widen_kernel(
    codes, scales, row_scales, zeros, out, n, k, code_stride, scale_stride,
    ROWS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr,
    CAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block of 128 columns of ROWS rows."""
    let_next_start(PDL)
    block = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    read = tl.minimum(row, n - 1)
    code_rows = codes + read.to(tl.int64) * code_stride
    out_rows = out + row.to(tl.int64) * k
    factor = 1.0
    if row_scales is not None:
        factor = tl.load(row_scales + read)
    # What is written may have been another layer's, which is still read until then.
    wait_for_inputs(PDL)
    if FORMAT == "int8":
        column = block * 128 + tl.arange(0, 128)[None, :]
        scale_at = column // GROUP * scale_stride + read
        zero = tl.zeros([ROWS, 128], tl.float32) + 128.0
        if zeros is not None:
            zero = tl.load(zeros + scale_at).to(tl.float32)
        values = int8_values(tl.load(code_rows + column), zero).to(tl.float32)
        values *= tl.load(scales + scale_at).to(tl.float32)
        inside = (row < n) & (column < k)
        tl.store(out_rows + column, values.to(out.dtype.element_ty), mask=inside)
    else:
        word = tl.arange(0, 16)[None, :]
        words = tl.load(code_rows + block * 16 + word).to(tl.uint32, bitcast=True)
        if FORMAT != "int4":
            by_block = tl.load(scales + block * scale_stride + read)
        for d in tl.static_range(4):
            if FORMAT == "int4":
                scale_at = (block * 128 + 32 * d) // GROUP * scale_stride + read
                minus_zero = tl.zeros([ROWS, 1], tl.uint32) + 0xC308C308
                if zeros is not None:
                    zero = tl.load(zeros + scale_at).to(tl.uint32)
                    minus_zero = (zero + 0xC300) * 0x00010001
                term = tl.broadcast_to(minus_zero, words.shape)
                values = plus(integer_pair(words, d), term, PACKED)
                factor = tl.load(scales + scale_at).to(tl.float32)
            else:
                values = times(float_pair(words, d), scale_pairs(by_block, d, FORMAT), PACKED)
            column = block * 128 + 32 * d + tl.arange(0, 32)[None, :]
            values = (values.to(tl.float32) * factor).to(out.dtype.element_ty)
            tl.store(out_rows + column, values, mask=(row < n) & (column < k))


def widen(weight: PackedQuantized) -> torch.Tensor:
    """The values of a weight in one of FORMATS, bfloat16 [N, K], each rounded once."""
    assert weight.format in FORMATS and weight.scales is not None and weight.experts is None
    n, k, device = weight.n, weight.k, weight.codes.device
    out = torch.empty((n, k), dtype=torch.bfloat16, device=device)
    launch(
        widen_kernel,
        (triton.cdiv(n, ROWS), weight.blocks),
        device,
        weight.codes,
        weight.scales,
        weight.row_scales,
        weight.zeros,
        out,
        n,
        k,
        weight.codes.shape[-1],
        weight.scales.shape[-1],
        ROWS=ROWS,
        num_warps=4,
        **format_of(weight),
        **instructions(device),
    )
    return out
