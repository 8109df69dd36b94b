"""Products of sorted (token, slot) pairs in e4m3 with their experts' e4m3 weights, block by block.

As grouped_gemm.py, on the matrix instruction for e4m3: scales as in scaled_gemm.py, and so the sums
of Hopper's instruction. Weights come by the copy engine from one matrix of all experts' rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from quire.kernels.reference.moe.align import Aligned
from quire.kernels.triton.gemm.epilogue import activate
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.quantized.grouped_gemm import GROUP_BLOCKS
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.kernels.triton.quantized.quantize import QuantizedTokens
from quire.kernels.triton.quantized.scaled_gemm import DEPTH, multiply_e4m3


@dataclass(frozen=True)
class GroupedTile:
    """`tokens` by `rows` of the weight, a gated one's half gate and half up. `weight_tall`: the
    weight fills the tall side of the matrix instruction (64) and the tokens its narrow one."""

    tokens: int
    rows: int
    warps: int
    stages: int
    programs_per_sm: int
    weight_tall: bool = False


@triton.jit
def _add(
    sums, x, x_scale, weight, row, start, weight_scales, scale_at,
    BLOCKWISE: tl.constexpr, EXACT: tl.constexpr, WEIGHT_TALL: tl.constexpr,
):  # fmt: skip
    """sums + x weight^T over 128 columns from `start`, or its transpose."""
    w = weight.load([row, start])
    if BLOCKWISE:
        scale = x_scale * tl.load(weight_scales + scale_at)
        zeros = tl.zeros_like(sums)
        if WEIGHT_TALL:
            sums += multiply_e4m3(w, x, zeros, False) * scale[None, :]
        else:
            sums += multiply_e4m3(x, w, zeros, False) * scale[:, None]
    elif WEIGHT_TALL:
        sums = multiply_e4m3(w, x, sums, EXACT)
    else:
        sums = multiply_e4m3(x, w, sums, EXACT)
    return sums


@triton.jit
def _finish(
    sums, x_scale, weight_scales, bias, row, BLOCKWISE: tl.constexpr, WEIGHT_TALL: tl.constexpr
):
    """The product [T, rows] in float32, of the weight's rows `row` int64."""
    y = sums.T if WEIGHT_TALL else sums
    if not BLOCKWISE:
        y = y * x_scale[:, None] * tl.load(weight_scales + row)[None, :]
    if bias is not None:
        y += tl.load(bias + row)[None, :]
    return y


@triton.jit(do_not_specialize=["max_blocks", "x_rows"])
def scaled_grouped_kernel(
    x, x_scales, weight, weight_scales, bias, out, pairs, experts, starts, ends, count,
    max_blocks, x_rows, n, k, blocks, row_blocks,
    SLOTS: tl.constexpr, FROM_TOKENS: tl.constexpr, X_MAP: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, WEIGHT_TALL: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    BLOCKWISE: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr,
    LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`n`: columns of out; `count`: how many blocks of pairs there are; `blocks` and `row_blocks`:
    of 128 columns and rows of an expert's weight. `weight`, and x with X_MAP, are descriptors."""
    let_next_start(PDL)
    WIDTH: tl.constexpr = ROWS if KIND == "" else ROWS // 2
    tiles = tl.cdiv(n, WIDTH)
    group_first = tl.program_id(0) // (GROUP_BLOCKS * tiles) * GROUP_BLOCKS
    group_size = tl.minimum(max_blocks - group_first, GROUP_BLOCKS)
    within = tl.program_id(0) % (GROUP_BLOCKS * tiles)
    block = group_first + within % group_size
    first = within // group_size * WIDTH
    wait_for_inputs(PDL)
    # Asked for at once, since each takes as long as several steps; used where there is a block.
    blocks_used = tl.load(count)
    expert = tl.load(experts + block)
    position_first = tl.load(starts + block)
    position_end = tl.load(ends + block)
    if block >= blocks_used:
        return
    position = position_first + tl.arange(0, T)
    inside = position < position_end
    pair = tl.load(pairs + position, mask=inside, other=0)
    x_row = pair // SLOTS if FROM_TOKENS else position
    depth = tl.arange(0, 128)
    height = n if KIND == "" else 2 * n
    row = expert * height + first
    scale_first = expert * blocks * row_blocks
    y = tl.zeros((WIDTH, T) if WEIGHT_TALL else (T, WIDTH), tl.float32)
    up = y
    x_scale = tl.zeros([T], tl.float32)
    if not X_MAP:
        x_pointers = x + x_row.to(tl.int64)[:, None] * k + depth[None, :]
    for start in range(0, k, 128):
        if X_MAP:  # rows past the block's last are another expert's, and are not stored
            part = x.load([position_first, start])
        elif EVEN:
            part = tl.load(x_pointers + start, mask=inside[:, None], other=0.0)
        else:
            there = inside[:, None] & (start + depth < k)[None, :]
            part = tl.load(x_pointers + start, mask=there, other=0.0)
        scale_at = scale_first + start // 128 * row_blocks
        if BLOCKWISE:
            scales_of_block = x_scales + tl.cast(start // 128, tl.int64) * x_rows
            x_scale = tl.load(scales_of_block + x_row, mask=inside, other=0.0)
        # A tile, or its half, lies within one block of the weight's rows.
        y = _add(
            y, part, x_scale, weight, row, start, weight_scales, scale_at + first // 128,
            BLOCKWISE, EXACT, WEIGHT_TALL,
        )  # fmt: skip
        if KIND != "":
            up = _add(
                up, part, x_scale, weight, row + n, start, weight_scales,
                scale_at + (n + first) // 128, BLOCKWISE, EXACT, WEIGHT_TALL,
            )  # fmt: skip
    if not BLOCKWISE:
        x_scale = tl.load(x_scales + x_row, mask=inside, other=0.0)
    column = first + tl.arange(0, WIDTH)
    row_64 = expert.to(tl.int64) * height + tl.minimum(column, n - 1)
    y = _finish(y, x_scale, weight_scales, bias, row_64, BLOCKWISE, WEIGHT_TALL)
    if KIND != "":
        up = _finish(up, x_scale, weight_scales, bias, row_64 + n, BLOCKWISE, WEIGHT_TALL)
        y = activate(y, up, KIND, LIMIT)
    out_row = position if FROM_TOKENS else pair
    target = out + out_row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(target, y.to(out.dtype.element_ty), mask=inside[:, None] & (column < n)[None, :])


def _check(
    x: QuantizedTokens, weight: PackedQuantized, aligned: Aligned, tile: GroupedTile, kind: str
) -> None:
    rows, k = x.codes.shape
    if tile.tokens != aligned.block:
        raise ValueError(f"tile: {tile.tokens} tokens for blocks of {aligned.block}")
    if weight.format not in ("fp8", "fp8_block") or weight.experts is None:
        raise ValueError(f"weight: {weight.format} is no stack of fp8 or fp8_block")
    if x.codes.dtype != torch.float8_e4m3fn or k != weight.k or not x.codes.is_contiguous():
        raise ValueError(f"codes: expected contiguous float8_e4m3fn [., {weight.k}]")
    shape = (rows,) if weight.format == "fp8" else (weight.blocks, rows)
    if tuple(x.scales.shape) != shape or not x.scales.is_contiguous():
        raise ValueError(f"scales: expected contiguous {list(shape)}")
    if weight.format == "fp8_block":
        width = tile.rows // (1 if kind == "" else 2)
        if DEPTH % width or (kind != "" and weight.n // 2 % DEPTH):
            raise ValueError(f"tile: {width} of {weight.n} rows cut blocks of {DEPTH}")


def scaled_grouped_gemm(
    x: QuantizedTokens,
    weight: PackedQuantized,
    aligned: Aligned,
    tile: GroupedTile,
    *,
    kind: str = "",
    limit: float = 0.0,
    bias: torch.Tensor | None = None,
    from_tokens: bool,
    dtype: torch.dtype = torch.bfloat16,
    exact: bool = False,
) -> torch.Tensor:
    """Every pair's row times its expert's weight, plus its bias, [T * K, N] in `dtype`.

    `from_tokens` and the order of rows as in moe.grouped_gemm; x as quantize gives it: with a scale
    per token for fp8, per 128 columns for fp8_block; `weight` [E, N, C], with a `kind` [E, 2 N, C],
    gate rows first; `bias` float32 [E, rows]. `exact`: float32 sums for fp8, see scaled_gemm.py.
    Sums run over C from its start to its end; a row's bits depend on nothing but the row, the
    weight and the tile. `tile.tokens` must be `aligned.block`. Raises ValueError for what does not
    fit together.
    """
    _check(x, weight, aligned, tile, kind)
    (rows, k), device = x.codes.shape, x.codes.device
    pairs, max_blocks = aligned.pairs.shape[0], aligned.experts.shape[0]
    gated = kind != ""
    n, width = weight.n // (1 + gated), tile.rows // (1 + gated)
    out = torch.empty((pairs, n), dtype=dtype, device=device)
    if not pairs:
        return out
    blockwise = weight.format == "fp8_block"
    weight_scales = weight.scales if blockwise else weight.row_scales
    assert weight_scales is not None
    values = weight.codes.view(torch.float8_e4m3fn).flatten(0, 1)
    # Rows of tokens lie scattered, which the copy engine cannot gather before Blackwell.
    x_map = not from_tokens and k % 16 == 0 and x.codes.data_ptr() % 16 == 0
    launch(
        scaled_grouped_kernel,
        (max_blocks * triton.cdiv(n, width),),
        device,
        TensorDescriptor.from_tensor(x.codes, [tile.tokens, DEPTH]) if x_map else x.codes,
        x.scales,
        TensorDescriptor.from_tensor(values, [width, DEPTH]),
        weight_scales,
        bias,
        out,
        aligned.pairs,
        aligned.experts,
        aligned.starts,
        aligned.ends,
        aligned.blocks,
        max_blocks,
        rows,
        n,
        k,
        weight.blocks,
        weight_scales.shape[-1],
        SLOTS=aligned.experts_per_token,
        FROM_TOKENS=from_tokens,
        X_MAP=x_map,
        T=tile.tokens,
        ROWS=tile.rows,
        WEIGHT_TALL=tile.weight_tall,
        GROUP_BLOCKS=GROUP_BLOCKS,
        BLOCKWISE=blockwise,
        EXACT=exact,
        EVEN=k % DEPTH == 0,
        KIND=kind,
        LIMIT=limit,
        num_warps=tile.warps,
        num_stages=tile.stages,
        # So many that the registers are enough for the programs.
        maxnreg=min(255, 65536 // (tile.programs_per_sm * tile.warps * 32)),
    )
    return out
