"""What every dense product asks of its operands."""

from __future__ import annotations

import torch

from quire.kernels.triton.gemm.epilogue import ACTIVATIONS
from quire.kernels.triton.rows import empty_rows


def check_operands(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    activation: str = "",
) -> torch.Tensor:
    """`out`, or a new tensor, for x W^T [T, N] ([T, N / 2] with an activation). Raises ValueError
    for shapes, dtypes or layouts that do not go together."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"kind: {activation!r} is not one of {', '.join(ACTIVATIONS[1:])}")
    tokens, (n, k) = x_TK.shape[0], weight_NK.shape
    if x_TK.dim() != 2 or x_TK.shape[1] != k:
        raise ValueError(f"x: expected [T, {k}], not {list(x_TK.shape)}")
    if x_TK.dtype != weight_NK.dtype:
        raise ValueError(f"x is {x_TK.dtype}, the weight {weight_NK.dtype}")
    if not weight_NK.is_contiguous():
        raise ValueError("weight: expected contiguous rows, one after the other")
    if bias is not None and (bias.shape != (n,) or bias.dtype != torch.float32):
        raise ValueError(f"bias: expected float32 [{n}], not {bias.dtype} {list(bias.shape)}")
    if activation != "" and n % 2:
        raise ValueError(f"weight: {n} rows are no gate and up")
    outputs = n if activation == "" else n // 2
    if out is None:
        return empty_rows(tokens, outputs, x_TK.dtype, x_TK.device)
    if out.shape != (tokens, outputs):
        raise ValueError(f"out: expected [{tokens}, {outputs}], not {list(out.shape)}")
    if out.dtype not in (x_TK.dtype, torch.float32):
        raise ValueError(f"out: expected {x_TK.dtype} or float32, not {out.dtype}")
    return out
