"""Products of sorted (token, slot) pairs with their experts' weights, a block of pairs at a time.

Expert parallelism over weights as in MegaBlocks (Gale et al. 2023): a program multiplies one
block's rows with one tile of its expert's weight.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from quire.kernels.reference.moe.align import Aligned
from quire.kernels.triton.gemm.epilogue import activate
from quire.kernels.triton.launch import INTERPRETED, launch, let_next_start, wait_for_inputs
from quire.kernels.triton.moe.operands import check_kind
from quire.kernels.triton.moe.tiles import Tile, has_tensor_maps

# Triton's interpreter multiplies the bit patterns of bfloat16 values.
WIDEN = tl.constexpr(INTERPRETED)
# Programs that run at the same time share blocks and weights in the L2 cache: they take GROUP
# blocks (at 8,192 tokens of 128 experts: one expert's five and some of the next) through all
# columns before the next GROUP.
GROUP = 8


@triton.jit
def _multiply(x, weight, sums, WEIGHT_TALL: tl.constexpr):
    """sums + x weight^T, or its transpose."""
    if WIDEN:
        x, weight = x.to(tl.float32), weight.to(tl.float32)
    if WEIGHT_TALL:
        sums = tl.dot(weight, x.T, sums, input_precision="ieee")
    else:
        sums = tl.dot(x, weight.T, sums, input_precision="ieee")
    return sums


@triton.jit
def weight_tile(
    weight,
    expert,
    row,
    k,
    N: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TENSOR_MAP: tl.constexpr,
):
    """Rows row.. and elements k.. of an expert's weight [N, K], as [COLUMNS, DEPTH] values to
    multiply with; zero past K, anything past N. All that knows how weights are stored: another
    format adds its case here, with its scales beside `weight`."""
    if TENSOR_MAP:
        tile = weight.load([expert * N + row, k])
    else:
        n = row + tl.arange(0, COLUMNS)
        offset = (expert.to(tl.int64) * N + n) * K
        depth = k + tl.arange(0, DEPTH)
        pointers = weight + offset[:, None] + depth[None, :]
        if K % DEPTH == 0:
            tile = tl.load(pointers, mask=(n < N)[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=(n < N)[:, None] & (depth < K)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=["max_blocks"])
def grouped_gemm_kernel(
    x,
    weight,
    out_ptr,
    pairs_ptr,
    experts_ptr,
    starts_ptr,
    ends_ptr,
    blocks_ptr,
    max_blocks,
    N: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    KIND: tl.constexpr,
    LIMIT: tl.constexpr,
    FROM_TOKENS: tl.constexpr,
    X_MAP: tl.constexpr,
    WEIGHT_MAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WEIGHT_TALL: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    group_first = tl.program_id(0) // (GROUP * tiles) * GROUP
    group_blocks = tl.minimum(max_blocks - group_first, GROUP)
    within = tl.program_id(0) % (GROUP * tiles)
    block = group_first + within % group_blocks
    column = within // group_blocks * COLUMNS
    wait_for_inputs(PDL)
    if block >= tl.load(blocks_ptr):
        return

    expert = tl.load(experts_ptr + block)
    start = tl.load(starts_ptr + block)
    end = tl.load(ends_ptr + block)
    position = start + tl.arange(0, ROWS)
    inside = position < end
    pair = tl.load(pairs_ptr + position, mask=inside, other=0)
    depth = tl.arange(0, DEPTH)
    row = pair // SLOTS if FROM_TOKENS else position
    if not X_MAP:
        x_ptrs = x + row.to(tl.int64)[:, None] * K + depth[None, :]

    sums = tl.zeros((COLUMNS, ROWS) if WEIGHT_TALL else (ROWS, COLUMNS), tl.float32)
    up_sums = sums
    weight_n: tl.constexpr = N if KIND is None else 2 * N
    for k in range(0, K, DEPTH):
        if X_MAP:
            a = x.load([start, k])
        elif K % DEPTH == 0:
            a = tl.load(x_ptrs + k, mask=inside[:, None], other=0.0)
        else:
            a = tl.load(x_ptrs + k, mask=inside[:, None] & (k + depth < K)[None, :], other=0.0)
        b = weight_tile(weight, expert, column, k, weight_n, K, COLUMNS, DEPTH, WEIGHT_MAP)
        sums = _multiply(a, b, sums, WEIGHT_TALL)
        if KIND is not None:
            b = weight_tile(weight, expert, N + column, k, weight_n, K, COLUMNS, DEPTH, WEIGHT_MAP)
            up_sums = _multiply(a, b, up_sums, WEIGHT_TALL)

    if KIND is not None:
        sums = activate(sums, up_sums, KIND, LIMIT)
    if WEIGHT_TALL:
        sums = sums.T
    out_row = position if FROM_TOKENS else pair
    columns = column + tl.arange(0, COLUMNS)
    out_ptrs = out_ptr + out_row.to(tl.int64)[:, None] * N + columns[None, :]
    inside_out = inside[:, None] & (columns < N)[None, :]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=inside_out)


def _tensor_map(matrix: torch.Tensor, block: list[int]) -> Any:
    """`matrix` [R, C] for the copy engine in pieces of `block`; None where it cannot read it."""
    row_bytes = matrix.shape[1] * matrix.element_size()
    if row_bytes % 16 or matrix.data_ptr() % 16 or not has_tensor_maps(matrix.device):
        return None
    return TensorDescriptor.from_tensor(matrix, block)


def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    aligned: Aligned,
    tile: Tile,
    *,
    kind: str | None = None,
    limit: float = 0.0,
    from_tokens: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Every pair's row times its expert's weight, [T * K, N] in `dtype` (default: x's).

    `from_tokens`: x [T, C] has a row for each token, and the result's rows are the sorted
    positions of `aligned`. Otherwise x [T * K, C] has a row for each sorted position, and the
    result's rows are the pairs in token order. So the first product writes what the second reads
    in runs. `weight` [E, N, C]; with `kind` ("silu", "gelu_tanh") it is [E, 2 N, C], gate rows
    first, and the result is act(gate) * up, with `limit` as in gated_activation.

    x and weight contiguous, both bfloat16, float16 or float32. Sums are in float32 over C from
    its start to its end, and rounded once. `tile.rows` must be `aligned.block`. Raises ValueError
    for what does not fit together.
    """
    if kind is not None:
        check_kind(kind)
    if tile.rows != aligned.block:
        raise ValueError(f"tile: {tile.rows} rows for blocks of {aligned.block}")
    experts, weight_rows, k = weight.shape
    if x.shape[1] != k or x.dtype != weight.dtype:
        raise ValueError(
            f"x: {x.dtype} [., {x.shape[1]}] does not fit weight {weight.dtype} [., ., {k}]"
        )
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError("x and weight: must be contiguous")
    pairs, max_blocks = aligned.pairs.shape[0], aligned.experts.shape[0]
    n = weight_rows if kind is None else weight_rows // 2
    out = torch.empty((pairs, n), dtype=dtype or x.dtype, device=x.device)
    if not pairs:
        return out
    weight_2d = weight.view(experts * weight_rows, k)
    weight_map = _tensor_map(weight_2d, [tile.columns, tile.depth])
    # Rows of tokens lie scattered, which the copy engine cannot gather before Blackwell.
    x_map = None if from_tokens else _tensor_map(x, [tile.rows, tile.depth])
    launch(
        grouped_gemm_kernel,
        (max_blocks * triton.cdiv(n, tile.columns),),
        x.device,
        x if x_map is None else x_map,
        weight if weight_map is None else weight_map,
        out,
        aligned.pairs,
        aligned.experts,
        aligned.starts,
        aligned.ends,
        aligned.blocks,
        max_blocks,
        N=n,
        K=k,
        SLOTS=aligned.experts_per_token,
        KIND=kind,
        LIMIT=limit,
        FROM_TOKENS=from_tokens,
        X_MAP=x_map is not None,
        WEIGHT_MAP=weight_map is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        WEIGHT_TALL=tile.weight_tall,
        GROUP=GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
