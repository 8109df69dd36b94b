"""Linear layers by whichever kernel is fastest for the number of tokens, or by the one that gives
the same bits for all of them."""

from __future__ import annotations

import torch

from quire.kernels.triton.activation.gated_activation import gated_activation
from quire.kernels.triton.gemm import skinny
from quire.kernels.triton.gemm.gemm import gemm
from quire.kernels.triton.gemm.operands import check_operands
from quire.kernels.triton.norm.rms_norm import add_rms_norm, rms_norm

# Most tokens for which norming them in every program costs less than a kernel of its own.
# Measured on an H200 with benchmarks/gpu/gemm.py norm: 1 to 2 us less for one token, not for more.
ADD_NORM_TOKENS = 1


def crossing(n: int, k: int, dtype: torch.dtype) -> int:
    """Most tokens for which skinny_linear is at least as fast as cuBLAS on a weight [n, k].

    Measured on an H200 with benchmarks/gpu/gemm.py few: only a language model's head has enough
    rows that reading the tokens again for each tile stays hidden.
    """
    if dtype == torch.float32:
        return skinny.GEMV_TOKENS
    return 64 if n >= 65536 else 32


def _library(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None,
    out_TN: torch.Tensor,
) -> None:
    """The product by cuBLAS. It adds the bias in float32 before the one rounding, but takes it in
    x's dtype: exact for biases that a checkpoint has in that dtype."""
    if bias is None:
        torch.mm(x_TK, weight_NK.t(), out=out_TN)
    else:
        torch.addmm(bias.to(x_TK.dtype), x_TK, weight_NK.t(), out=out_TN)


def linear(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    deterministic: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias, [T, N] in x's dtype; operands as in `skinny_linear`, any number of tokens.
    `out` may be float32, which the sums are not rounded for; cuBLAS does not have that.

    `deterministic`: a row's bits depend on nothing but the row and the weight. Raises ValueError
    for operands that do not go together.
    """
    if deterministic:
        return gemm(x_TK, weight_NK, bias, out)
    n, k = weight_NK.shape
    if x_TK.shape[0] <= crossing(n, k, x_TK.dtype):
        return skinny.skinny_linear(x_TK, weight_NK, bias, out)
    if out is not None and out.dtype != x_TK.dtype:
        return gemm(x_TK, weight_NK, bias, out)
    out = check_operands(x_TK, weight_NK, bias, out)
    _library(x_TK, weight_NK, bias, out)
    return out


def gated_linear(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    kind: str,
    bias: torch.Tensor | None = None,
    *,
    deterministic: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(gate) * up, [T, I], of the product with a weight [2 I, K], the gate's rows first.

    Above the crossing, gate and up are rounded to x's dtype before the activation; below it and in
    deterministic mode they are not. Operands and errors as in `linear`.
    """
    if deterministic:
        return gemm(x_TK, weight_NK, bias, out, gated=kind)
    n, k = weight_NK.shape
    if x_TK.shape[0] <= crossing(n, k, x_TK.dtype):
        return skinny.gated_linear(x_TK, weight_NK, kind, bias, out)
    return gated_activation(linear(x_TK, weight_NK, bias, deterministic=False), kind, out)


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
    """Residual addition, RMS norm and linear layer, gated with a `kind`: (y, new residual).

    As skinny.add_norm_linear for any number of tokens, but `residual_TK` may be written: only the
    returned one counts afterwards. The norm is a kernel of its own in deterministic mode and for
    many tokens.
    """
    tokens, k = residual_TK.shape
    if not deterministic and tokens <= ADD_NORM_TOKENS and skinny.add_norm_fits(tokens, k):
        return skinny.add_norm_linear(
            x_TK, residual_TK, norm_weight_K, eps, weight_NK, bias, kind, normed
        )
    if x_TK is None:
        normed = rms_norm(residual_TK, norm_weight_K, eps, normed)
    else:
        normed = add_rms_norm(x_TK, residual_TK, norm_weight_K, eps, out=normed)
    if kind == "":
        return linear(normed, weight_NK, bias, deterministic=deterministic), residual_TK
    y = gated_linear(normed, weight_NK, kind, bias, deterministic=deterministic)
    return y, residual_TK
