"""Matrices whose rows may lie apart, as arguments of kernels that work row by row.

Kernels take the stride as a constant, since it is one of few per model and its divisors decide how
wide a load may be. Where rows begin at multiples of 16 bytes, loads are 16 bytes wide.
"""

from __future__ import annotations

import torch


def row_stride(x: torch.Tensor, name: str) -> int:
    """Elements from one row of `x` to the next. Raises ValueError unless `x` is a matrix with
    contiguous rows."""
    if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(
            f"{name}: expected a matrix with contiguous rows, not shape {list(x.shape)} "
            f"with strides {list(x.stride())}"
        )
    return x.stride(0)
