"""The router of quire.kernels.triton.moe in plain torch."""

from __future__ import annotations

import torch


def route(
    logits: torch.Tensor, experts_per_token: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    probabilities = logits.float().softmax(-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    weights = ordered[:, :experts_per_token]
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.contiguous(), ids[:, :experts_per_token].int().contiguous()
