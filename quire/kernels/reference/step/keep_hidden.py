"""Reference of quire/kernels/triton/step/keep_hidden.py."""

from __future__ import annotations

import torch


def keep_hidden(hidden_TH: torch.Tensor, kept: torch.Tensor, spoiled: torch.Tensor) -> None:
    tokens = hidden_TH.shape[0]
    kept[:tokens] = hidden_TH
    spoiled[:tokens] = ~torch.isfinite(hidden_TH).all(1)
