"""Softmax router: each token's most probable experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs

MAX_EXPERTS = 512
MAX_EXPERTS_PER_TOKEN = 16
# A warp has a whole row, so nothing of the row's order of sums depends on other rows.
ROWS = 4


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits_ptr,
    weights_ptr,
    ids_ptr,
    tokens,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)[None, :]
    slot = tl.arange(0, BLOCK_SLOTS)[None, :]
    inside = (token < tokens)[:, None] & (expert < E)
    wait_for_inputs(PDL)
    logits = tl.load(logits_ptr + token[:, None] * E + expert, mask=inside, other=0.0)
    logits = tl.where(expert < E, logits.to(tl.float32), -float("inf"))
    weight = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    weight = weight / tl.sum(weight, axis=1)[:, None]
    # One NaN makes all of a row's probabilities NaN.
    nan = tl.max((inside & (weight != weight)).to(tl.int32), axis=1) > 0
    # Probabilities are ordered as their bits are. -1 is an expert that is taken, or none at all.
    key = tl.where(nan[:, None], 0, weight.to(tl.int32, bitcast=True))
    key = tl.where(expert < E, key, -1)
    weights = tl.zeros((ROWS, BLOCK_SLOTS), tl.float32)
    ids = tl.zeros((ROWS, BLOCK_SLOTS), tl.int32)
    total = tl.zeros((ROWS,), tl.float32)
    for k in range(SLOTS):
        # Two reductions of integers, each one instruction of a warp; of equals the lower id.
        best = tl.max(key, axis=1)
        index = tl.min(tl.where(key == best[:, None], expert, BLOCK_E), axis=1)
        probability = tl.where(nan, float("nan"), best.to(tl.float32, bitcast=True))
        total += probability
        weights = tl.where(slot == k, probability[:, None], weights)
        ids = tl.where(slot == k, index[:, None], ids)
        key = tl.where(expert == index[:, None], -1, key)
    if NORMALIZE:
        weights = weights / total[:, None]
    offset = token[:, None] * SLOTS + slot
    inside = (token < tokens)[:, None] & (slot < SLOTS)
    tl.store(weights_ptr + offset, weights, mask=inside)
    tl.store(ids_ptr + offset, ids, mask=inside)


def route(
    logits: torch.Tensor, experts_per_token: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32 [T, K], ids int32 [T, K]) of each token's K most probable experts.

    `logits` [T, E], bfloat16, float16 or float32, contiguous. The softmax over all experts is in
    float32; the most probable comes first, of equals the lower id. `normalize`: a token's weights
    are scaled to sum to 1. A row that holds NaN gets distinct ids and NaN weights. Raises
    ValueError where E or K is beyond what the kernel holds in registers.
    """
    t, e = logits.shape
    if not 1 <= e <= MAX_EXPERTS:
        raise ValueError(f"logits: {e} experts, 1 to {MAX_EXPERTS} can be routed to")
    if not 1 <= experts_per_token <= min(e, MAX_EXPERTS_PER_TOKEN):
        raise ValueError(
            f"experts_per_token: {experts_per_token} is not in 1 to {min(e, MAX_EXPERTS_PER_TOKEN)}"
        )
    weights = torch.empty((t, experts_per_token), dtype=torch.float32, device=logits.device)
    ids = torch.empty((t, experts_per_token), dtype=torch.int32, device=logits.device)
    launch(
        route_kernel,
        (triton.cdiv(t, ROWS),),
        logits.device,
        logits.contiguous(),
        weights,
        ids,
        t,
        E=e,
        SLOTS=experts_per_token,
        NORMALIZE=normalize,
        ROWS=ROWS,
        BLOCK_E=max(2, triton.next_power_of_2(e)),
        BLOCK_SLOTS=triton.next_power_of_2(experts_per_token),
        num_warps=4,
    )
    return weights, ids
