"""Experts with e4m3 weights on e4m3 tokens in plain torch, expert by expert."""

from __future__ import annotations

import torch

from quire.kernels.reference.activation.gated_activation import gated_activation
from quire.kernels.reference.quantized.quantize import dequantize_rows, quantize
from quire.kernels.reference.quantized.weights import BLOCK, QuantizedWeight, dequantize


def scaled_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: QuantizedWeight,
    down: QuantizedWeight,
    kind: str,
    *,
    limit: float = 0.0,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    input_scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    """As quantized_experts, of tokens and inner values (rounded to bfloat16) that are quantised:
    with a scale for each row, for each 128 of its columns with fp8_block, or `input_scales`."""
    group = 0 if gate_up.format == "fp8" else BLOCK

    def rounded(rows: torch.Tensor, fixed: torch.Tensor | None) -> torch.Tensor:
        return dequantize_rows(*quantize(rows.to(torch.bfloat16), group, fixed=fixed))

    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(ids.flatten().tolist())):
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        h = rounded(x[tokens], input_scales[0]) @ dequantize(gate_up[expert]).T
        if gate_up_bias is not None:
            h = h + gate_up_bias[expert]
        h = rounded(gated_activation(h, kind, limit=limit), input_scales[1])
        y = h @ dequantize(down[expert]).T
        if down_bias is not None:
            y = y + down_bias[expert]
        out.index_add_(0, tokens, weights[tokens, slots, None] * y)
    return out.to(x.dtype)
