"""Products of e4m3 tokens with e4m3 weights on tensor cores: y = (x * x scales) (W * W scales)^T.

With a scale per token and per row of the weight both are multiplied in at the end. With a scale
per 128 columns of a token and per 128 x 128 of the weight, the sum over each 128 columns is scaled
and added in float32 (DeepSeek-V3, section 3.3.2). Hopper's instruction adds e4m3 products with
fewer bits than float32 has; `EXACT` adds its sums to float32 ones every 128 columns there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from quire.kernels.triton.gemm.gemm_tiles import size_class
from quire.kernels.triton.gemm.shared import is_hopper, shared_memory
from quire.kernels.triton.launch import (
    INTERPRETED,
    launch,
    let_next_start,
    num_sms,
    wait_for_inputs,
)
from quire.kernels.triton.quantized.pack import PackedQuantized

DEPTH = 128
GROUP_M = 8
# Triton's interpreter multiplies the bit patterns of e4m3 values.
WIDEN = tl.constexpr(INTERPRETED)


@dataclass(frozen=True)
class ScaledTile:
    """`rows` tokens by `columns` rows of the weight: with blockwise scales 128 or a part of it."""

    rows: int
    columns: int
    warps: int
    stages: int
    programs_per_sm: int = 1


@triton.jit
def _tile(matrix, first_row, rows, first_column, columns, stride, ROWS: tl.constexpr):
    """e4m3 [ROWS, 128] of a matrix by pointers: rows past the last are it again, columns zero."""
    row = tl.minimum(first_row + tl.arange(0, ROWS), rows - 1).to(tl.int64)
    column = first_column + tl.arange(0, 128)
    pointers = matrix + row[:, None] * stride + column[None, :]
    return tl.load(pointers, mask=(column < columns)[None, :], other=0.0)


@triton.jit
def multiply_e4m3(x, weight, sums, PROMOTE: tl.constexpr):
    """sums + x weight^T. PROMOTE: sums of the instruction are added to `sums` every 128 columns."""
    if WIDEN:
        sums = tl.dot(x.to(tl.float32), weight.to(tl.float32).T, sums, input_precision="ieee")
    elif PROMOTE:
        sums = tl.dot(x, weight.T, sums, max_num_imprecise_acc=128)
    else:
        sums = tl.dot(x, weight.T, sums)
    return sums


@triton.jit(do_not_specialize=["tokens", "scale_stride"])
def scaled_gemm_kernel(
    x, x_scales, weight, weight_scales, bias, out, tokens, n, k, weight_stride, scale_stride,
    out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, BLOCKWISE: tl.constexpr,
    EXACT: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`x` and `weight` are descriptors with TMA, else pointers. `scale_stride`: from one block of
    columns to the next in `weight_scales`."""
    let_next_start(PDL)
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    wait_for_inputs(PDL)
    group_first = tl.program_id(0) // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - group_first, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    m = (group_first + within % group_m) * BLOCK_M
    first = within // group_m * BLOCK_N
    row = m + tl.arange(0, BLOCK_M)
    there = row < tokens
    column = first + tl.arange(0, BLOCK_N)
    w_row = tl.minimum(column, n - 1)
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, 128):
        if TMA:
            x_part = x.load([m, start])
            w_part = weight.load([first, start])
        else:
            x_part = _tile(x, m, tokens, start, k, k, BLOCK_M)
            w_part = _tile(weight, first, n, start, k, weight_stride, BLOCK_N)
        if BLOCKWISE:
            x_pointers = x_scales + tl.cast(start // 128, tl.int64) * tokens + row
            x_scale = tl.load(x_pointers, mask=there, other=0.0)
            # A tile lies within one block of the weight's rows.
            w_scale = tl.load(weight_scales + start // 128 * scale_stride + first // 128)
            zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            part = multiply_e4m3(x_part, w_part, zeros, False)
            y += part * (x_scale * w_scale)[:, None]
        else:
            y = multiply_e4m3(x_part, w_part, y, EXACT)
    if not BLOCKWISE:
        x_scale = tl.load(x_scales + row, mask=there, other=0.0)
        y = y * x_scale[:, None] * tl.load(weight_scales + w_row)[None, :]
    if bias is not None:
        y += tl.load(bias + w_row)[None, :]
    pointers = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(pointers, y.to(out.dtype.element_ty), mask=there[:, None] & (column < n)[None, :])


def scaled_tile(
    tokens: int, n: int, blockwise: bool, exact: bool, sms: int, shared: int
) -> ScaledTile:
    """The tile that leaves least work undone in the last wave, alike for all numbers of tokens of a
    class (gemm_tiles.py); estimates until measured with
    benchmarks/gpu/quantized.py. `shared`: bytes of shared memory a program may have."""
    tokens = size_class(tokens)
    if shared < 131072:
        return ScaledTile(64, 64, 4, 2)
    if tokens <= 64:
        return ScaledTile(64, 64 if n < 16384 else 128, 4, 4, 2)
    choices = [(ScaledTile(128, 128, 8, 3, 2), 0.9), (ScaledTile(64, 128, 4, 4, 2), 0.7)]
    if not blockwise and not exact:  # two sums of that size are too many registers
        choices.append((ScaledTile(128, 256, 8, 4), 1.0))

    def cost(choice: tuple[ScaledTile, float]) -> float:
        tile, speed = choice
        count = triton.cdiv(tokens, tile.rows) * triton.cdiv(n, tile.columns)
        waves = triton.cdiv(count, sms * tile.programs_per_sm) * tile.programs_per_sm
        return float(waves * tile.rows * tile.columns / speed)

    return min(choices, key=cost)[0]


def _check(
    codes: torch.Tensor, scales: torch.Tensor, weight: PackedQuantized, bias: torch.Tensor | None
) -> None:
    tokens, k = codes.shape
    if weight.format not in ("fp8", "fp8_block") or weight.experts is not None:
        raise ValueError(f"weight: {weight.format} is not one of fp8, fp8_block")
    if codes.dtype != torch.float8_e4m3fn or k != weight.k or not codes.is_contiguous():
        raise ValueError(f"codes: expected contiguous float8_e4m3fn [T, {weight.k}]")
    shape = (tokens,) if weight.format == "fp8" else (weight.blocks, tokens)
    if tuple(scales.shape) != shape or scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(f"scales: expected contiguous float32 {list(shape)}")
    if bias is not None and (bias.shape != (weight.n,) or bias.dtype != torch.float32):
        raise ValueError(f"bias: expected float32 [{weight.n}]")


def scaled_gemm(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: PackedQuantized,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    exact: bool = True,
    tile: ScaledTile | None = None,
) -> torch.Tensor:
    """(codes * scales) W^T + bias, [T, N] bfloat16, for fp8 and fp8_block weights.

    `codes` and `scales` as quantize gives them: a scale per token for fp8, per 128 columns for
    fp8_block. `exact`: float32 sums for fp8, see the top of this file. A row's bits depend on
    nothing but the row and the weight while the tile has 64 rows or a multiple. Raises ValueError
    for what does not go together.
    """
    _check(codes, scales, weight, bias)
    (tokens, k), n, device = codes.shape, weight.n, codes.device
    if out is None:
        out = torch.empty((tokens, n), dtype=torch.bfloat16, device=device)
    blockwise = weight.format == "fp8_block"
    tile = tile or scaled_tile(tokens, n, blockwise, exact, num_sms(device), shared_memory(device))
    values = weight.codes.view(torch.float8_e4m3fn)
    weight_scales = weight.scales if blockwise else weight.row_scales
    assert weight_scales is not None
    tma = is_hopper(device) and k % 16 == 0 and codes.data_ptr() % 16 == 0
    x_arg: Any = codes
    w_arg: Any = values
    if tma and tokens:
        x_arg = TensorDescriptor(codes, [tokens, k], [k, 1], [tile.rows, DEPTH])
        stride = values.shape[1]
        w_arg = TensorDescriptor(values, [n, stride], [stride, 1], [tile.columns, DEPTH])
    count = triton.cdiv(tokens, tile.rows) * triton.cdiv(n, tile.columns)
    launch(
        scaled_gemm_kernel,
        (count,),
        device,
        x_arg,
        scales,
        w_arg,
        weight_scales,
        bias,
        out,
        tokens,
        n,
        k,
        values.shape[1],
        weight_scales.shape[-1],
        out.stride(0),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        GROUP_M=GROUP_M,
        BLOCKWISE=blockwise,
        EXACT=exact,
        TMA=tma,
        num_warps=tile.warps,
        num_stages=tile.stages,
        # So many that the registers are enough for the programs.
        maxnreg=min(255, 65536 // (tile.programs_per_sm * tile.warps * 32)),
    )
    return out


def library_scaled(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: PackedQuantized,
    bias: torch.Tensor | None = None,
    *,
    exact: bool = True,
) -> torch.Tensor:
    """scaled_gemm for fp8 weights by torch's own (cuBLASLt or CUTLASS). Its bias is in bfloat16:
    exact for one that a checkpoint has in that dtype."""
    _check(codes, scales, weight, bias)
    assert weight.row_scales is not None and weight.format == "fp8"
    values = weight.codes.view(torch.float8_e4m3fn)[:, : weight.k]
    return torch._scaled_mm(
        codes,
        values.t(),
        scale_a=scales[:, None],
        scale_b=weight.row_scales[None, :],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=not exact,
    )
