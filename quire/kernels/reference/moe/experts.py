"""The experts of quire.kernels.triton.moe in plain torch: pair by pair, float32 throughout."""

from __future__ import annotations

import torch

from quire.kernels.reference.activation.gated_activation import gated_activation


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: str,
    *,
    limit: float = 0.0,
    deterministic: bool = True,
) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for token, chosen in enumerate(ids.tolist()):
        for slot, expert in enumerate(chosen):
            inner = (gate_up[expert].float() @ x[token].float())[None]
            h = gated_activation(inner, kind, limit=limit)[0]
            out[token] += weights[token, slot] * (down[expert].float() @ h)
    return out.to(x.dtype)


def experts_small(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: str,
    limit: float = 0.0,
) -> torch.Tensor:
    return experts(x, weights, ids, gate_up, down, kind, limit=limit)
