"""Linear layers with quantised weights in plain torch, on the weight's values in float32."""

from __future__ import annotations

import torch

from quire.kernels.reference.activation.gated_activation import gated_activation
from quire.kernels.reference.quantized.weights import QuantizedWeight, dequantize


def quantized_linear(
    x_TK: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None = None,
    *,
    kind: str = "",
    limit: float = 0.0,
) -> torch.Tensor:
    """x W^T + bias, or with a `kind` the activation of gate and up, in x's dtype."""
    y = x_TK.float() @ dequantize(weight).T
    if bias is not None:
        y = y + bias
    if kind:
        y = gated_activation(y, kind, limit=limit)
    return y.to(x_TK.dtype)
