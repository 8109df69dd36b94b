"""Products of sorted (token, slot) pairs with their experts' quantised weights, block by block.

As quire.kernels.triton.moe.grouped_gemm, with the weight on the tall side of the matrix
instruction and decoded in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.reference.moe.align import Aligned
from quire.kernels.triton.gemm.epilogue import activate, weight_rows
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.quantized.experts_small import pieces, scale_offset, strides
from quire.kernels.triton.quantized.gemm import QuantizedTile
from quire.kernels.triton.quantized.operands import format_of, instructions
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.kernels.triton.quantized.products import sum_products

# Blocks that run through all rows of their weights together, see moe/grouped_gemm.py.
GROUP_BLOCKS = 8


@triton.jit(do_not_specialize=["max_blocks"])
def quantized_grouped_kernel(
    x, codes, scales, row_scales, zeros, bias, out, pairs, experts, starts, ends, count,
    max_blocks, n, k, blocks, code_stride, scale_stride, groups,
    SLOTS: tl.constexpr, FROM_TOKENS: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, GROUP_BLOCKS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, PACKED: tl.constexpr, CAST: tl.constexpr, KIND: tl.constexpr,
    LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`n`: columns of out; `count`: how many blocks of pairs there are; `blocks`: of K."""
    let_next_start(PDL)
    WIDTH: tl.constexpr = ROWS if KIND == "" else ROWS // 2
    tiles = tl.cdiv(n, WIDTH)
    group_first = tl.program_id(0) // (GROUP_BLOCKS * tiles) * GROUP_BLOCKS
    group_size = tl.minimum(max_blocks - group_first, GROUP_BLOCKS)
    within = tl.program_id(0) % (GROUP_BLOCKS * tiles)
    block = group_first + within % group_size
    first = within // group_size * WIDTH
    wait_for_inputs(PDL)
    if block >= tl.load(count):
        return
    expert = tl.load(experts + block)
    position = tl.load(starts + block) + tl.arange(0, T)
    inside = position < tl.load(ends + block)
    pair = tl.load(pairs + position, mask=inside, other=0)
    rows = weight_rows(first, n, ROWS, KIND)
    height = n if KIND == "" else 2 * n
    row_64 = expert.to(tl.int64) * height + rows
    scale_at = scale_offset(expert, rows, groups, scale_stride, FORMAT)[:, None]
    scale_rows = scales
    zero_rows = zeros
    if scales is not None:
        scale_rows = scales + scale_at
    if zeros is not None:
        zero_rows = zeros + scale_at
    x_row = pair // SLOTS if FROM_TOKENS else position
    y = sum_products(
        tl.zeros([ROWS, T], tl.float32),
        x + (x_row.to(tl.int64) * k)[None, :],
        inside[None, :],
        k, codes + (row_64 * code_stride)[:, None], scale_rows, zero_rows, scale_stride,
        tl.full([1, 1], 0, tl.int32), blocks, FORMAT, GROUP, BLOCKS, 1, EVEN, PACKED, CAST,
    )  # fmt: skip
    if row_scales is not None:
        y *= tl.load(row_scales + row_64)[:, None]
    if bias is not None:
        y += tl.load(bias + row_64)[:, None]
    y = tl.trans(y)
    if KIND != "":
        gate, up = tl.split(tl.permute(tl.reshape(y, (T, 2, WIDTH)), (0, 2, 1)))
        y = activate(gate, up, KIND, LIMIT)
    out_row = position if FROM_TOKENS else pair
    column = first + tl.arange(0, WIDTH)
    target = out + out_row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(target, y.to(out.dtype.element_ty), mask=inside[:, None] & (column < n)[None, :])


def quantized_grouped_gemm(
    x: torch.Tensor,
    weight: PackedQuantized,
    aligned: Aligned,
    tile: QuantizedTile,
    *,
    kind: str = "",
    limit: float = 0.0,
    bias: torch.Tensor | None = None,
    from_tokens: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Every pair's row times its expert's weight, plus its bias, [T * K, N] in `dtype` (bfloat16).

    `from_tokens` and the order of rows as in moe.grouped_gemm; x bfloat16, contiguous; `weight`
    [E, N, C], with a `kind` [E, 2 N, C], gate rows first; `bias` float32 [E, rows]. Sums are in
    float32 over C from its start to its end, and rounded once. `tile.tokens` must be
    `aligned.block`. Raises ValueError for what does not fit together.
    """
    if tile.tokens != aligned.block:
        raise ValueError(f"tile: {tile.tokens} tokens for blocks of {aligned.block}")
    if x.shape[1] != weight.k or x.dtype != torch.bfloat16 or not x.is_contiguous():
        raise ValueError(f"x: expected contiguous bfloat16 [., {weight.k}]")
    pairs, max_blocks = aligned.pairs.shape[0], aligned.experts.shape[0]
    n = weight.n if kind == "" else weight.n // 2
    out = torch.empty((pairs, n), dtype=dtype or x.dtype, device=x.device)
    width = tile.rows // (1 if kind == "" else 2)
    launch(
        quantized_grouped_kernel,
        (max_blocks * triton.cdiv(n, width),),
        x.device,
        x,
        *pieces(weight),
        bias,
        out,
        aligned.pairs,
        aligned.experts,
        aligned.starts,
        aligned.ends,
        aligned.blocks,
        max_blocks,
        n,
        weight.k,
        *strides(weight),
        SLOTS=aligned.experts_per_token,
        FROM_TOKENS=from_tokens,
        T=tile.tokens,
        ROWS=tile.rows,
        BLOCKS=tile.blocks,
        GROUP_BLOCKS=GROUP_BLOCKS,
        EVEN=weight.k % (128 * tile.blocks) == 0,
        KIND=kind,
        LIMIT=limit,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **format_of(weight),
        **instructions(x.device),
    )
    return out
