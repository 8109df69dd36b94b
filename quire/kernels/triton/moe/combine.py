"""The weighted sum of each token's experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs

# 8 values for each of 128 threads: with 8 slots a thread has 16 loads of 16 bytes of float32.
BLOCK_H = 1024


@triton.jit
def combine_kernel(
    y_ptr,
    weights_ptr,
    out_ptr,
    H: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < H
    wait_for_inputs(PDL)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(SLOTS):
        weight = tl.load(weights_ptr + token * SLOTS + k)
        y = tl.load(y_ptr + (token * SLOTS + k) * H + column, mask=inside, other=0.0)
        total += weight * y.to(tl.float32)
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine(y: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """sum over k of weights[t, k] * y[t * K + k], [T, H] in `dtype`.

    `y` [T * K, H] bfloat16, float16 or float32, `weights` float32 [T, K], both contiguous. Slots
    are added in their order, in float32, and the sum is rounded once.
    """
    t, slots = weights.shape
    h = y.shape[1]
    out = torch.empty((t, h), dtype=dtype, device=y.device)
    block = min(BLOCK_H, triton.next_power_of_2(h))
    launch(
        combine_kernel,
        (t * triton.cdiv(h, block),),
        y.device,
        y,
        weights,
        out,
        H=h,
        SLOTS=slots,
        BLOCK_H=block,
        num_warps=4,
    )
    return out
