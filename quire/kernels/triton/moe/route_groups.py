"""Router among groups of experts (DeepSeek-V2, section 2.2.2; DeepSeek-V3, section 2.1.2)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.moe.route import MAX_EXPERTS, MAX_EXPERTS_PER_TOKEN


@triton.jit
def _first_largest(x, index, LAST: tl.constexpr):
    """The lowest `index` of the largest of x, which is [G] or [G, S] without NaN."""
    return tl.min(tl.where(x == tl.max(x, axis=None), index, LAST), axis=None)


@triton.jit
def route_groups_kernel(
    logits_ptr,
    correction_ptr,
    weights_ptr,
    ids_ptr,
    scale,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has a token, its experts [groups, experts of a group]."""
    let_next_start(PDL)
    SIZE: tl.constexpr = E // GROUPS
    infinity = float("inf")
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_GROUPS)
    member = tl.arange(0, BLOCK_SIZE)[None, :]
    exists = (group < GROUPS)[:, None] & (member < SIZE)
    expert = tl.where(exists, group[:, None] * SIZE + member, E)
    correction = 0.0
    if correction_ptr is not None:
        correction = tl.load(correction_ptr + expert, mask=exists, other=0.0)
    wait_for_inputs(PDL)
    logits = tl.load(logits_ptr + token * E + expert, mask=exists, other=0.0).to(tl.float32)
    nan = tl.max((logits != logits).to(tl.int32), axis=None) > 0
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        logits = tl.where(exists, logits, -infinity)
        scores = tl.exp(logits - tl.max(logits, axis=None))
        scores = scores / tl.sum(scores, axis=None)
    choice = scores + correction
    # What is no number takes part as 0; infinite logits of a softmax give such scores, too.
    choice = tl.where(exists, tl.where(choice == choice, choice, 0.0), -infinity)

    worth = tl.max(choice, axis=1)
    if correction_ptr is not None:
        first = tl.min(tl.where(choice == worth[:, None], member, BLOCK_SIZE), axis=1)
        others = tl.where(member == first[:, None], -infinity, choice)
        worth += tl.max(others, axis=1)
    kept = tl.zeros([BLOCK_GROUPS], tl.int32)
    for _ in range(TOP_GROUPS):
        top = _first_largest(worth, group, BLOCK_GROUPS)
        kept = tl.where(group == top, 1, kept)
        worth = tl.where(group == top, -infinity, worth)
    choice = tl.where(kept[:, None] > 0, choice, -infinity)

    slot = tl.arange(0, BLOCK_SLOTS)
    weights = tl.zeros([BLOCK_SLOTS], tl.float32)
    ids = tl.zeros([BLOCK_SLOTS], tl.int32)
    total = 0.0
    for k in range(SLOTS):
        best = _first_largest(choice, expert, E)
        score = tl.sum(tl.where(expert == best, scores, 0.0), axis=None)
        total += score
        weights = tl.where(slot == k, score, weights)
        ids = tl.where(slot == k, best, ids)
        choice = tl.where(expert == best, -infinity, choice)
    if NORMALIZE:
        weights = weights / (total + 1e-20)
    weights = tl.where(nan, float("nan"), weights * scale)
    tl.store(weights_ptr + token * SLOTS + slot, weights, mask=slot < SLOTS)
    tl.store(ids_ptr + token * SLOTS + slot, ids, mask=slot < SLOTS)


def route_groups(
    logits: torch.Tensor,
    correction: torch.Tensor | None,
    experts_per_token: int,
    groups: int,
    top_groups: int,
    sigmoid: bool,
    normalize: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32 [T, K], ids int32 [T, K]), the best expert first.

    logits [T, E] of any float type, contiguous; scores are their sigmoid or softmax, in float32.
    `correction` float32 [E] is added to scores where experts are chosen, never to weights. Only
    experts of each token's `top_groups` best of `groups` groups of neighbours are chosen: a group
    is as good as its best expert, with a correction as its two best together. Of equals the lower
    comes first. `normalize`: a token's weights sum to 1, before all are multiplied by `scale`.
    A row that holds NaN gets distinct ids and NaN weights. Raises ValueError for numbers of
    experts and groups that do not go together or do not fit the kernel.
    """
    tokens, e = logits.shape
    if not 1 <= e <= MAX_EXPERTS or not 1 <= experts_per_token <= MAX_EXPERTS_PER_TOKEN:
        raise ValueError(f"{experts_per_token} of {e} experts cannot be routed to")
    size = e // groups
    if e % groups or top_groups > groups or experts_per_token > top_groups * size:
        raise ValueError(f"{experts_per_token} of {e} experts from {top_groups} of {groups} groups")
    if correction is not None and size < 2:
        raise ValueError("groups of one expert have no two best")
    weights = torch.empty((tokens, experts_per_token), dtype=torch.float32, device=logits.device)
    ids = torch.empty((tokens, experts_per_token), dtype=torch.int32, device=logits.device)
    launch(
        route_groups_kernel,
        (tokens,),
        logits.device,
        logits.contiguous(),
        correction,
        weights,
        ids,
        scale,
        E=e,
        SLOTS=experts_per_token,
        GROUPS=groups,
        TOP_GROUPS=top_groups,
        SIGMOID=sigmoid,
        NORMALIZE=normalize,
        BLOCK_GROUPS=triton.next_power_of_2(groups),
        BLOCK_SIZE=triton.next_power_of_2(size),
        BLOCK_SLOTS=triton.next_power_of_2(experts_per_token),
        num_warps=1,
    )
    return weights, ids
