"""Products of sorted pairs in e4m3 with their experts' e4m3 weights, in plain torch."""

from __future__ import annotations

import torch

from quire.kernels.reference.activation.gated_activation import gated_activation
from quire.kernels.reference.moe.align import Aligned
from quire.kernels.reference.quantized.quantize import dequantize_rows
from quire.kernels.reference.quantized.weights import QuantizedWeight, dequantize


def scaled_grouped_gemm(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: QuantizedWeight,
    aligned: Aligned,
    *,
    kind: str = "",
    limit: float = 0.0,
    bias: torch.Tensor | None = None,
    from_tokens: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Every pair's row times its expert's weight, plus its bias, [T * K, N] in `dtype`; the order
    of rows as in moe.grouped_gemm."""
    x, pairs = dequantize_rows(codes, scales), aligned.pairs.long()
    found = torch.empty(len(pairs), weight.n // (1 if kind == "" else 2), device=codes.device)
    for block in range(int(aligned.blocks)):
        start, end = int(aligned.starts[block]), int(aligned.ends[block])
        pair, expert = pairs[start:end], int(aligned.experts[block])
        rows = x[pair // aligned.experts_per_token] if from_tokens else x[start:end]
        y = rows @ dequantize(weight[expert]).T
        if bias is not None:
            y = y + bias[expert]
        y = y if kind == "" else gated_activation(y, kind, limit=limit)
        found[slice(start, end) if from_tokens else pair] = y
    return found.to(dtype)
