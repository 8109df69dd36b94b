"""Products of e4m3 tokens with e4m3 weights in plain torch, on both's values in float32."""

from __future__ import annotations

import torch

from quire.kernels.reference.quantized.quantize import dequantize_rows
from quire.kernels.reference.quantized.weights import QuantizedWeight, dequantize


def scaled_gemm(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """(codes * scales) W^T + bias, [T, N] bfloat16."""
    y = dequantize_rows(codes, scales) @ dequantize(weight).T
    return (y if bias is None else y + bias).to(torch.bfloat16)
