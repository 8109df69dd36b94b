"""Products of each head with a weight of its own, in plain torch."""

from __future__ import annotations

import torch


def head_linear(
    x_THK: torch.Tensor, weight_HNK: torch.Tensor, out_THN: torch.Tensor | None = None
) -> torch.Tensor:
    y_THN = torch.einsum("thk,hnk->thn", x_THK.float(), weight_HNK.float()).to(x_THK.dtype)
    return y_THN if out_THN is None else out_THN.copy_(y_THN)
