"""Activations as e4m3 with a scale per token, or per token and 128 columns.

Alone, after the residual's addition and RMS norm, and after the gated activation. What is
quantised is what the kernel without quantisation would have stored, rounded to bfloat16, so that
both ways give the same numbers. A token's codes and scales depend on nothing but the token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quire.kernels.triton.gemm.epilogue import ACTIVATIONS, activate
from quire.kernels.triton.launch import INTERPRETED, launch, let_next_start, wait_for_inputs
from quire.kernels.triton.norm.rms_norm import _normalise, block_sizes
from quire.kernels.triton.rows import row_stride

LARGEST = 448.0  # of e4m3
GROUP = 128
# The interpreter cuts where a GPU rounds to nearest.
ROUND = tl.constexpr(INTERPRETED)


@dataclass(frozen=True)
class QuantizedTokens:
    """Tokens as quantize gives them: codes float8_e4m3fn [T, K], and scales."""

    codes: torch.Tensor
    scales: torch.Tensor


@triton.jit
def _to_e4m3(values):
    """float32 to the nearest e4m3, ties to even; NaN stays."""
    if ROUND:
        # Adding 2^19 times an e4m3's own power of two leaves its 3 bits of mantissa.
        size = tl.abs(values)
        exponent = (tl.maximum(size, 0.015625).to(tl.uint32, bitcast=True) >> 23) << 23
        magic = (exponent + (20 << 23)).to(tl.float32, bitcast=True) * 1.5
        values = (values + magic) - magic
    return values.to(tl.float8e4nv)


@triton.jit
def _scale(largest, POWER_OF_TWO: tl.constexpr):
    """The scale that takes `largest` to 448 at most; of zeros the smallest normal number."""
    scale = tl.maximum(largest / 448.0, 1.1754943508222875e-38)
    if POWER_OF_TWO:
        bits = scale.to(tl.uint32, bitcast=True) + 0x7FFFFF
        scale = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _store_quantized(
    y, codes, scales, row, column, inside, rows, columns,
    fixed, GROUP: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """Quantise y [R, C] (zero outside) and store codes [rows, columns] and scales, [rows] or
    [groups, rows]; `row` [R, 1] int64, `column` [R, C] or [1, C]. `fixed`: where the one scale of
    all rows is, if they do not have their own."""
    R: tl.constexpr = y.shape[0]
    C: tl.constexpr = y.shape[1]
    if fixed is not None:
        scale = tl.load(fixed)
        tl.store(scales + row, tl.zeros([R, 1], tl.float32) + scale, mask=row < rows)
        value = y / scale
        value = tl.where(value > 448.0, 448.0, tl.where(value < -448.0, -448.0, value))
    elif GROUP == 0:
        scale = _scale(tl.max(tl.abs(y), axis=1, keep_dims=True), POWER_OF_TWO)
        value = y / scale
        tl.store(scales + row, scale, mask=row < rows)
    else:
        grouped = tl.reshape(y, (R, C // GROUP, GROUP))
        scale = _scale(tl.max(tl.abs(grouped), axis=2), POWER_OF_TWO)
        value = tl.reshape(grouped / scale[:, :, None], (R, C))
        group = tl.arange(0, C // GROUP)[None, :]
        there = (row < rows) & (group * GROUP < columns)
        tl.store(scales + group.to(tl.int64) * rows + row, scale, mask=there)
    tl.store(codes + row * columns + column, _to_e4m3(value), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    x, codes, scales, fixed, rows,
    X_STRIDE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, POWER_OF_TWO: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < COLUMNS)
    wait_for_inputs(PDL)
    y = tl.load(x + row * X_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    _store_quantized(
        y, codes, scales, row, column, inside, rows, COLUMNS, fixed, GROUP, POWER_OF_TWO
    )


@triton.jit(do_not_specialize=["rows"])
def activation_quantize_kernel(
    x, codes, scales, fixed, rows,
    X_STRIDE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr, GROUP: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < COLUMNS)
    wait_for_inputs(PDL)
    gate = tl.load(x + row * X_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * X_STRIDE + COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
    y = activate(gate, up, KIND, LIMIT).to(x.dtype.element_ty).to(tl.float32)
    _store_quantized(
        y, codes, scales, row, column, inside, rows, COLUMNS, fixed, GROUP, POWER_OF_TWO
    )


@triton.jit(do_not_specialize=["rows"])
def norm_quantize_kernel(
    x, residual, weight, codes, scales, fixed, normed, rows, eps,
    X_STRIDE: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr, GROUP: tl.constexpr, POWER_OF_TWO: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """residual += x in place, where there is an x; its norm quantised, and stored where there is
    a `normed` [rows, H]."""
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.broadcast_to(tl.arange(0, BLOCK_H)[None, :], (ROWS, BLOCK_H))
    inside = (row < rows) & (column < H)
    scale = tl.load(weight + column, mask=column < H, other=0.0)
    wait_for_inputs(PDL)
    total = tl.load(residual + row * RESIDUAL_STRIDE + column, mask=inside, other=0.0)
    if x is not None:
        part = tl.load(x + row * X_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
        total = (total.to(tl.float32) + part).to(residual.dtype.element_ty)
        tl.store(residual + row * RESIDUAL_STRIDE + column, total, mask=inside)
    y = _normalise(total.to(tl.float32), scale, eps, H).to(residual.dtype.element_ty)
    if normed is not None:
        tl.store(normed + row * H + column, y, mask=inside)
    _store_quantized(
        y.to(tl.float32), codes, scales, row, column, inside, rows, H, fixed, GROUP, POWER_OF_TWO
    )


def _outputs(
    rows: int, columns: int, group: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    if group not in (0, GROUP):
        raise ValueError(f"group: {group} is neither 0, a scale per token, nor {GROUP}")
    codes = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=device)
    shape = (rows,) if group == 0 else (-(-columns // group), rows)
    return codes, torch.empty(shape, dtype=torch.float32, device=device)


def _sizes(columns: int) -> dict[str, int]:
    """Rows and columns of a program, and warps: 32 values a thread, 16 warps at most."""
    block = max(GROUP, triton.next_power_of_2(columns))
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // 1024))}


def quantize(
    x: torch.Tensor,
    group: int = 0,
    *,
    power_of_two: bool = False,
    fixed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float8_e4m3fn [T, K] and scales float32 of bfloat16 rows x [T, K]: x is nearly code *
    scale.

    `group` 0: scales [T], the largest magnitude of a row over 448; 128: [ceil(K / 128), T], one
    for each 128 columns. `power_of_two`: rounded up to one (DeepSeek's ue8m0). `fixed` float32 of
    no dimension, with group 0: the scale of all rows, beyond whose range values are cut. Rows of x
    are contiguous and as far apart as one likes. Raises ValueError for another group or layout.
    """
    rows, columns = x.shape
    codes, scales = _outputs(rows, columns, group, x.device)
    sizes = _sizes(columns)
    launch(
        quantize_kernel,
        (triton.cdiv(rows, sizes["ROWS"]),),
        x.device,
        x,
        codes,
        scales,
        fixed,
        rows,
        X_STRIDE=row_stride(x, "x"),
        COLUMNS=columns,
        GROUP=group,
        POWER_OF_TWO=power_of_two,
        **sizes,
    )
    return codes, scales


def gated_activation_quantize(
    x: torch.Tensor,
    kind: str,
    group: int = 0,
    *,
    limit: float = 0.0,
    power_of_two: bool = False,
    fixed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize(gated_activation(x, kind, limit)) of x [T, 2 I] in one kernel: codes [T, I]."""
    if kind == "" or kind not in ACTIVATIONS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(ACTIVATIONS[1:])}")
    if x.shape[1] % 2:
        raise ValueError(f"x: {x.shape[1]} values are no gate and up of equal size")
    rows, columns = x.shape[0], x.shape[1] // 2
    codes, scales = _outputs(rows, columns, group, x.device)
    sizes = _sizes(columns)
    launch(
        activation_quantize_kernel,
        (triton.cdiv(rows, sizes["ROWS"]),),
        x.device,
        x,
        codes,
        scales,
        fixed,
        rows,
        X_STRIDE=row_stride(x, "x"),
        COLUMNS=columns,
        KIND=kind,
        LIMIT=limit,
        GROUP=group,
        POWER_OF_TWO=power_of_two,
        **sizes,
    )
    return codes, scales


def add_rms_norm_quantize(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group: int = 0,
    *,
    power_of_two: bool = False,
    fixed: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual += x in place (not without an x); codes and scales of its RMS norm times `weight`.

    As quantize(add_rms_norm(x, residual, weight, eps)) in one kernel. `normed` [T, H], contiguous,
    gets the norm itself where something else reads it, a router for instance.
    """
    rows, h = residual.shape
    if x is not None and x.shape != residual.shape:
        raise ValueError(f"x: {list(x.shape)} is not the residual's {list(residual.shape)}")
    if normed is not None and (normed.shape != residual.shape or not normed.is_contiguous()):
        raise ValueError(f"normed: expected contiguous {list(residual.shape)}")
    codes, scales = _outputs(rows, h, group, residual.device)
    sizes = block_sizes(max(GROUP, h))
    launch(
        norm_quantize_kernel,
        (triton.cdiv(rows, sizes["ROWS"]),),
        residual.device,
        x,
        residual,
        weight,
        codes,
        scales,
        fixed,
        normed,
        rows,
        eps,
        X_STRIDE=h if x is None else row_stride(x, "x"),
        RESIDUAL_STRIDE=row_stride(residual, "residual"),
        H=h,
        GROUP=group,
        POWER_OF_TWO=power_of_two,
        **sizes,
    )
    return codes, scales
