"""Products of a weight with up to 8 tokens, by multiply-adds, at the speed of the memory bus.

A program has a few rows of the weight and reads them once, 16 bytes a thread, the next tile
already on its way while it works on this one. Nothing is summed across threads before the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.gemm.epilogue import store_product, weight_rows
from quire.kernels.triton.launch import launch, let_next_start, num_sms, wait_for_inputs
from quire.kernels.triton.rows import row_stride

MAX_TOKENS = 8
# Values of normed tokens that norm_gemv_kernel's largest program, 16 warps, keeps in registers: 64
# a thread.
MAX_KEPT = 16 * 32 * 64


@triton.jit
def _weights(weight, rows, column, k, end):
    """[1, ROWS, BLOCK_K] of a weight with k columns; zero from column `end` on."""
    pointers = weight + (rows.to(tl.int64) * k)[None, :, None] + column[None, None, :]
    return tl.load(pointers, mask=(column < end)[None, None, :], other=0.0)


@triton.jit
def _tokens(x, tokens, stride, column, k, T: tl.constexpr):
    """[T, 1, BLOCK_K] of the tokens; past the last token it again, past column k zero."""
    token = tl.minimum(tl.arange(0, T), tokens - 1)
    pointers = x + token[:, None, None] * stride + column[None, None, :]
    return tl.load(pointers, mask=(column < k)[None, None, :], other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def gemv_kernel(
    x, weight, bias, out, tokens, n, k, x_stride, out_stride,
    T: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    # What one 16-byte load gives a thread, which sums it before anything else: a sum for every
    # element of the tile would take eight times the registers.
    VECTOR: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    first = tl.program_id(0) * (ROWS if ACTIVATION == "" else ROWS // 2)
    rows = weight_rows(first, n, ROWS, ACTIVATION)
    column = tl.arange(0, BLOCK_K)
    tile = _weights(weight, rows, column, k, k)
    wait_for_inputs(PDL)
    sums = tl.zeros([T, ROWS, BLOCK_K // VECTOR], tl.float32)
    for start in range(0, k, BLOCK_K):
        following = _weights(weight, rows, start + BLOCK_K + column, k, k)
        part = _tokens(x, tokens, x_stride, start + column, k, T).to(tl.float32)
        products = tl.reshape(part * tile.to(tl.float32), (T, ROWS, BLOCK_K // VECTOR, VECTOR))
        sums += tl.sum(products, axis=3)
        tile = following
    y = tl.sum(sums, axis=2)
    store_product(y, bias, rows, out, first, tokens, n, out_stride, T, ROWS, ACTIVATION)


@triton.jit
def norm_scale(norm_weight, k, BLOCK_K: tl.constexpr):
    """[1, 1, BLOCK_K], by the threads that have one token's values; zero past column k."""
    column = tl.arange(0, BLOCK_K)[None, None, :]
    return tl.load(norm_weight + column, mask=column < k, other=0.0)


@triton.jit
def norm_tokens(
    x, residual, scale, residual_out, normed_out, tokens, k, x_stride, residual_stride, eps,
    T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[T, 1, BLOCK_K]: the RMS norm of residual + x times norm_scale's, rounded as a norm of its
    own would. The first program writes sum and norm, elsewhere than where the others read."""
    column = tl.arange(0, BLOCK_K)
    total = _tokens(residual, tokens, residual_stride, column, k, T)
    token = tl.arange(0, T)[:, None, None]
    place = token * k + column[None, None, :]
    inside = (token < tokens) & (column < k)[None, None, :]
    writes = tl.program_id(0) == 0
    if x is not None:
        part = _tokens(x, tokens, x_stride, column, k, T)
        # The norm is of what later layers will read, hence of the rounded sum.
        total = (total.to(tl.float32) + part.to(tl.float32)).to(residual.dtype.element_ty)
        if writes:
            tl.store(residual_out + place, total, mask=inside)
    values = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=2, keep_dims=True) / k + eps)
    normed = (values * inverse * scale).to(residual.dtype.element_ty)
    if normed_out is not None:  # noqa: SIM102 (known when compiling)
        if writes:
            tl.store(normed_out + place, normed, mask=inside)
    return normed


@triton.jit(do_not_specialize=["tokens"])
def norm_gemv_kernel(
    x, residual, norm_weight, weight, bias, out, residual_out, normed_out,
    tokens, n, k, x_stride, residual_stride, out_stride, eps,
    T: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every program norms all tokens for itself, while its first rows of the weight are on their
    way, and keeps them in registers for one group of rows after another."""
    let_next_start(PDL)
    WIDTH: tl.constexpr = ROWS if ACTIVATION == "" else ROWS // 2
    column = tl.arange(0, BLOCK_K)
    step = tl.num_programs(0) * WIDTH
    first = tl.program_id(0) * WIDTH
    rows = weight_rows(first, n, ROWS, ACTIVATION)
    tile = _weights(weight, rows, column, k, k)
    scale = norm_scale(norm_weight, k, BLOCK_K)
    wait_for_inputs(PDL)
    normed = norm_tokens(
        x, residual, scale, residual_out, normed_out, tokens, k, x_stride, residual_stride, eps,
        T, BLOCK_K,
    )  # fmt: skip
    normed = normed.to(tl.float32)
    for group in range(first, n, step):
        following_rows = weight_rows(group + step, n, ROWS, ACTIVATION)
        end = tl.where(group + step < n, k, 0)
        following = _weights(weight, following_rows, column, k, end)
        y = tl.sum(normed * tile.to(tl.float32), axis=2)
        store_product(y, bias, rows, out, group, tokens, n, out_stride, T, ROWS, ACTIVATION)
        rows, tile = following_rows, following


def gemv_tiles(tokens: int, n: int, k: int, gated: bool) -> dict[str, int]:
    """Rows (those of gate and up together) and columns of a tile, and warps.

    Short rows of few elements a thread, so that many programs share a multiprocessor and about
    32 KB are on their way on each; more rows for more tokens, since every row of the weight
    takes all tokens out of the L1 cache once. Many short rows, as of a small model's head, go to
    programs of one warp. A weight that about fits the registers of all multiprocessors together is
    loaded whole before the inputs are there: what runs before it, attention, leaves the bus idle.
    (On an H200 that is 1 us less for [2048, 4096] in its layer, and 2 us more for [4096, 4096].)
    """
    if k <= 1024 and n >= 16384:
        return {"ROWS": 8, "BLOCK_K": 256, "num_warps": 1}
    if not gated and 2048 < k <= 4096 and 2048 <= n <= 10 * 2**20 // k and tokens == 1:
        return {"ROWS": 4, "BLOCK_K": 4096, "num_warps": 8}
    rows = 2 * (1 + gated) if tokens == 1 else 4
    block = max(32, min(triton.next_power_of_2(k), 1024))
    return {"ROWS": rows, "BLOCK_K": block, "num_warps": max(1, min(4, block // 256))}


def gemv(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None,
    out_TN: torch.Tensor,
    activation: str,
    tiles: dict[str, int] | None = None,
) -> None:
    """The product, bias and activation of `skinny_linear` and `gated_linear` into `out_TN`, for
    1 to MAX_TOKENS tokens. `tiles`: other sizes than gemv_tiles'."""
    tokens, k = x_TK.shape
    n = out_TN.shape[1]
    bucket = triton.next_power_of_2(tokens)
    tiles = tiles or gemv_tiles(bucket, n, k, activation != "")
    outputs = tiles["ROWS"] // (1 if activation == "" else 2)
    launch(
        gemv_kernel,
        (triton.cdiv(n, outputs),),
        x_TK.device,
        x_TK,
        weight_NK,
        bias,
        out_TN,
        tokens,
        n,
        k,
        row_stride(x_TK, "x"),
        row_stride(out_TN, "out"),
        T=bucket,
        ACTIVATION=activation,
        **tiles,
    )


def norm_gemv_fits(tokens: int, k: int) -> bool:
    """Whether the tokens fit the registers of one program."""
    if not 1 <= tokens <= MAX_TOKENS:
        return False
    return bool(triton.next_power_of_2(tokens) * triton.next_power_of_2(k) <= MAX_KEPT)


def norm_gemv_tiles(tokens: int, k: int, gated: bool) -> dict[str, int]:
    """Rows of a tile (those of gate and up together) and warps; a tile is a whole row wide.

    32 normed values a thread while there are warps for it, 64 at most; four rows of weight only
    where that leaves registers for them.
    """
    values = tokens * triton.next_power_of_2(k)
    warps = min(16, max(4, values // (32 * 32)))
    return {"ROWS": 4 if gated and warps <= 8 else 2, "num_warps": warps}


def norm_gemv(
    x_TK: torch.Tensor | None,
    residual_TK: torch.Tensor,
    norm_weight_K: torch.Tensor,
    eps: float,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None,
    out_TN: torch.Tensor,
    activation: str,
    normed_TK: torch.Tensor | None = None,
    *,
    tiles: dict[str, int] | None = None,
    programs_per_sm: int | None = None,
) -> torch.Tensor:
    """`add_norm_linear` where norm_gemv_fits; returns the new residual. `tiles` and
    `programs_per_sm`: other sizes than the function's own."""
    tokens, k = residual_TK.shape
    n = out_TN.shape[1]
    bucket = triton.next_power_of_2(tokens)
    tiles = tiles or norm_gemv_tiles(bucket, k, activation != "")
    # At 128 registers a thread, 16 warps fill a multiprocessor.
    programs_per_sm = programs_per_sm or max(1, 16 // tiles["num_warps"])
    groups = triton.cdiv(n, tiles["ROWS"] // (1 if activation == "" else 2))
    # No more programs than give all the same number of groups.
    rounds = triton.cdiv(groups, num_sms(out_TN.device) * programs_per_sm)
    residual_out = (
        None
        if x_TK is None
        else torch.empty((tokens, k), dtype=residual_TK.dtype, device=residual_TK.device)
    )
    launch(
        norm_gemv_kernel,
        (triton.cdiv(groups, max(1, rounds)),),
        residual_TK.device,
        x_TK,
        residual_TK,
        norm_weight_K,
        weight_NK,
        bias,
        out_TN,
        residual_out,
        normed_TK,
        tokens,
        n,
        k,
        k if x_TK is None else row_stride(x_TK, "x"),
        row_stride(residual_TK, "residual"),
        row_stride(out_TN, "out"),
        eps,
        T=bucket,
        BLOCK_K=triton.next_power_of_2(k),
        ACTIVATION=activation,
        **tiles,
    )
    return residual_TK if residual_out is None else residual_out
