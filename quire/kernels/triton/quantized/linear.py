"""Linear layers with quantised weights by whichever kernel is fastest for the number of tokens, or
by the one that gives the same bits for all of them."""

from __future__ import annotations

import torch

from quire.kernels.triton.activation.gated_activation import gated_activation
from quire.kernels.triton.gemm.shared import is_hopper
from quire.kernels.triton.quantized import quantize
from quire.kernels.triton.quantized.gemm import quantized_gemm
from quire.kernels.triton.quantized.operands import check_linear
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.kernels.triton.quantized.scaled_gemm import library_scaled, scaled_gemm
from quire.kernels.triton.quantized.skinny import skinny


def skinny_crossing(format: str) -> int:
    """Most tokens for which `skinny` serves a weight; quantized_gemm and e4m3 products above.
    Estimates until measured with benchmarks/gpu/quantized.py."""
    return 32


def library_crossing(n: int, k: int) -> int:
    """Tokens from which torch's own e4m3 product serves a weight [n, k]. An estimate until measured
    with benchmarks/gpu/quantized.py."""
    return 512


def takes_quantized_tokens(weight: PackedQuantized, tokens: int, device: torch.device) -> bool:
    """Whether quantized_linear would quantise its tokens too: then a kernel before it may do that
    as it stores them. Not in deterministic mode, where every number of tokens takes one kernel."""
    return (
        weight.format in ("fp8", "fp8_block")
        and is_hopper(device)
        and tokens > skinny_crossing(weight.format)
    )


def scaled_linear(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: PackedQuantized,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias, [T, N] bfloat16, of tokens that quantize gave codes and scales."""
    if weight.format == "fp8" and codes.shape[0] >= library_crossing(weight.n, weight.k):
        return library_scaled(codes, scales, weight, bias)
    return scaled_gemm(codes, scales, weight, bias)


def quantized_linear(
    x_TK: torch.Tensor,
    weight: PackedQuantized,
    bias: torch.Tensor | None = None,
    *,
    deterministic: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias, [T, N] bfloat16; operands as in `skinny`, any number of tokens.

    Many tokens of an fp8 or fp8_block weight are quantised too on Hopper, each by itself.
    `deterministic`: they never are, and a row's bits depend on nothing but the row and the weight.
    Raises ValueError for operands that do not go together.
    """
    if deterministic:
        return quantized_gemm(x_TK, weight, bias, out)
    if x_TK.shape[0] <= skinny_crossing(weight.format):
        return skinny(x_TK, weight, bias, out)
    if not takes_quantized_tokens(weight, x_TK.shape[0], x_TK.device):
        return quantized_gemm(x_TK, weight, bias, out)
    out_given = check_linear(x_TK, weight, bias, out, "") if out is not None else None
    codes, scales = quantize.quantize(x_TK, 0 if weight.format == "fp8" else quantize.GROUP)
    y = scaled_linear(codes, scales, weight, bias)
    return y if out_given is None else out_given.copy_(y)


def quantized_gated_linear(
    x_TK: torch.Tensor,
    weight: PackedQuantized,
    kind: str,
    bias: torch.Tensor | None = None,
    *,
    limit: float = 0.0,
    deterministic: bool,
) -> torch.Tensor:
    """act(gate) * up, [T, N / 2] bfloat16, of the product with a weight whose first half of rows is
    the gate's. Where tokens are quantised, gate and up are rounded to bfloat16 in between."""
    few = x_TK.shape[0] <= skinny_crossing(weight.format)
    if not deterministic and few:
        return skinny(x_TK, weight, bias, kind=kind, limit=limit)
    if deterministic or not takes_quantized_tokens(weight, x_TK.shape[0], x_TK.device):
        return quantized_gemm(x_TK, weight, bias, kind=kind, limit=limit)
    check_linear(x_TK, weight, bias, None, kind)
    y = quantized_linear(x_TK, weight, bias, deterministic=False)
    return gated_activation(y, kind, limit=limit)
