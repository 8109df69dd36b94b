"""Matrices whose rows may lie apart, as arguments of kernels that work row by row.

Kernels take the stride as a constant, since it is one of few per model and its divisors decide how
wide a load may be. Where rows begin at multiples of 16 bytes, loads are 16 bytes wide.

Hopper's copy engine takes longer for rows past the end of a matrix, which it fills with zeros, than
for rows that are there. So results that products read have room for whole tiles in their storage,
and what lies there is multiplied and never stored.
"""

from __future__ import annotations

import torch

TILE_ROWS = 64  # of the smallest tile on Hopper


def row_stride(x: torch.Tensor, name: str) -> int:
    """Elements from one row of `x` to the next. Raises ValueError unless `x` is a matrix with
    contiguous rows."""
    if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(
            f"{name}: expected a matrix with contiguous rows, not shape {list(x.shape)} "
            f"with strides {list(x.stride())}"
        )
    return x.stride(0)


def empty_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised matrix [rows, columns] with room for whole tiles behind it."""
    room = -(-rows // TILE_ROWS) * TILE_ROWS
    return torch.empty((room, columns), dtype=dtype, device=device)[:rows]


def rows_with_room(x: torch.Tensor, tile: int) -> int:
    """Rows of `x` and of the room behind it, up to whole tiles of `tile` rows."""
    stride = max(1, x.stride(0))
    storage = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    room = (storage - x.shape[1]) // stride + 1
    return max(len(x), min(-(-len(x) // tile) * tile, room))
