"""DeepSeek V4's router: scores are square roots of softplus, experts may follow from the token."""

from __future__ import annotations

import torch


def route_tokens(
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor | None,
    bias_E: torch.Tensor | None,
    experts_per_token: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32 [T, K], ids int64 [T, K]).

    `ids` are given where a table has them; else the experts with the highest score + bias are
    chosen, the best first and of equals the one that comes first. Weights are the experts' scores,
    without the bias, over their sum, times `scale`.
    """
    logits = logits_TE.float()
    # softplus, of operations that round each value by itself (see reference/streams/mixing.py).
    scores = (logits.clamp(min=0) + torch.log1p(torch.exp(-logits.abs()))).sqrt()
    if ids_TK is None:
        choice = scores if bias_E is None else scores + bias_E
        order = choice.sort(dim=-1, descending=True, stable=True).indices
        ids_TK = order[:, :experts_per_token].contiguous()
    weights = scores.gather(1, ids_TK)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * scale, ids_TK
