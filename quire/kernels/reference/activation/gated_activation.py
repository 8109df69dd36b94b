"""The gated activation of quire.kernels.triton.activation in plain torch."""

from __future__ import annotations

import torch
from torch.nn import functional

# gpt-oss's clamped SwiGLU (its model card and transformers' GptOssExperts).
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0


def limit_of(kind: str, limit: float = 0.0) -> float:
    """What a layer clamps the inputs of its activation at: the `limit` that it names, else what
    belongs to the kind, 0 where it does not clamp."""
    return limit or (SWIGLU_LIMIT if kind == "swiglu_oai" else 0.0)


def gated_activation(
    x: torch.Tensor, kind: str, out: torch.Tensor | None = None, limit: float = 0.0
) -> torch.Tensor:
    # Halves of one tensor, since torch then works row by row: it rounds the ends of an array
    # otherwise than the rest, and a row's bits are not to depend on the others.
    gate, up = x.to(torch.float32, copy=limit > 0).chunk(2, dim=-1)
    if limit > 0:
        gate.clamp_(max=limit)
        up.clamp_(-limit, limit)
    if kind == "swiglu_oai":
        y = gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
    elif kind == "silu":
        y = functional.silu(gate) * up
    elif kind == "gelu_tanh":
        y = functional.gelu(gate, approximate="tanh") * up
    else:
        raise ValueError(f"kind: {kind!r} is not one of silu, gelu_tanh, swiglu_oai")
    return y.to(x.dtype) if out is None else out.copy_(y)
