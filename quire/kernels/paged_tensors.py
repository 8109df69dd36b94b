"""The memory of one pool as the copies of pages see it: bytes, whatever the caches are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

WORD = torch.int64  # copies are in words of this


@dataclass(frozen=True)
class PagedTensors:
    """`tensors`: int64 [blocks, words of a block] over the memory of each tensor of a pool. A page
    is all words of a block, tensor after tensor: `page_words` of them. `table`: int64 [tensors, 3]
    on the device: address, words of a block, and where in the page they begin."""

    tensors: tuple[torch.Tensor, ...]
    table: torch.Tensor
    page_words: int

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> PagedTensors:
        """Over contiguous tensors whose first dimension is the block. Raises ValueError where the
        bytes of a block are not a multiple of 8."""
        rows = tuple(tensor.view(tensor.shape[0], -1).view(WORD) for tensor in tensors)
        table, begins = [], 0
        for row in rows:
            table.append([row.data_ptr(), row.shape[1], begins])
            begins += row.shape[1]
        device = rows[0].device
        return cls(rows, torch.tensor(table, dtype=torch.int64, device=device), begins)
