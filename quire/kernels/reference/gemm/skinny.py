"""quire.kernels.triton.gemm.skinny in plain torch: same names and shapes, any number of tokens."""

from __future__ import annotations

import torch
from torch.nn import functional


def _into(out: torch.Tensor | None, result: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return result.to(dtype) if out is None else out.copy_(result)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x.float(), weight.float(), bias)


def _gated(y: torch.Tensor, kind: str) -> torch.Tensor:
    gate, up = y.chunk(2, dim=-1)
    if kind == "silu":
        return functional.silu(gate) * up
    if kind == "gelu_tanh":
        return functional.gelu(gate, approximate="tanh") * up
    raise ValueError(f"kind: {kind!r} is not one of silu, gelu_tanh")


def skinny_linear(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return _into(out, _product(x_TK, weight_NK, bias), x_TK.dtype)


def gated_linear(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    kind: str,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return _into(out, _gated(_product(x_TK, weight_NK, bias), kind), x_TK.dtype)


def add_norm_linear(
    x_TK: torch.Tensor | None,
    residual_TK: torch.Tensor,
    norm_weight_K: torch.Tensor,
    eps: float,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None = None,
    kind: str = "",
    normed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    residual = residual_TK if x_TK is None else residual_TK + x_TK
    values = residual.float()
    rms = (values.square().mean(-1, keepdim=True) + eps).sqrt()
    x = _into(normed, values / rms * norm_weight_K, residual.dtype)
    y = _product(x, weight_NK, bias)
    return (_gated(y, kind) if kind else y).to(residual.dtype), residual
