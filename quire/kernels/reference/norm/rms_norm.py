"""The RMS norms of quire.kernels.triton.norm.rms_norm in plain torch."""

from __future__ import annotations

import torch


def rms_norm(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    x = x_TH.float()
    y = (x / (x.pow(2).mean(dim=1, keepdim=True) + eps).sqrt() * weight_H).to(x_TH.dtype)
    return y if out is None else out.copy_(y)


def add_rms_norm(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    x_norm: torch.Tensor | None = None,
) -> torch.Tensor:
    x = x_TH if x_norm is None else rms_norm(x_TH, x_norm, eps)
    residual_TH.copy_(residual_TH.float() + x.float())
    return rms_norm(residual_TH, weight_H, eps).to(x_TH.dtype)
