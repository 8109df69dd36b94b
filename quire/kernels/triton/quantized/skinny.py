"""Linear layers of a few tokens with quantised weights, at the speed of the memory bus.

Each warp of a program has all the program's rows for its own part of K, on the smallest matrix
instruction (16 rows by 8 tokens), and the parts are added at the end. So a program has few rows,
a weight of few rows still occupies all multiprocessors, and no second kernel is needed. How sums
are ordered depends on the number of tokens: not for deterministic mode.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.gemm.epilogue import store_product, weight_rows
from quire.kernels.triton.gemm.prefetch import prefetch_rows
from quire.kernels.triton.gemm.shared import shared_memory
from quire.kernels.triton.launch import launch, let_next_start, num_sms, wait_for_inputs
from quire.kernels.triton.quantized.gemv import aligned, gemv, gemv_serves
from quire.kernels.triton.quantized.operands import (
    ahead,
    check_linear,
    format_of,
    instructions,
    scale_strides,
)
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.kernels.triton.quantized.products import sum_products
from quire.kernels.triton.rows import empty_rows, row_stride

MAX_TOKENS = 64


@triton.jit(do_not_specialize=["tokens", "blocks"])
def skinny_kernel(
    x, codes, scales, row_scales, zeros, bias, out, tokens, n, k, blocks, x_stride, code_stride,
    scale_stride, scale_size, out_stride,
    T: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr,
    AHEAD: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PACKED: tl.constexpr, CAST: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`n`: columns of out; `code_stride`, `scale_stride`: see sum_products. A program's second
    number is that of its weight, where there are several: each has its own k columns of x and n of
    out, and its scales `scale_size` elements behind the scales of the one before. AHEAD: elements
    of each row of codes to fetch before the inputs are there."""
    let_next_start(PDL)
    group = tl.program_id(1).to(tl.int64)
    x += group * k
    out += group * n
    codes += group * n * code_stride
    if scales is not None:
        scales += group * scale_size
    if zeros is not None:
        zeros += group * scale_size
    if row_scales is not None:
        row_scales += group * n
    first = tl.program_id(0) * (ROWS if ACTIVATION == "" else ROWS // 2)
    rows = weight_rows(first, n, ROWS, ACTIVATION)
    if PDL:
        prefetch_rows(codes, rows.to(tl.int64), 0, code_stride, AHEAD)
    wait_for_inputs(PDL)
    token = tl.arange(0, T)
    zero_rows = None if zeros is None else zeros + rows[None, :, None]
    scale_rows = scales
    if scales is not None:
        scale_row = rows // 128 if FORMAT == "fp8_block" else rows
        scale_rows = scales + scale_row[None, :, None]
    y = sum_products(
        tl.zeros([PARTS, ROWS, T], tl.float32),
        x + (token * x_stride)[None, None, :],
        (token < tokens)[None, None, :],
        k,
        codes + (rows.to(tl.int64) * code_stride)[None, :, None],
        scale_rows,
        zero_rows,
        scale_stride,
        tl.arange(0, PARTS)[:, None, None],
        blocks,
        FORMAT, GROUP, BLOCKS, PARTS, EVEN, PACKED, CAST,
    )  # fmt: skip
    y = tl.trans(tl.sum(y, axis=0))
    if row_scales is not None:
        y *= tl.load(row_scales + rows)[None, :]
    store_product(y, bias, rows, out, first, tokens, n, out_stride, T, ROWS, ACTIVATION, LIMIT)


def skinny_tiles(
    tokens: int, n: int, format: str, group: int, sms: int, shared: int
) -> dict[str, int]:
    """Tile, warps (PARTS) and stages for a weight of n rows (gate and up together).

    More rows take the tokens out of L2 less often, which costs tokens * 2 bytes a column for each
    `ROWS` * 0.5 or 1 byte of codes; fewer give work to more multiprocessors. `tokens` is the
    bucket, a power of two from 8. Estimates until measured with benchmarks/gpu/quantized.py.
    """
    four = format in ("nvfp4", "mxfp4", "int4")
    blocks = 2 if format in ("nvfp4", "mxfp4") and tokens <= 8 else 1
    rows = 16 if tokens <= 16 else 32
    while rows < 32 and n >= rows * 16 * sms:
        rows *= 2
    parts = 4
    column = tokens * 2 + rows * (0.5 if four else 1) + rows * (0.125 if four else 0)
    stage = int(parts * blocks * 128 * column)
    # Two programs at least on a multiprocessor.
    stages = max(2, min(5, (min(shared, 114688) - 4096) // stage))
    return {
        "ROWS": rows,
        "PARTS": parts,
        "BLOCKS": blocks,
        "num_warps": parts,
        "num_stages": stages,
    }


def skinny(
    x_TK: torch.Tensor,
    weight: PackedQuantized,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    kind: str = "",
    limit: float = 0.0,
    tiles: dict[str, int] | None = None,
) -> torch.Tensor:
    """x W^T + bias, [T, N] bfloat16, for up to 64 tokens; with a `kind`, its activation of gate
    and up, [T, N / 2].

    `x_TK` bfloat16; its and out's rows contiguous and as far apart as one likes; `bias` float32
    [N]; a weight for `kind` has the gate's rows first. `kind` and `limit` as in
    gated_activation. Summed in float32 and rounded once. `tiles`: other sizes than
    skinny_tiles'. Raises ValueError for what does not go together.
    """
    out = check_linear(x_TK, weight, bias, out, kind)
    _run(x_TK, weight, bias, out, kind, limit, tiles)
    return out


def skinny_groups(x_TI: torch.Tensor, weight: PackedQuantized) -> torch.Tensor:
    """[T, G N] bfloat16 of a stack of weights [G, N, K] for up to 64 tokens x [T, G K]: each group
    of K columns times its own weight, in one launch. Else as `skinny`."""
    groups = weight.experts
    if groups is None or x_TI.dim() != 2 or x_TI.shape[1] != groups * weight.k:
        raise ValueError(f"x: {list(x_TI.shape)} is not [T, {groups} * {weight.k}]")
    if x_TI.dtype != torch.bfloat16:
        raise ValueError(f"x: expected bfloat16, not {x_TI.dtype}")
    out = empty_rows(x_TI.shape[0], groups * weight.n, x_TI.dtype, x_TI.device)
    _run(x_TI, weight, None, out, "", 0.0, None)
    return out


def _run(
    x: torch.Tensor,
    weight: PackedQuantized,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    kind: str,
    limit: float,
    tiles: dict[str, int] | None,
) -> None:
    groups = weight.experts or 1
    tokens, n, device = x.shape[0], out.shape[1] // groups, x.device
    if tokens > MAX_TOKENS:
        raise ValueError(f"x: {tokens} tokens, at most {MAX_TOKENS} here")
    if tokens == 0 or n == 0:
        return
    if tiles is None and gemv_serves(tokens, weight, device) and aligned(x):
        gemv(x, weight, bias, out, kind, limit)
        return
    bucket, rows = max(8, triton.next_power_of_2(tokens)), weight.n * groups
    sizes = dict(
        tiles
        or skinny_tiles(
            bucket, rows, weight.format, weight.group, num_sms(device), shared_memory(device)
        )
    )
    scales = weight.scales
    step = sizes["BLOCKS"] * sizes["PARTS"]
    launch(
        skinny_kernel,
        (triton.cdiv(n, sizes["ROWS"] // (1 if kind == "" else 2)), groups),
        device,
        x,
        weight.codes,
        scales,
        weight.row_scales,
        weight.zeros,
        bias,
        out,
        tokens,
        n,
        weight.k,
        weight.blocks,
        row_stride(x, "x"),
        weight.codes.shape[-1],
        *scale_strides(scales),
        row_stride(out, "out"),
        T=bucket,
        AHEAD=ahead(weight, step * (sizes["num_stages"] - 1)),
        EVEN=weight.k % (128 * step) == 0,
        ACTIVATION=kind,
        LIMIT=limit,
        **format_of(weight),
        **instructions(device),
        **sizes,
    )
