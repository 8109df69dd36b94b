"""The gated activation of quire.kernels.triton.activation in plain torch."""

from __future__ import annotations

import torch
from torch.nn import functional

# gpt-oss's clamped SwiGLU (its model card and transformers' GptOssExperts).
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0


def gated_activation(x: torch.Tensor, kind: str, out: torch.Tensor | None = None) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    if kind == "silu":
        y = functional.silu(gate) * up
    elif kind == "gelu_tanh":
        y = functional.gelu(gate, approximate="tanh") * up
    elif kind == "clamped_swiglu":
        gate = gate.clamp(max=SWIGLU_LIMIT)
        up = up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        y = gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
    else:
        raise ValueError(f"kind: {kind!r} is not one of silu, gelu_tanh, clamped_swiglu")
    return y.to(x.dtype) if out is None else out.copy_(y)
