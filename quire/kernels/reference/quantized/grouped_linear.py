"""Linear layers of groups of columns with quantised weights in plain torch, group by group."""

from __future__ import annotations

import torch

from quire.kernels.reference.quantized.linear import quantized_linear
from quire.kernels.reference.quantized.weights import QuantizedWeight


def quantized_grouped_linear(x_TI: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """[T, G N] in x's dtype: each group of K columns of x [T, G K] times its own of the weights
    [G, N, K]."""
    groups = x_TI.chunk(weight.codes.shape[0], dim=1)
    return torch.cat([quantized_linear(x, weight[g]) for g, x in enumerate(groups)], dim=1)
