"""Keys into the cache of the window: norm, rotation, packing, a program for each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.compressed import Paged, StepTokens
from quire.kernels.triton.compressed.rotate_pairs import turn_pairs
from quire.kernels.triton.compressed.store_entry import entry_constants, store_entry
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.norm.rms_norm import _normalise
from quire.kernels.triton.rows import row_stride


@triton.jit
def insert_key(
    key_ptr, norm, table_ptr, cache_ptr, slot, eps,
    KIND: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One token's key; `norm` [1, BLOCK], 0 past D."""
    column = tl.arange(0, norm.shape[1])[None, :]
    x = tl.load(key_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    y = turn_pairs(_normalise(x, norm, eps, D), table_ptr, D - ROTARY, ROTARY // 2, False)
    store_entry(y, cache_ptr, slot, KIND, D, ROTARY, WIDTH)


@triton.jit
def insert_keys_kernel(
    keys_ptr,
    norm_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    cache_ptr,
    eps,
    STRIDE: tl.constexpr,
    KIND: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    norm = tl.load(norm_ptr + column, mask=column < D, other=0.0)
    wait_for_inputs(PDL)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        table_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * ROTARY
        key_ptr = keys_ptr + token * STRIDE
        insert_key(key_ptr, norm, table_ptr, cache_ptr, slot, eps, KIND, D, ROTARY, WIDTH)


def insert_keys(
    keys_TD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    tokens: StepTokens,
    slots_T: torch.Tensor,
    cache: Paged,
) -> None:
    """Write each token's key to its slot (int64 [T], negative: nowhere), after norm and rotation.

    Keys bfloat16, float16 or float32, rows contiguous and as far apart as one likes; norm float32
    [D]; cos_sin float32 [positions, R], cosines then sines. Computed in float32 and rounded once,
    in the cache. Positions and slots past the tables are not checked. Raises ValueError for another
    layout, or a cache for other vectors.
    """
    tokens_count, size = keys_TD.shape
    constants = entry_constants(cache, size, cos_sin.shape[1])
    launch(
        insert_keys_kernel,
        (tokens_count,),
        keys_TD.device,
        keys_TD,
        norm_D,
        cos_sin,
        tokens.positions,
        slots_T,
        cache.memory,
        eps,
        STRIDE=row_stride(keys_TD, "keys"),
        num_warps=warps(constants["BLOCK"]),
        **constants,
    )


def warps(block: int) -> int:
    """16 values a thread: keys of 512 values are one warp's, whose sum needs no exchange through
    shared memory."""
    return max(1, block // 512)
