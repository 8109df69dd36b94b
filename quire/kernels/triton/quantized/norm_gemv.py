"""Residual addition, RMS norm and the product of one or two tokens with an e4m3 weight, in one.

As norm_gemv_kernel of gemm/gemv.py: every program norms all tokens for itself, while its first rows
of codes are on their way, and keeps them in registers for one group of rows after another. A
thread loads and norms the values that belong to its own codes, eight of each at a time, so that
none go through shared memory. Two groups are on their way: a compiler puts loads behind the
products that registers are scarce for, but not behind the sums from warp to warp that follow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.gemm.epilogue import store_product, weight_rows
from quire.kernels.triton.gemm.gemv import norm_scale, norm_tokens
from quire.kernels.triton.launch import launch, let_next_start, num_sms, wait_for_inputs
from quire.kernels.triton.quantized.decode import fp8_floats
from quire.kernels.triton.quantized.gemv import gemv_serves, load_tile
from quire.kernels.triton.quantized.operands import check_linear, instructions, scale_strides
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.kernels.triton.rows import row_stride

# Values of normed tokens that the largest program, 8 warps, keeps in registers: 32 a thread.
MAX_KEPT = 8 * 32 * 32


@triton.jit
def _block_scales(scales, scale_stride, first, end, COLUMNS: tl.constexpr):
    """Of the rows from `first` on, which are of one block, for every two words of codes."""
    word = (tl.arange(0, COLUMNS // 2) * 2)[None, None, :]
    return tl.load(scales + first // 128 + word // 32 * scale_stride, mask=word < end, other=0.0)


@triton.jit
def _load_group(
    codes, scales, row_scales, scale_stride, first, n, words,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Of the weight's rows for the outputs from `first` on: codes, int32 [1, ROWS, COLUMNS], the
    scales of every two words, and of rows, or 1.0. Nothing is read past the last word and row."""
    rows = weight_rows(first, n, ROWS, ACTIVATION)
    end = tl.where(first < n, words, 0)
    code_rows = codes + (rows.to(tl.int64) * words)[None, :, None]
    tile, _ = load_tile(code_rows, None, 0, 0, end, COLUMNS)
    scale = 1.0
    if scales is not None:
        scale = _block_scales(scales, scale_stride, first, end, COLUMNS)
        if ACTIVATION != "":
            up_scale = _block_scales(scales, scale_stride, n + first, end, COLUMNS)
            scale = tl.where((tl.arange(0, ROWS) < ROWS // 2)[None, :, None], scale, up_scale)
    row_scale = 1.0
    if row_scales is not None:
        row_scale = tl.load(row_scales + rows)[None, :]
    return tile, scale, row_scale


@triton.jit
def _eighths(x):
    """float32 [T, 1, 8 W] as eight of [T, 1, W]: the first of each eight values, the second, .."""
    T: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[2] // 8
    even, odd = tl.split(tl.reshape(x, (T, 1, W, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit(do_not_specialize=["tokens"])
def e4m3_norm_gemv_kernel(
    x, residual, norm_weight, codes, scales, row_scales, bias, out, residual_out,
    tokens, n, k, words, x_stride, residual_stride, scale_stride, out_stride, eps,
    T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, CAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    WIDTH: tl.constexpr = ROWS if ACTIVATION == "" else ROWS // 2
    step = tl.num_programs(0) * WIDTH
    first = tl.program_id(0) * WIDTH
    tile, scale, row_scale = _load_group(
        codes, scales, row_scales, scale_stride, first, n, words, ROWS, COLUMNS, ACTIVATION
    )
    next_tile, next_scale, next_row_scale = _load_group(
        codes, scales, row_scales, scale_stride, first + step, n, words, ROWS, COLUMNS, ACTIVATION
    )
    norm = norm_scale(norm_weight, k, 4 * COLUMNS)
    wait_for_inputs(PDL)
    normed = norm_tokens(
        x, residual, norm, residual_out, None, tokens, k, x_stride, residual_stride, eps,
        T, 4 * COLUMNS,
    )  # fmt: skip
    x0, x1, x2, x3, x4, x5, x6, x7 = _eighths(normed.to(tl.float32))
    for group in range(first, n, step):
        first_words, second_words = tl.split(tl.reshape(tile, (1, ROWS, COLUMNS // 2, 2)))
        a, b, c, d = fp8_floats(first_words, CAST)
        products = tl.fma(d, x3, tl.fma(c, x2, tl.fma(b, x1, a * x0)))
        a, b, c, d = fp8_floats(second_words, CAST)
        products = tl.fma(d, x7, tl.fma(c, x6, tl.fma(b, x5, tl.fma(a, x4, products)))) * scale
        after, after_scale, after_row_scale = _load_group(
            codes, scales, row_scales, scale_stride, group + 2 * step, n, words, ROWS, COLUMNS,
            ACTIVATION,
        )  # fmt: skip
        y = tl.sum(products, axis=2) * row_scale
        rows = weight_rows(group, n, ROWS, ACTIVATION)
        store_product(y, bias, rows, out, group, tokens, n, out_stride, T, ROWS, ACTIVATION, LIMIT)
        tile, scale, row_scale = next_tile, next_scale, next_row_scale
        next_tile, next_scale, next_row_scale = after, after_scale, after_row_scale


def norm_gemv_serves(
    x_TK: torch.Tensor | None, residual_TK: torch.Tensor, weight: PackedQuantized, kind: str
) -> bool:
    """Whether `norm_gemv` takes these operands, and a weight whose rows nearly fill its tiles."""
    tokens = residual_TK.shape[0]
    columns = triton.next_power_of_2(weight.k)
    given = (residual_TK,) if x_TK is None else (x_TK, residual_TK)
    return (
        tokens >= 1
        and gemv_serves(tokens, weight, residual_TK.device)
        and all(rows.dtype == torch.bfloat16 for rows in given)
        and triton.next_power_of_2(tokens) * columns <= MAX_KEPT
        and 4 * weight.k >= 3 * columns
        # A group's rows of up have one block's scales.
        and (weight.scales is None or kind == "" or weight.n % 16 == 0)
    )


def norm_gemv_tiles(tokens: int, k: int) -> tuple[dict[str, int], int]:
    """Rows of a tile (those of gate and up together) and warps, a tile being a whole row wide; and
    programs on a multiprocessor. Up to k = 4096 measured on an H100 with benchmarks/gpu/sweeps.py.
    """
    if k > 4096:
        return {"ROWS": 2, "num_warps": 8}, 2
    if k > 2048:
        return {"ROWS": 4 if tokens == 1 else 2, "num_warps": 4}, 3
    warps = max(1, triton.next_power_of_2(k) // 512)
    return {"ROWS": 4, "num_warps": warps}, 16 // warps


def registers(programs_per_sm: int, warps: int) -> int:
    """Most that a thread may have, of a multiprocessor's 65,536, which go to warps by eights."""
    return min(255, 65536 // (programs_per_sm * warps * 32) // 8 * 8)


def norm_gemv(
    x_TK: torch.Tensor | None,
    residual_TK: torch.Tensor,
    norm_weight_K: torch.Tensor,
    eps: float,
    weight: PackedQuantized,
    bias: torch.Tensor | None = None,
    kind: str = "",
    limit: float = 0.0,
    *,
    tiles: dict[str, int] | None = None,
    programs_per_sm: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, new residual) of quantized_norm_linear where norm_gemv_serves; `residual_TK` is not
    written, and returned where there is no `x_TK`.

    The norm's weight is float32 [K], the rest as in `skinny`. `tiles` and `programs_per_sm`: other
    sizes than the function's own. Raises ValueError for what does not go together.
    """
    out = check_linear(residual_TK, weight, bias, None, kind)
    if x_TK is not None and x_TK.shape != residual_TK.shape:
        raise ValueError(f"x: {list(x_TK.shape)} is not the residual's {list(residual_TK.shape)}")
    (tokens, k), n, device = residual_TK.shape, out.shape[1], out.device
    bucket = triton.next_power_of_2(tokens)
    chosen, programs = norm_gemv_tiles(bucket, k)
    tiles, programs_per_sm = tiles or chosen, programs_per_sm or programs
    groups = triton.cdiv(n, tiles["ROWS"] // (1 if kind == "" else 2))
    # No more programs than give all the same number of groups; all are there from the beginning.
    rounds = triton.cdiv(groups, num_sms(device) * programs_per_sm)
    residual_out = None if x_TK is None else out.new_empty(tokens, k)
    codes, scales = weight.codes.view(torch.int32), weight.scales
    launch(
        e4m3_norm_gemv_kernel,
        (triton.cdiv(groups, max(1, rounds)),),
        device,
        x_TK,
        residual_TK,
        norm_weight_K,
        codes,
        scales,
        weight.row_scales,
        bias,
        out,
        residual_out,
        tokens,
        n,
        k,
        codes.shape[-1],
        k if x_TK is None else row_stride(x_TK, "x"),
        row_stride(residual_TK, "residual"),
        scale_strides(scales)[0],
        row_stride(out, "out"),
        eps,
        T=bucket,
        COLUMNS=triton.next_power_of_2(codes.shape[-1]),
        ACTIVATION=kind,
        LIMIT=limit,
        CAST=instructions(device)["CAST"],
        maxnreg=registers(programs_per_sm, tiles["num_warps"]),
        **tiles,
    )
    return out, residual_TK if residual_out is None else residual_out
