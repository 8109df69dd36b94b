"""The token embedding of quire.kernels.triton.embedding in plain torch."""

from __future__ import annotations

import torch


def embedding(ids_T: torch.Tensor, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    rows = table.index_select(0, ids_T.clamp(0, len(table) - 1))
    return (rows.float() * scale).to(table.dtype)
