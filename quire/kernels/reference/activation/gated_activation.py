"""The gated activation of quire.kernels.triton.activation in plain torch."""

from __future__ import annotations

import torch
from torch.nn import functional


def gated_activation(
    x: torch.Tensor, kind: str, out: torch.Tensor | None = None, limit: float = 0.0
) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if kind == "swiglu_oai":
        y = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    elif kind == "silu":
        y = functional.silu(gate) * up
    elif kind == "gelu_tanh":
        y = functional.gelu(gate, approximate="tanh") * up
    else:
        raise ValueError(f"kind: {kind!r} is not one of silu, gelu_tanh, swiglu_oai")
    return y.to(x.dtype) if out is None else out.copy_(y)
