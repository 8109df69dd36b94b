"""What a layer's projection gives for the tokens of a step, before they are in its cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NewTokens:
    """Arguments of rotary_cache but for the caches; shapes as there
    (quire/kernels/reference/ops.py)."""

    qkv: torch.Tensor
    positions: torch.Tensor
    cos_sin: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
    slots: torch.Tensor
    fixed: torch.Tensor | None = None

    def written(
        self,
        rotary_cache: Callable[..., torch.Tensor],
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> torch.Tensor:
        """Their queries, once `rotary_cache` has written their keys and values."""
        return rotary_cache(
            self.qkv, self.positions, self.cos_sin, self.q_norm, self.k_norm, self.eps,
            k_cache, v_cache, self.slots, self.fixed,
        )  # fmt: skip
