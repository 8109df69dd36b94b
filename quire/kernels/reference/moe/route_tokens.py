"""DeepSeek V4's router: scores are square roots of softplus, experts may follow from the token."""

from __future__ import annotations

import torch


def route_tokens(
    logits_TE: torch.Tensor,
    tokens_T: torch.Tensor,
    table_VK: torch.Tensor | None,
    bias_E: torch.Tensor | None,
    experts_per_token: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32 [T, K], ids int32 [T, K]).

    A token's experts are its row of the `table` (int64 [V, K]) where there is one; else those with
    the highest score + bias, the best first and of equals the one that comes first. Weights are the
    experts' scores, without the bias, over their sum, times `scale`.
    """
    logits = logits_TE.float()
    # softplus, of operations that round each value by itself (see reference/streams/mixing.py).
    scores = (logits.clamp(min=0) + torch.log1p(torch.exp(-logits.abs()))).sqrt()
    if table_VK is None:
        choice = scores if bias_E is None else scores + bias_E
        order = choice.sort(dim=-1, descending=True, stable=True).indices
        ids_TK = order[:, :experts_per_token]
    else:
        ids_TK = table_VK[tokens_T]
    weights = scores.gather(1, ids_TK)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * scale
    return weights, ids_TK.to(torch.int32, memory_format=torch.contiguous_format)
