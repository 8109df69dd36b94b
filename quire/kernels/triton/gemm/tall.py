"""Products of a weight with up to 64 tokens on tensor cores, at the speed of the memory bus.

y^T = W x^T: the weight's rows fill the tall side of the matrix instruction (64 on Hopper's wgmma,
16 elsewhere) and the tokens its narrow one, so that little of it is padding. Where the weight has
too few rows to occupy all multiprocessors, K is split and a second kernel adds the parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.gemm.epilogue import activate, store_product, weight_rows
from quire.kernels.triton.gemm.multiply import multiply_add
from quire.kernels.triton.gemm.prefetch import prefetch_rows
from quire.kernels.triton.gemm.shared import HOPPER_SHARED, shared_memory
from quire.kernels.triton.launch import launch, let_next_start, num_sms, wait_for_inputs
from quire.kernels.triton.rows import row_stride

MAX_TOKENS = 64


@triton.jit(do_not_specialize=["tokens"])
def tall_kernel(
    x, weight, bias, out, parts, tokens, n, k, share, x_stride, out_stride,
    T: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    AHEAD: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`share`: columns of each part of K. With `parts`, float32 [parts, tokens, rows of the
    weight], the sums go there. AHEAD: tiles of the weight to fetch before the inputs are there."""
    let_next_start(PDL)
    first = tl.program_id(0) * (ROWS if ACTIVATION == "" else ROWS // 2)
    split = tl.program_id(1)
    begin = split * share
    end = tl.minimum(begin + share, k)
    rows = weight_rows(first, n, ROWS, ACTIVATION)
    rows_64 = rows.to(tl.int64)
    if PDL:
        for stage in tl.static_range(AHEAD):
            prefetch_rows(weight, rows_64, begin + stage * BLOCK_K, k, BLOCK_K)
    wait_for_inputs(PDL)
    token = tl.arange(0, T)
    column = tl.arange(0, BLOCK_K)
    weights = weight + rows_64[:, None] * k + column[None, :]
    values = x + tl.minimum(token, tokens - 1)[None, :] * x_stride + column[:, None]
    y = tl.zeros([ROWS, T], tl.float32)
    for start in range(begin, end, BLOCK_K):
        if EVEN_K:
            w_part = tl.load(weights + start)
            x_part = tl.load(values + start)
        else:
            inside = start + column < k
            w_part = tl.load(weights + start, mask=inside[None, :], other=0.0)
            x_part = tl.load(values + start, mask=inside[:, None], other=0.0)
        y = multiply_add(w_part, x_part, y)
    y = tl.trans(y)
    if parts is None:
        store_product(y, bias, rows, out, first, tokens, n, out_stride, T, ROWS, ACTIVATION)
    else:
        height = n if ACTIVATION == "" else 2 * n
        target = parts + ((split * tokens + token) * height)[:, None] + rows[None, :]
        tl.store(target, y, mask=(token < tokens)[:, None])


@triton.jit(do_not_specialize=["count", "tokens"])
def add_parts_kernel(
    parts, bias, out, count, tokens, n, out_stride,
    BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token's sums over the `count` parts, in order, then bias and activation."""
    let_next_start(PDL)
    token = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    height = n if ACTIVATION == "" else 2 * n
    wait_for_inputs(PDL)
    y = tl.zeros([BLOCK], tl.float32)
    up = tl.zeros([BLOCK], tl.float32)
    for part in range(count):
        source = parts + (part * tokens + token) * height + column
        y += tl.load(source, mask=inside, other=0.0)
        if ACTIVATION != "":
            up += tl.load(source + n, mask=inside, other=0.0)
    if bias is not None:
        y += tl.load(bias + column, mask=inside, other=0.0)
        if ACTIVATION != "":
            up += tl.load(bias + n + column, mask=inside, other=0.0)
    if ACTIVATION != "":
        y = activate(y, up, ACTIVATION)
    tl.store(out + token * out_stride + column, y.to(out.dtype.element_ty), mask=inside)


def tall_tiles(tokens: int, n: int, k: int, itemsize: int, sms: int, shared: int) -> dict[str, int]:
    """Tile, splits of K, warps and stages for a weight of n rows (gate and up together).

    A tile of R rows takes the tokens out of L2 once, which costs tokens / R of the weight's own
    bytes: hence 64 rows, and six tiles on their way. K is split only for few tokens and so few
    rows that half the multiprocessors would idle: adding the parts costs a kernel, and more with
    every token. Measured on an H200 (benchmarks/gpu/gemm.py few). `shared`: bytes of shared
    memory a program may have.
    """
    if itemsize == 4:  # multiply-adds, not tensor cores: correct rather than fast
        return {"ROWS": 32, "BLOCK_K": 32, "SPLITS": 1, "num_warps": 4, "num_stages": 2}
    rows, block = 64, 128
    stage = (rows + tokens) * block * itemsize
    stages = max(2, min(6, (min(shared, HOPPER_SHARED) - 1024) // stage))
    splits = 1
    while tokens <= 16 and 2 * splits * triton.cdiv(n, rows) <= sms and k >= 16 * splits * block:
        splits *= 2
    return {
        "ROWS": rows,
        "BLOCK_K": block,
        "SPLITS": splits,
        "num_warps": 4,
        "num_stages": stages,
    }


def tall(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None,
    out_TN: torch.Tensor,
    activation: str,
    tiles: dict[str, int] | None = None,
) -> None:
    """The product, bias and activation of `skinny_linear` and `gated_linear` into `out_TN`, for
    1 to MAX_TOKENS tokens. `tiles`: other sizes than tall_tiles'."""
    tokens, k = x_TK.shape
    height, n = weight_NK.shape[0], out_TN.shape[1]
    device = x_TK.device
    bucket = max(8, triton.next_power_of_2(tokens))
    if tiles is None:
        tiles = tall_tiles(
            bucket, height, k, x_TK.element_size(), num_sms(device), shared_memory(device)
        )
    sizes = dict(tiles)
    splits = sizes.pop("SPLITS")
    share = triton.cdiv(triton.cdiv(k, sizes["BLOCK_K"]), splits) * sizes["BLOCK_K"]
    parts = None
    if splits > 1:
        parts = torch.empty((splits, tokens, height), dtype=torch.float32, device=device)
    outputs = sizes["ROWS"] // (1 if activation == "" else 2)
    launch(
        tall_kernel,
        (triton.cdiv(n, outputs), splits),
        device,
        x_TK,
        weight_NK,
        bias,
        out_TN,
        parts,
        tokens,
        n,
        k,
        share,
        row_stride(x_TK, "x"),
        row_stride(out_TN, "out"),
        T=bucket,
        EVEN_K=k % sizes["BLOCK_K"] == 0,
        AHEAD=sizes["num_stages"] - 1,
        ACTIVATION=activation,
        **sizes,
    )
    if parts is not None:
        launch(
            add_parts_kernel,
            (triton.cdiv(n, 256), tokens),
            device,
            parts,
            bias,
            out_TN,
            splits,
            tokens,
            n,
            row_stride(out_TN, "out"),
            BLOCK=256,
            ACTIVATION=activation,
            num_warps=2,
        )
