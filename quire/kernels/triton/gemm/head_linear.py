"""Products of each head with a weight of its own, whose bits depend on nothing but row and weight.

As gemm.py, of which it has the arithmetic: an element is the sum over K in steps of one constant,
in ascending order, in one float32 register, and heights are multiples of 64. One kernel serves
every number of tokens, in deterministic mode or not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.gemm.gemm_tiles import block_k
from quire.kernels.triton.gemm.multiply import multiply_add
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.rows import empty_rows


@triton.jit(do_not_specialize=["tokens"])
def head_linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    X_HEAD: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    OUT_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    # Programs with the same rows of a weight follow each other.
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tile = tl.program_id(0) // tiles_m
    head, first = tile // TILES_N, tile % TILES_N * BLOCK_N
    row = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = first + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Rows past the last token and the weight's last row repeat those: no sum changes by it.
    x_rows = tl.minimum(row, tokens - 1).to(tl.int64)[:, None] * X_STRIDE + head * X_HEAD
    w_rows = (head.to(tl.int64) * N + tl.minimum(column, N - 1))[:, None] * K
    wait_for_inputs(PDL)
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = (start + depth)[None, :]
        x = tl.load(x_ptr + x_rows + k, mask=k < K, other=0.0)
        w = tl.load(weight_ptr + w_rows + k, mask=k < K, other=0.0)
        y = multiply_add(x, w.T, y)
    places = out_ptr + row.to(tl.int64)[:, None] * OUT_STRIDE + head * OUT_HEAD + column[None, :]
    inside = (row < tokens)[:, None] & (column < N)[None, :]
    tl.store(places, y.to(out_ptr.dtype.element_ty), mask=inside)


def tile_sizes(tokens: int, itemsize: int) -> dict[str, int]:
    """Few tokens wait for the weight: narrow tiles, many programs. float32 has one tile, as the
    order of its multiply-adds might follow it."""
    few = tokens <= 64 or itemsize == 4
    size, warps = (64, 4) if few else (128, 8)
    return {
        "BLOCK_M": size,
        "BLOCK_N": size,
        "BLOCK_K": block_k(itemsize),
        "num_warps": warps,
        "num_stages": 2 if itemsize == 4 else 3,
    }


def head_linear(
    x_THK: torch.Tensor, weight_HNK: torch.Tensor, out_THN: torch.Tensor | None = None
) -> torch.Tensor:
    """out[:, h] = x[:, h] weight[h]^T for every head h: [T, H, N].

    x and out are of one dtype, their last dimension contiguous, their others as far apart as one
    likes; the weight is contiguous. Raises ValueError for anything else.
    """
    (tokens, heads, k), n = x_THK.shape, weight_HNK.shape[1]
    if out_THN is None:
        out_THN = empty_rows(tokens, heads * n, x_THK.dtype, x_THK.device).view(tokens, heads, n)
    if weight_HNK.shape != (heads, n, k) or out_THN.shape != (tokens, heads, n):
        raise ValueError(
            f"x {list(x_THK.shape)}, weight {list(weight_HNK.shape)} and out "
            f"{list(out_THN.shape)} do not go together"
        )
    if not weight_HNK.is_contiguous() or x_THK.stride(2) != 1 or out_THN.stride(2) != 1:
        raise ValueError("x, weight and out: their last dimension is not contiguous")
    if not x_THK.dtype == weight_HNK.dtype == out_THN.dtype:
        raise ValueError(
            f"x, weight and out: {x_THK.dtype}, {weight_HNK.dtype} and {out_THN.dtype} differ"
        )
    sizes = tile_sizes(tokens, x_THK.element_size())
    tiles = triton.cdiv(tokens, sizes["BLOCK_M"]) * triton.cdiv(n, sizes["BLOCK_N"])
    launch(
        head_linear_kernel,
        (heads * tiles,),
        x_THK.device,
        x_THK,
        weight_HNK,
        out_THN,
        tokens,
        N=n,
        K=k,
        X_STRIDE=x_THK.stride(0),
        X_HEAD=x_THK.stride(1),
        OUT_STRIDE=out_THN.stride(0),
        OUT_HEAD=out_THN.stride(1),
        **sizes,
    )
    return out_THN
