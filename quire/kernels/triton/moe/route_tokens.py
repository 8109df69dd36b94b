"""DeepSeek V4's router: scores are square roots of softplus, experts may follow from the token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.moe.route import MAX_EXPERTS, MAX_EXPERTS_PER_TOKEN


@triton.jit
def _scores(logits):
    """sqrt(log(1 + exp(logits)))."""
    x = tl.exp(-tl.abs(logits))
    # What 1 + x loses of x is given back (Kahan): log(1 + x) with all digits, however small x is.
    u = 1.0 + x
    lost = u == 1.0
    log = tl.where(lost, x, tl.log(u) * (x / tl.where(lost, 1.0, u - 1.0)))
    return tl.sqrt_rn(tl.maximum(logits, 0.0) + log)


@triton.jit
def route_tokens_kernel(
    logits_ptr,
    tokens_ptr,
    table_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    scale,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has a token."""
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_SLOTS)
    inside = slot < SLOTS
    if table_ptr is not None:
        wait_for_inputs(PDL)
        token = tl.load(tokens_ptr + row).to(tl.int64)
        ids = tl.load(table_ptr + token * SLOTS + slot, mask=inside, other=0).to(tl.int32)
        logits = tl.load(logits_ptr + row * E + ids, mask=inside, other=0.0).to(tl.float32)
        weights = tl.where(inside, _scores(logits), 0.0)
    else:
        expert = tl.arange(0, BLOCK_E)
        exists = expert < E
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + expert, mask=exists, other=0.0)
        wait_for_inputs(PDL)
        logits = tl.load(logits_ptr + row * E + expert, mask=exists, other=0.0).to(tl.float32)
        scores = _scores(logits)
        choice = scores + bias
        # What is no number takes part last, so that experts are distinct whatever the logits are.
        choice = tl.where(choice == choice, choice, -3e38)
        choice = tl.where(exists, choice, -float("inf"))
        weights = tl.zeros([BLOCK_SLOTS], tl.float32)
        ids = tl.zeros([BLOCK_SLOTS], tl.int32)
        for k in range(SLOTS):
            best = tl.min(tl.where(choice == tl.max(choice, axis=0), expert, BLOCK_E), axis=0)
            score = tl.sum(tl.where(expert == best, scores, 0.0), axis=0)
            weights = tl.where(slot == k, score, weights)
            ids = tl.where(slot == k, best, ids)
            choice = tl.where(expert == best, -float("inf"), choice)
        nan = tl.max((exists & (logits != logits)).to(tl.int32), axis=0) > 0
        weights = tl.where(nan, float("nan"), weights)
    total = tl.sum(tl.where(inside, weights, 0.0), axis=0)
    weights = weights / (total + 1e-20) * scale
    tl.store(weights_ptr + row * SLOTS + slot, weights, mask=inside)
    tl.store(ids_ptr + row * SLOTS + slot, ids, mask=inside)


def route_tokens(
    logits_TE: torch.Tensor,
    tokens_T: torch.Tensor,
    table_VK: torch.Tensor | None,
    bias_E: torch.Tensor | None,
    experts_per_token: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32 [T, K], ids int32 [T, K]).

    logits [T, E] of any float type; `tokens` integers [T], each a row of `table` int64 [V, K],
    which names its experts; without a table those are chosen that have the highest score + `bias`
    (float32 [E]), the best first and of equals the lower id. Scores, in float32, are
    sqrt(softplus(logits)); weights are the chosen ones' over their sum, times `scale`. A row that
    holds NaN gets distinct ids and NaN weights, with a table if it is among them. Raises ValueError
    for numbers of experts that do not fit the kernel, and for a table of another width.
    """
    rows, e = logits_TE.shape
    if not 1 <= e <= MAX_EXPERTS or not 1 <= experts_per_token <= min(e, MAX_EXPERTS_PER_TOKEN):
        raise ValueError(f"{experts_per_token} of {e} experts cannot be routed to")
    if table_VK is not None and table_VK.shape[1] != experts_per_token:
        raise ValueError(f"table: {table_VK.shape[1]} experts a token, not {experts_per_token}")
    device = logits_TE.device
    weights = torch.empty((rows, experts_per_token), dtype=torch.float32, device=device)
    ids = torch.empty((rows, experts_per_token), dtype=torch.int32, device=device)
    launch(
        route_tokens_kernel,
        (rows,),
        device,
        logits_TE.contiguous(),
        tokens_T.contiguous(),
        None if table_VK is None else table_VK.contiguous(),
        bias_E,
        weights,
        ids,
        scale,
        E=e,
        SLOTS=experts_per_token,
        BLOCK_E=triton.next_power_of_2(e),
        BLOCK_SLOTS=triton.next_power_of_2(experts_per_token),
        num_warps=1,
    )
    return weights, ids
