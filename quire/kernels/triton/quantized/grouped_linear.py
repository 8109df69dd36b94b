"""A linear layer of each group of the inputs by itself, with quantised weights."""

from __future__ import annotations

import torch

from quire.kernels.triton.quantized.linear import quantized_linear
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.kernels.triton.quantized.skinny import MAX_TOKENS, skinny_groups
from quire.kernels.triton.rows import empty_rows


def quantized_grouped_linear(
    x_TI: torch.Tensor, weight: PackedQuantized, *, deterministic: bool
) -> torch.Tensor:
    """[T, G N] bfloat16 of x [T, G K] and a stack of weights [G, N, K]: the products of each group
    of K columns with its own weight, side by side.

    Few tokens take one launch for all groups, others and deterministic mode one product for each
    (quantized_linear). Raises ValueError for operands that do not go together.
    """
    if not deterministic and x_TI.shape[0] <= MAX_TOKENS:
        return skinny_groups(x_TI, weight)
    groups, n, k = weight.experts, weight.n, weight.k
    if groups is None or x_TI.shape[1] != groups * k:
        raise ValueError(f"x: {list(x_TI.shape)} is not [T, {groups} * {k}]")
    out = empty_rows(x_TI.shape[0], groups * n, x_TI.dtype, x_TI.device)
    for group in range(groups):
        part = x_TI[:, group * k : (group + 1) * k]
        into = out[:, group * n : (group + 1) * n]
        quantized_linear(part, weight.one(group), deterministic=deterministic, out=into)
    return out
