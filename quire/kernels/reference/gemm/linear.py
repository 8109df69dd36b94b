"""quire.kernels.triton.gemm.linear in plain torch: one way for every number of tokens."""

from __future__ import annotations

import torch

from quire.kernels.reference.gemm import skinny


def linear(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    deterministic: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return skinny.skinny_linear(x_TK, weight_NK, bias, out)


def gated_linear(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    kind: str,
    bias: torch.Tensor | None = None,
    *,
    deterministic: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return skinny.gated_linear(x_TK, weight_NK, kind, bias, out)


def add_norm_linear(
    x_TK: torch.Tensor | None,
    residual_TK: torch.Tensor,
    norm_weight_K: torch.Tensor,
    eps: float,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None = None,
    kind: str = "",
    normed: torch.Tensor | None = None,
    *,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return skinny.add_norm_linear(
        x_TK, residual_TK, norm_weight_K, eps, weight_NK, bias, kind, normed
    )
