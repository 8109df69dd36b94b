"""A token's queries and its key in one launch: of its programs the first has the key, the others
have some query heads each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.compressed import Paged, StepTokens
from quire.kernels.triton.compressed.insert_keys import insert_key
from quire.kernels.triton.compressed.rotate_pairs import block_sizes, heads_stride, turn_heads
from quire.kernels.triton.compressed.store_entry import entry_constants
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.rows import row_stride


@triton.jit
def rotate_and_insert_kernel(
    q_ptr,
    keys_ptr,
    norm_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    cache_ptr,
    eps,
    Q_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    KIND: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    PARTS: tl.constexpr = 1 + (H + HEADS - 1) // HEADS
    token = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    column = tl.arange(0, BLOCK)[None, :]
    norm = tl.load(norm_ptr + column, mask=column < tl.where(part == 0, D, 0), other=0.0)
    wait_for_inputs(PDL)
    table_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * ROTARY
    if part == 0:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            key_ptr = keys_ptr + token * STRIDE
            insert_key(key_ptr, norm, table_ptr, cache_ptr, slot, eps, KIND, D, ROTARY, WIDTH)
    else:
        turn_heads(
            q_ptr + token * Q_STRIDE, table_ptr, (part - 1) * HEADS, eps,
            H, D, ROTARY // 2, False, True, HEADS, BLOCK,
        )  # fmt: skip


def rotate_and_insert(
    q_THD: torch.Tensor,
    keys_TD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    tokens: StepTokens,
    slots_T: torch.Tensor,
    cache: Paged,
) -> torch.Tensor:
    """rotate_pairs(q, cos_sin, tokens.positions, eps=eps), which it returns, and insert_keys of the
    same tokens. Layouts and errors as there."""
    count, heads, size = q_THD.shape
    stride = heads_stride(q_THD, cos_sin)
    if keys_TD.shape != (count, size):
        raise ValueError(f"keys {list(keys_TD.shape)} are not those of q {list(q_THD.shape)}")
    constants = entry_constants(cache, size, cos_sin.shape[1])
    sizes = block_sizes(heads, constants["BLOCK"])
    launch(
        rotate_and_insert_kernel,
        (count * (1 + triton.cdiv(heads, sizes["HEADS"])),),
        q_THD.device,
        q_THD,
        keys_TD,
        norm_D,
        cos_sin,
        tokens.positions,
        slots_T,
        cache.memory,
        eps,
        Q_STRIDE=stride,
        STRIDE=row_stride(keys_TD, "keys"),
        H=heads,
        **constants | sizes,
    )
    return q_THD
