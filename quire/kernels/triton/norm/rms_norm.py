"""Root-mean-square norm of rows (Zhang and Sennrich 2019), alone and after a residual's addition.

A program has whole rows, so a row's sum is in one order whatever else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.rows import empty_rows, row_stride


@triton.jit
def _normalise(x, weight, eps, H: tl.constexpr):
    """x [R, H] / rms(x) * weight; x is zero in columns past H."""
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / H + eps)
    return x * inverse[:, None] * weight


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    eps,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    # A column for each row: weights then have the layout of x, and need no exchange for it.
    column = tl.broadcast_to(tl.arange(0, BLOCK_H)[None, :], (ROWS, BLOCK_H))
    inside = (row < rows) & (column < H)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0)
    wait_for_inputs(PDL)
    x = tl.load(x_ptr + row * X_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    y = _normalise(x, weight, eps, H)
    tl.store(out_ptr + row * OUT_STRIDE + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    x_norm_ptr,
    out_ptr,
    rows,
    eps,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    H: tl.constexpr,
    NORM_X: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    # A column for each row: weights then have the layout of x, and need no exchange for it.
    column = tl.broadcast_to(tl.arange(0, BLOCK_H)[None, :], (ROWS, BLOCK_H))
    inside = (row < rows) & (column < H)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0)
    if NORM_X:
        x_norm = tl.load(x_norm_ptr + column, mask=column < H, other=0.0)
    wait_for_inputs(PDL)
    residual_ptrs = residual_ptr + row * RESIDUAL_STRIDE + column
    x = tl.load(x_ptr + row * X_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
    if NORM_X:
        x = _normalise(x, x_norm, eps, H).to(x_ptr.dtype.element_ty).to(tl.float32)
    # The norm is of what later layers will read, hence of the rounded sum.
    total = (residual + x).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptrs, total, mask=inside)
    y = _normalise(total.to(tl.float32), weight, eps, H)
    tl.store(out_ptr + row * H + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def block_sizes(h: int) -> dict[str, int]:
    """Tile and warps for rows of `h` values. They decide the order of a row's sum, so they
    depend on nothing else.

    16 values a thread: two 16-byte loads of 16-bit values in flight, and few enough registers
    for several programs on a multiprocessor. Short rows share a program until it has 2,048
    values, which keeps the bus busy; 16 warps are the most that AMD's 64 lanes allow.
    """
    block = triton.next_power_of_2(h)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK_H": block, "num_warps": min(16, rows * block // 512)}


def rms_norm(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight for each row, [T, H] in x's dtype.

    `x_TH` and `out` bfloat16, float16 or float32, rows contiguous and as far apart as one likes;
    `weight_H` float32. Computed in float32 and rounded once. `out` may be `x_TH`. Raises
    ValueError for another layout.
    """
    t, h = x_TH.shape
    if out is None:
        out = empty_rows(t, h, x_TH.dtype, x_TH.device)
    sizes = block_sizes(h)
    launch(
        rms_norm_kernel,
        (triton.cdiv(t, sizes["ROWS"]),),
        x_TH.device,
        x_TH,
        weight_H,
        out,
        t,
        eps,
        X_STRIDE=row_stride(x_TH, "x"),
        OUT_STRIDE=row_stride(out, "out"),
        H=h,
        **sizes,
    )
    return out


def add_rms_norm(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    x_norm: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual += x in place; returns the residual's RMS norm times `weight_H`, [T, H] in x's
    dtype.

    Layouts and dtypes as in `rms_norm`. The sum is rounded to the residual's dtype before it is
    normed. With `x_norm` (float32 [H]) x is first normed with that weight and the same `eps`, and
    rounded to its dtype: Gemma 3's norm after attention or feed-forward, and the next one before.
    `out` [T, H], contiguous, of x's dtype.
    """
    t, h = x_TH.shape
    if residual_TH.shape != x_TH.shape:
        raise ValueError(f"residual: {list(residual_TH.shape)} is not x's {list(x_TH.shape)}")
    if out is None:
        out = empty_rows(t, h, x_TH.dtype, x_TH.device)
    sizes = block_sizes(h)
    launch(
        add_rms_norm_kernel,
        (triton.cdiv(t, sizes["ROWS"]),),
        x_TH.device,
        x_TH,
        residual_TH,
        weight_H,
        weight_H if x_norm is None else x_norm,
        out,
        t,
        eps,
        X_STRIDE=row_stride(x_TH, "x"),
        RESIDUAL_STRIDE=row_stride(residual_TH, "residual"),
        H=h,
        NORM_X=x_norm is not None,
        **sizes,
    )
    return out
