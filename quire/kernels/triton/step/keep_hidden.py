"""What a forward pass leaves for sampling: its hidden states, and which of them are spoiled."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.rows import row_stride

BLOCK_H = 1024


@triton.jit
def keep_hidden_kernel(
    hidden_ptr,
    kept_ptr,
    spoiled_ptr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    spoiled = tl.zeros([BLOCK_H], dtype=tl.int32)
    for first in range(0, H, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        x = tl.load(hidden_ptr + token * STRIDE + column, mask=column < H, other=0.0)
        tl.store(kept_ptr + token * H + column, x, mask=column < H)
        finite = tl.abs(x.to(tl.float32)) < float("inf")  # False for NaN too
        spoiled = tl.where(finite, spoiled, 1)
    tl.store(spoiled_ptr + token, tl.max(spoiled))


def keep_hidden(hidden_TH: torch.Tensor, kept: torch.Tensor, spoiled: torch.Tensor) -> None:
    """Copy hidden states [T, H] to the first rows of `kept` [>= T, H], contiguous and of the same
    dtype, and set `spoiled` int32 [>= T]: 1 where a token's are not all finite, else 0.

    Keys or values that are not finite spoil the token they belong to, which attends to itself:
    so this says of every token whether what it wrote into the cache may be used by others.
    Raises ValueError for a matrix of another layout.
    """
    t, h = hidden_TH.shape
    launch(
        keep_hidden_kernel,
        (t,),
        kept.device,
        hidden_TH,
        kept,
        spoiled,
        STRIDE=row_stride(hidden_TH, "hidden"),
        H=h,
        BLOCK_H=min(BLOCK_H, triton.next_power_of_2(h)),
        num_warps=4,
    )
