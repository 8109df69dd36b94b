"""Experts of very few tokens: each pair reads its expert's weights by itself, at bus speed.

Two launches of matrix-vector products without tensor cores: gate and up with the activation, then
down with the weighted sum over a token's slots. Nothing is sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.gemm.epilogue import activate
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.moe.operands import check_experts

# Rows of a weight (of gate and of up, or of down) that a program has. A thread has the same 8
# elements of each row, so x is in its registers once, and 2 * 4 loads of 16 bytes (gate and up) or
# 4 of one slot and 4 of the next (down) are in flight: about 50 KB on each multiprocessor.
ROWS = 4


@triton.jit
def gate_up_small_kernel(
    x_ptr,
    ids_ptr,
    weight_ptr,
    h_ptr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    SLOTS: tl.constexpr,
    KIND: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    # Pairs are the grid's fast axis: those with the same expert read its rows at the same time.
    pair = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    wait_for_inputs(PDL)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    x_ptrs = x_ptr + (pair // SLOTS).to(tl.int64) * H
    row_ptrs = weight_ptr + (expert * (2 * I) + row)[:, None] * H
    gate_sums = tl.zeros((ROWS, DEPTH), tl.float32)
    up_sums = tl.zeros((ROWS, DEPTH), tl.float32)
    for step in tl.static_range(0, H, DEPTH):
        k = step + tl.arange(0, DEPTH)
        inside = (row < I)[:, None] & (k < H)[None, :]
        gate_ptrs = row_ptrs + k[None, :]
        x = tl.load(x_ptrs + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
        gate = tl.load(gate_ptrs, mask=inside, other=0.0, eviction_policy="evict_first")
        up = tl.load(gate_ptrs + I * H, mask=inside, other=0.0, eviction_policy="evict_first")
        gate_sums += gate.to(tl.float32) * x
        up_sums += up.to(tl.float32) * x
    h = activate(tl.sum(gate_sums, axis=1), tl.sum(up_sums, axis=1), KIND, LIMIT)
    h_ptrs = h_ptr + pair.to(tl.int64) * I + row
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=row < I)


@triton.jit
def _down_loads(
    h_ptr,
    ids_ptr,
    weight_ptr,
    pair,
    row,
    k,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
):
    """A pair's elements k of h, and of rows `row` of its expert's weight."""
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    h = tl.load(h_ptr + pair * I + k, mask=k < I, other=0.0)
    weight = tl.load(
        weight_ptr + (expert * H + row)[:, None] * I + k[None, :],
        mask=(row < H)[:, None] & (k < I)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    return h, weight


@triton.jit
def down_small_kernel(
    h_ptr,
    ids_ptr,
    weights_ptr,
    weight_ptr,
    out_ptr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    wait_for_inputs(PDL)
    first = token * SLOTS
    steps: tl.constexpr = (I + DEPTH - 1) // DEPTH
    sums = tl.zeros((ROWS, DEPTH), tl.float32)
    h, weight = _down_loads(h_ptr, ids_ptr, weight_ptr, first, row, depth, H, I)
    # Unrolled: each step's loads are issued before the one before it is used.
    for step in tl.static_range(SLOTS * steps):
        slot_weight = tl.load(weights_ptr + first + step // steps)
        product = weight.to(tl.float32) * h.to(tl.float32)[None, :]
        if step + 1 < SLOTS * steps:
            pair = first + (step + 1) // steps
            k = (step + 1) % steps * DEPTH + depth
            h, weight = _down_loads(h_ptr, ids_ptr, weight_ptr, pair, row, k, H, I)
        sums += slot_weight * product
    y = tl.sum(sums, axis=1)
    tl.store(out_ptr + token * H + row, y.to(out_ptr.dtype.element_ty), mask=row < H)


def sizes(k: int) -> dict[str, int]:
    """Depth of a step over rows of `k` elements, and warps: 8 elements for each thread."""
    depth = min(1024, int(triton.next_power_of_2(k)))
    return {"ROWS": ROWS, "DEPTH": depth, "num_warps": max(1, depth // 256)}


def experts_small(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: str,
    limit: float = 0.0,
) -> torch.Tensor:
    """What `experts` computes, [T, H] in x's dtype, for up to about 64 pairs.

    x [T, H], `weights` float32 [T, K], `ids` int32 [T, K], `gate_up` [E, 2 I, H] with gate rows
    first, `down` [E, H, I], all contiguous; `limit` as in gated_activation. Sums are in float32, a
    token's slots in their order; only act(gate) * up and the result are rounded to x's dtype.
    Raises ValueError for what does not go together.
    """
    check_experts(x, weights, ids, gate_up, down, kind)
    (t, slots), hidden, intermediate = ids.shape, x.shape[1], down.shape[2]
    h = torch.empty((t * slots, intermediate), dtype=x.dtype, device=x.device)
    out = torch.empty_like(x)
    launch(
        gate_up_small_kernel,
        (t * slots, triton.cdiv(intermediate, ROWS)),
        x.device,
        x,
        ids,
        gate_up,
        h,
        H=hidden,
        I=intermediate,
        SLOTS=slots,
        KIND=kind,
        LIMIT=limit,
        **sizes(hidden),
    )
    launch(
        down_small_kernel,
        (t, triton.cdiv(hidden, ROWS)),
        x.device,
        h,
        ids,
        weights,
        down,
        out,
        H=hidden,
        I=intermediate,
        SLOTS=slots,
        **sizes(intermediate),
    )
    return out
