"""Experts with quantised weights in plain torch, expert by expert, on the values in float32."""

from __future__ import annotations

import torch

from quire.kernels.reference.activation.gated_activation import gated_activation
from quire.kernels.reference.quantized.weights import QuantizedWeight, dequantize


def quantized_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: QuantizedWeight,
    down: QuantizedWeight,
    kind: str,
    *,
    limit: float = 0.0,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum over k of weights[t, k] * (down[e] @ h + down_bias[e]) with h = the activation of
    gate_up[e] @ x[t] + gate_up_bias[e] and e = ids[t, k], in x's dtype."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(ids.flatten().tolist())):
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        h = x[tokens].float() @ dequantize(gate_up[expert]).T
        if gate_up_bias is not None:
            h = h + gate_up_bias[expert]
        h = gated_activation(h, kind, limit=limit)
        y = h @ dequantize(down[expert]).T
        if down_bias is not None:
            y = y + down_bias[expert]
        out.index_add_(0, tokens, weights[tokens, slots, None] * y)
    return out.to(x.dtype)
