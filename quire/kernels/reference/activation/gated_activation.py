"""The gated activation of quire.kernels.triton.activation in plain torch."""

from __future__ import annotations

import torch
from torch.nn import functional


def gated_activation(x: torch.Tensor, kind: str, out: torch.Tensor | None = None) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    if kind == "silu":
        y = functional.silu(gate) * up
    elif kind == "gelu_tanh":
        y = functional.gelu(gate, approximate="tanh") * up
    else:
        raise ValueError(f"kind: {kind!r} is not one of silu, gelu_tanh")
    return y.to(x.dtype) if out is None else out.copy_(y)
