"""Gated activation of a feed-forward layer: act(gate) * up (Shazeer 2020)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.rows import empty_rows, row_stride

KINDS = ("silu", "gelu_tanh", "swiglu_oai")
# 16 bytes of gate and of up for each of 128 threads, 16-bit values: 16 such programs keep 64 KB in
# flight on a multiprocessor, and one token still spreads over several of them.
BLOCK_I = 1024


@triton.jit
def gated_activation_kernel(
    x_ptr,
    out_ptr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    blocks: tl.constexpr = (WIDTH + BLOCK_I - 1) // BLOCK_I
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = column < WIDTH
    wait_for_inputs(PDL)
    x_ptrs = x_ptr + row * X_STRIDE + column
    gate = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptrs + WIDTH, mask=inside, other=0.0).to(tl.float32)
    if LIMIT > 0:  # NaN stays
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    z = gate
    if KIND == "swiglu_oai":
        z = 1.702 * gate
        up += 1.0
    if KIND == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u), here with u = sqrt(2 / pi) * (x + 0.044715 x^3).
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    y = gate / (1.0 + tl.exp(-z)) * up
    tl.store(out_ptr + row * OUT_STRIDE + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def gated_activation(
    x: torch.Tensor, kind: str, out: torch.Tensor | None = None, limit: float = 0.0
) -> torch.Tensor:
    """act(x[:, :I]) * x[:, I:] in x's dtype: x [T, 2 I] -> [T, I].

    `kind` is "silu" (Elfwing et al. 2017), "gelu_tanh" (Hendrycks and Gimpel 2016, with tanh) or
    gpt-oss's "swiglu_oai", (up + 1) * gate * sigmoid(1.702 * gate). A `limit` above 0 clamps the
    gate from above and up from both sides before (gpt-oss, DeepSeek V4).
    x bfloat16, float16 or float32, rows of x and `out` contiguous and as far apart as one likes.
    Computed in float32 and rounded once. Raises ValueError for another kind or layout.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")
    if x.shape[-1] % 2:
        raise ValueError(f"x: {x.shape[-1]} values are no gate and up of equal size")
    t, i = x.shape[0], x.shape[-1] // 2
    if out is None:
        out = empty_rows(t, i, x.dtype, x.device)
    launch(
        gated_activation_kernel,
        (t * triton.cdiv(i, BLOCK_I),),
        x.device,
        x,
        out,
        X_STRIDE=row_stride(x, "x"),
        OUT_STRIDE=row_stride(out, "out"),
        WIDTH=i,
        KIND=kind,
        LIMIT=limit,
        BLOCK_I=BLOCK_I,
        num_warps=4,
    )
    return out
