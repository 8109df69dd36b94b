"""Products of quantised weights with any number of tokens, each row with the same bits in all.

y^T = W x^T: a tile of the weight is decoded in the registers from which the matrix instruction
takes it, and the tokens are its other operand. An element of y is one sum over K, block by block in
an order that is the format's, group by group where the format has scales that are multiplied into
sums (products.py), on one instruction whose depth is 16; the tile's width in tokens decides which
other elements the same instructions compute, and no sum. K is never split, and rows of the weight
are always 64 a warp group. So deterministic mode uses it for every number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quire.kernels.triton.gemm.epilogue import store_product, weight_rows
from quire.kernels.triton.gemm.prefetch import prefetch_rows
from quire.kernels.triton.gemm.shared import shared_memory
from quire.kernels.triton.launch import launch, let_next_start, num_sms, wait_for_inputs
from quire.kernels.triton.quantized.operands import ahead, check_linear, format_of, instructions
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.kernels.triton.quantized.products import sum_products
from quire.kernels.triton.rows import row_stride

# Tiles of tokens that run through all rows of the weight together: their tokens stay in L2.
GROUP_TOKENS = 16


@dataclass(frozen=True)
class QuantizedTile:
    """`rows` of the weight (gate and up together) by `tokens`, `blocks` of 128 columns a step."""

    rows: int
    tokens: int
    blocks: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["tokens"])
def quantized_gemm_kernel(
    x, codes, scales, row_scales, zeros, bias, out, tokens, n, k, blocks, x_stride, code_stride,
    scale_stride, out_stride,
    T: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, GROUP_TOKENS: tl.constexpr,
    AHEAD: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PACKED: tl.constexpr, CAST: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`n`: columns of out; `code_stride`, `scale_stride`: see sum_products. AHEAD: elements of
    each row of codes to fetch before the inputs are there."""
    let_next_start(PDL)
    WIDTH: tl.constexpr = ROWS if ACTIVATION == "" else ROWS // 2
    row_tiles = tl.cdiv(n, WIDTH)
    token_tiles = tl.cdiv(tokens, T)
    group_first = tl.program_id(0) // (GROUP_TOKENS * row_tiles) * GROUP_TOKENS
    group_size = tl.minimum(token_tiles - group_first, GROUP_TOKENS)
    within = tl.program_id(0) % (GROUP_TOKENS * row_tiles)
    first_token = (group_first + within % group_size) * T
    first = within // group_size * WIDTH
    rows = weight_rows(first, n, ROWS, ACTIVATION)
    if PDL and AHEAD > 0:
        prefetch_rows(codes, rows.to(tl.int64), 0, code_stride, AHEAD)
    wait_for_inputs(PDL)
    token = first_token + tl.arange(0, T)
    scale_rows = scales
    if scales is not None:
        scale_row = rows // 128 if FORMAT == "fp8_block" else rows
        scale_rows = scales + scale_row[:, None]
    y = sum_products(
        tl.zeros([ROWS, T], tl.float32),
        x + (token.to(tl.int64) * x_stride)[None, :],
        (token < tokens)[None, :],
        k,
        codes + (rows.to(tl.int64) * code_stride)[:, None],
        scale_rows,
        None if zeros is None else zeros + rows[:, None],
        scale_stride,
        tl.full([1, 1], 0, tl.int32),
        blocks,
        FORMAT, GROUP, BLOCKS, 1, EVEN, PACKED, CAST,
    )  # fmt: skip
    if row_scales is not None:
        y *= tl.load(row_scales + rows)[:, None]
    store_product(
        tl.trans(y), bias, rows, out + first_token.to(tl.int64) * out_stride, first,
        tokens - first_token, n, out_stride, T, ROWS, ACTIVATION, LIMIT,
    )  # fmt: skip


def quantized_tile(
    tokens: int, n: int, format: str, group: int, shared: int, deterministic: bool = True
) -> QuantizedTile:
    """The tile for a weight of n rows. `shared`: bytes of shared memory a program may have.

    `deterministic`: one block of K in a step whatever the width, since the columns of two blocks
    take turns in their sum (products.py).

    Wide tiles of tokens, since a tile of the weight is decoded again for each. Formats whose
    scales are multiplied into sums hold a second sum while they do, and have half the width.
    Estimates until measured with benchmarks/gpu/quantized.py.
    """
    summed = format in ("int4", "int8", "fp8_block")
    eight = format in ("fp8", "fp8_block", "int8")
    width = next((w for w in (16, 32, 64) if tokens <= w), 64 if summed else 128)
    rows = 64 if tokens <= 64 else 128
    two = format in ("nvfp4", "mxfp4") and width == 16 and not deterministic
    blocks = 2 if two else 1
    # Two programs on a multiprocessor, where there is memory for two stages of each.
    for room in (min(shared, 114688), shared):
        stage = int(blocks * 128 * (width * 2 + rows * (1 if eight else 0.625)))
        stages = min(4, (room - 4096) // stage)
        if stages >= 2:
            return QuantizedTile(rows, width, blocks, rows // 16, stages)
    return QuantizedTile(64, 32, 1, 4, 2)


def quantized_gemm(
    x_TK: torch.Tensor,
    weight: PackedQuantized,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    kind: str = "",
    limit: float = 0.0,
    deterministic: bool = True,
    tile: QuantizedTile | None = None,
) -> torch.Tensor:
    """x W^T + bias, [T, N] bfloat16, or with a `kind` the activation of gate and up, [T, N / 2].

    Operands as in `skinny`, with any number of tokens. `deterministic`: a row's bits depend on
    nothing but the row and the weight; otherwise few tokens may be faster. `tile`: another than
    quantized_tile's.
    """
    out = check_linear(x_TK, weight, bias, out, kind)
    (tokens, n), device = out.shape, x_TK.device
    if tokens == 0 or n == 0:
        return out
    tile = tile or quantized_tile(
        tokens, weight.n, weight.format, weight.group, shared_memory(device), deterministic
    )
    width = tile.rows // (1 if kind == "" else 2)
    few = tokens <= tile.tokens and triton.cdiv(n, width) <= 8 * num_sms(device)
    launch(
        quantized_gemm_kernel,
        (triton.cdiv(tokens, tile.tokens) * triton.cdiv(n, width),),
        device,
        x_TK,
        weight.codes,
        weight.scales,
        weight.row_scales,
        weight.zeros,
        bias,
        out,
        tokens,
        n,
        weight.k,
        weight.blocks,
        row_stride(x_TK, "x"),
        weight.codes.shape[-1],
        0 if weight.scales is None else weight.scales.shape[-1],
        row_stride(out, "out"),
        T=tile.tokens,
        ROWS=tile.rows,
        BLOCKS=tile.blocks,
        GROUP_TOKENS=GROUP_TOKENS,
        AHEAD=ahead(weight, tile.blocks * (tile.stages - 1)) if few else 0,
        EVEN=weight.k % (128 * tile.blocks) == 0,
        ACTIVATION=kind,
        LIMIT=limit,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **format_of(weight),
        **instructions(device),
    )
    return out
