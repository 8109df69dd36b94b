"""Products of each head with a weight of its own, in plain torch."""

from __future__ import annotations

import torch


def head_linear(x_THK: torch.Tensor, weight_HNK: torch.Tensor, out_THN: torch.Tensor) -> None:
    out_THN.copy_(torch.einsum("thk,hnk->thn", x_THK.float(), weight_HNK.float()))
