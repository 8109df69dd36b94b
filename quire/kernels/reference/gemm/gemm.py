"""quire.kernels.triton.gemm.gemm in plain torch. Its bits are torch's, not the kernel's."""

from __future__ import annotations

import torch

from quire.kernels.reference.gemm.skinny import gated_linear, skinny_linear


def gemm(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    gated: str = "",
) -> torch.Tensor:
    if gated:
        return gated_linear(x_TK, weight_NK, gated, bias, out)
    return skinny_linear(x_TK, weight_NK, bias, out)
