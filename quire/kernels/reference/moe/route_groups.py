"""The router of quire.kernels.triton.moe that chooses among groups of experts, in plain torch."""

from __future__ import annotations

import torch


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

    logits [T, E]; scores are their sigmoid or softmax, in float32. `correction` float32 [E] is
    added to scores where experts are chosen, never to weights (DeepSeek-V3, section 2.1.2). Only
    experts of each token's `top_groups` best of `groups` groups of neighbours are chosen: a group
    is as good as its best expert, with a correction as its two best together. Of equals the lower
    comes first. `normalize`: a token's weights sum to 1, before all are multiplied by `scale`.
    A row that holds NaN gets distinct ids and NaN weights.
    """
    tokens, experts = logits.shape
    logits = logits.float()
    # torch's sigmoid rounds by a value's place in the tensor: this runs on CPUs that promise bits.
    scores = 1 / (1 + torch.exp(-logits)) if sigmoid else logits.softmax(-1)
    choice = scores if correction is None else scores + correction
    choice = choice.nan_to_num(nan=0.0)
    grouped = choice.view(tokens, groups, experts // groups)
    best = grouped.sort(dim=-1, descending=True).values[..., : 1 if correction is None else 2]
    worth = best[..., 0] if best.shape[-1] == 1 else best[..., 0] + best[..., 1]
    chosen = worth.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, chosen, True)
    choice = grouped.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)
    order = choice.sort(dim=-1, descending=True, stable=True).indices
    ids = order[:, :experts_per_token].contiguous()
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    spoiled = logits.isnan().any(-1, keepdim=True)
    return (weights * scale).masked_fill(spoiled, torch.nan), ids.int()
