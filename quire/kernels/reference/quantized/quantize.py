"""Activations quantised to e4m3 in plain torch."""

from __future__ import annotations

import torch

from quire.kernels.reference.activation.gated_activation import gated_activation
from quire.kernels.reference.norm.rms_norm import add_rms_norm, rms_norm

LARGEST = 448.0


def quantize(
    x: torch.Tensor,
    group: int = 0,
    *,
    power_of_two: bool = False,
    fixed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float8_e4m3fn [T, K] and scales float32 [T], or [ceil(K / group), T]."""
    rows, columns = x.shape
    if fixed is not None:
        codes = (x.float() / fixed).clamp(-LARGEST, LARGEST)
        return codes.to(torch.float8_e4m3fn), fixed.expand(rows).contiguous()
    width = group or max(1, columns)
    padded = torch.nn.functional.pad(x.float(), (0, -columns % width))
    padded = padded.view(rows, -(-columns // width), width)
    scales = padded.abs().amax(-1) / LARGEST
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    if power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    codes = (padded / scales[:, :, None]).flatten(1)[:, :columns]
    scales = scales[:, 0] if group == 0 else scales.t()
    return codes.to(torch.float8_e4m3fn), scales.contiguous()


def gated_activation_quantize(
    x: torch.Tensor,
    kind: str,
    group: int = 0,
    *,
    limit: float = 0.0,
    power_of_two: bool = False,
    fixed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = gated_activation(x, kind, limit=limit)
    return quantize(y, group, power_of_two=power_of_two, fixed=fixed)


def add_rms_norm_quantize(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group: int = 0,
    *,
    power_of_two: bool = False,
    fixed: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    given = (residual, weight, eps)
    y = rms_norm(*given) if x is None else add_rms_norm(x, *given)
    if normed is not None:
        normed.copy_(y)
    return quantize(y, group, power_of_two=power_of_two, fixed=fixed)


def dequantize_rows(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [T, K] of what `quantize` gives."""
    if scales.dim() == 1:
        return codes.float() * scales[:, None]
    by_column = scales.t().repeat_interleave(128, dim=1)[:, : codes.shape[1]]
    return codes.float() * by_column
