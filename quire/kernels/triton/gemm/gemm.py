"""The GEMM whose bits depend on nothing but a row and the weight: y = x W^T + bias.

Deterministic mode uses it for every number of tokens. An element of y is the sum over K in steps
of the matrix instruction's own depth (16 values of 16 bits on Hopper's wgmma), in ascending
order, each step adding to the sum before it in one float32 register. Nothing in that chain
depends on the tile: the tile's height and width only say which other elements are computed by
the same instructions, wgmma's own width (8 to 256 columns) likewise, and pipelining only moves
loads. So height and width may follow the number of tokens, while the chain is fixed: BLOCK_K is
one constant, K is never split, and heights are multiples of 64, which Hopper gives to wgmma and
never to mma.sync, whose rounding may differ. Rows past the last token and columns past K are
zeros or repeated rows, and adding zero products changes no sum.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from quire.kernels.triton.gemm.epilogue import activate, weight_rows
from quire.kernels.triton.gemm.gemm_tiles import GemmTiles, block_k, gemm_tiles
from quire.kernels.triton.gemm.multiply import multiply_add
from quire.kernels.triton.gemm.operands import check_operands
from quire.kernels.triton.gemm.prefetch import prefetch_rows
from quire.kernels.triton.gemm.shared import is_hopper, shared_memory
from quire.kernels.triton.launch import launch, let_next_start, num_sms, wait_for_inputs
from quire.kernels.triton.rows import row_stride, rows_with_room

# Columns of a weight's rows to fetch before the inputs are there: two to four 128-byte lines.
AHEAD = 256


@triton.jit
def _rows(matrix, rows, first_column, columns, stride, COLUMNS: tl.constexpr):
    """Some rows (int64) of a matrix as a tile, zero past its columns."""
    column = first_column + tl.arange(0, COLUMNS)
    pointers = matrix + rows[:, None] * stride + column[None, :]
    return tl.load(pointers, mask=(column < columns)[None, :], other=0.0)


@triton.jit
def _store(
    out, y, first_row, first_column, rows, columns, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if TMA:
        out.store([first_row, first_column], y.to(out.dtype))
    else:
        row = first_row + tl.arange(0, ROWS)
        column = first_column + tl.arange(0, COLUMNS)
        pointers = out + row.to(tl.int64)[:, None] * stride + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(pointers, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _halves(y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(y, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["tokens"])
def gemm_kernel(
    x, weight, out, weight_data, bias, tokens, n, k, x_stride, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    AHEAD: tl.constexpr, HALVES: tl.constexpr, TMA: tl.constexpr, STORE_TMA: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`x` and `weight` are descriptors with TMA and `out` with STORE_TMA, else pointers;
    `weight_data` is a pointer.
    `n`: columns of out. BLOCK_N: rows of the weight in a tile, those of gate and up together.
    AHEAD: columns of the weight to fetch before the inputs are there. HALVES: the tile is stored
    in two parts, which halves the shared memory that takes."""
    let_next_start(PDL)
    WIDTH: tl.constexpr = BLOCK_N if ACTIVATION == "" else BLOCK_N // 2
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(n, WIDTH)
    if PDL and AHEAD > 0:
        # With so few tokens that this pays, there is one row of tiles.
        soon = weight_rows(tl.program_id(0) * WIDTH, n, BLOCK_N, ACTIVATION)
        prefetch_rows(weight_data, soon.to(tl.int64), 0, k, AHEAD)
    wait_for_inputs(PDL)
    group_size = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=TMA):
        # Neighbouring programs share rows of x and of the weight in L2.
        group_first = tile // group_size * GROUP_M
        group_m = tl.minimum(tiles_m - group_first, GROUP_M)
        m = (group_first + tile % group_size % group_m) * BLOCK_M
        first = tile % group_size // group_m * WIDTH
        w_rows = weight_rows(first, n, BLOCK_N, ACTIVATION)
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, k, BLOCK_K):
            if TMA:
                x_part = x.load([m, start])
                if ACTIVATION == "":
                    w_part = weight.load([first, start])
                else:
                    # [2, I, K]: the same rows of gate and of up.
                    w_part = tl.reshape(weight.load([0, first, start]), (BLOCK_N, BLOCK_K))
            else:
                x_rows = tl.minimum(m + tl.arange(0, BLOCK_M), tokens - 1).to(tl.int64)
                x_part = _rows(x, x_rows, start, k, x_stride, BLOCK_K)
                w_part = _rows(weight, w_rows.to(tl.int64), start, k, k, BLOCK_K)
            y = multiply_add(x_part, w_part.T, y)
        if bias is not None:
            y += tl.load(bias + w_rows)[None, :]
        if ACTIVATION != "":
            gate, up = _halves(y, BLOCK_M, BLOCK_N)
            y = activate(gate, up, ACTIVATION)
        if HALVES:
            HALF: tl.constexpr = WIDTH // 2
            left, right = _halves(y, BLOCK_M, WIDTH)
            _store(out, left, m, first, tokens, n, out_stride, BLOCK_M, HALF, STORE_TMA)
            _store(out, right, m, first + HALF, tokens, n, out_stride, BLOCK_M, HALF, STORE_TMA)
        else:
            _store(out, y, m, first, tokens, n, out_stride, BLOCK_M, WIDTH, STORE_TMA)


def _copied_by_tma(matrix: torch.Tensor, stride: int) -> bool:
    """Whether rows start at multiples of 16 bytes, as the copy engine needs."""
    return matrix.data_ptr() % 16 == 0 and stride * matrix.element_size() % 16 == 0


def gemm(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    gated: str = "",
) -> torch.Tensor:
    """x W^T + bias, [T, N] in x's dtype, each row with the same bits in every batch.

    Operands as in `skinny_linear`, with any number of tokens; `out` may be float32, which the sums
    are not rounded for. With `gated` ("silu" or
    "gelu_tanh") the result of `gated_linear`, [T, N / 2]. Raises ValueError for anything else.
    """
    out = check_operands(x_TK, weight_NK, bias, out, gated)
    if out.numel():
        run_gemm(x_TK, weight_NK, bias, out, gated)
    return out


def run_gemm(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None,
    out_TN: torch.Tensor,
    activation: str,
    tiles: GemmTiles | None = None,
    tma: bool | None = None,
) -> None:
    """`gemm` for checked operands. `tiles`: others than gemm_tiles'; `tma`: use the copy engine,
    or do not; by default where the GPU and the operands allow it."""
    (tokens, k), n = x_TK.shape, out_TN.shape[1]
    device, itemsize = x_TK.device, x_TK.element_size()
    x_stride, out_stride, depth = (
        row_stride(x_TK, "x"),
        row_stride(out_TN, "out"),
        block_k(itemsize),
    )
    hopper, sms = is_hopper(device), num_sms(device)
    if tiles is None:
        height = weight_NK.shape[0]
        widened = out_TN.dtype != x_TK.dtype
        tiles = gemm_tiles(tokens, height, itemsize, sms, hopper, shared_memory(device), widened)
    width = tiles.width if activation == "" else tiles.width // 2
    if tma is None:
        strides = ((x_TK, x_stride), (weight_NK, k), (out_TN, out_stride))
        # Multiply-adds (float32) take tiles in registers, which the copy engine only makes more of.
        tma = hopper and itemsize == 2 and all(_copied_by_tma(*s) for s in strides)
        # It writes whole units of 16 bytes, beyond the last column where that ends within one.
        tma = tma and n * itemsize % 16 == 0
    # float32 tiles that it would write have no room in shared memory.
    store_tma = tma and out_TN.dtype == x_TK.dtype
    x: Any = x_TK
    weight: Any = weight_NK
    target: Any = out_TN
    if tma:
        x_rows = rows_with_room(x_TK, tiles.height)
        x = TensorDescriptor(x_TK, [x_rows, k], [x_stride, 1], [tiles.height, depth])
        if activation == "":
            weight = TensorDescriptor(weight_NK, [n, k], [k, 1], [width, depth])
        else:
            weight = TensorDescriptor(weight_NK, [2, n, k], [n * k, k, 1], [2, width, depth])
    if store_tma:
        stored = [tiles.height, width // 2 if tiles.halves else width]
        target = TensorDescriptor(out_TN, [tokens, n], [out_stride, 1], stored)
    count = triton.cdiv(tokens, tiles.height) * triton.cdiv(n, width)
    launch(
        gemm_kernel,
        (min(count, sms * tiles.programs_per_sm),),
        device,
        x,
        weight,
        target,
        weight_NK,
        bias,
        tokens,
        n,
        k,
        x_stride,
        out_stride,
        BLOCK_M=tiles.height,
        BLOCK_N=tiles.width,
        BLOCK_K=depth,
        GROUP_M=8,
        AHEAD=AHEAD if tokens <= tiles.height else 0,
        HALVES=tiles.halves,
        TMA=tma,
        STORE_TMA=store_tma,
        ACTIVATION=activation,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
