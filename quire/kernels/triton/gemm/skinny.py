"""Linear layers of a few tokens at the limit of the memory bus: y = x W^T + bias.

Up to GEMV_TOKENS tokens by multiply-adds (gemv.py), up to 64 on tensor cores (tall.py). How the
sums are ordered depends on the number of tokens: not for deterministic mode.
"""

from __future__ import annotations

import torch

from quire.kernels.triton.gemm import gemv, tall
from quire.kernels.triton.gemm.operands import check_operands

MAX_TOKENS = tall.MAX_TOKENS
# Eight multiply-adds for every value of the weight would take four fifths of what an H200 can
# issue while the bus delivers it; above this, tensor cores are faster. To be measured.
GEMV_TOKENS = 2


def _skinny(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    out = check_operands(x_TK, weight_NK, bias, out, activation)
    tokens = x_TK.shape[0]
    if tokens > MAX_TOKENS:
        raise ValueError(f"x: {tokens} tokens, at most {MAX_TOKENS} here")
    if tokens and out.shape[1]:
        product = gemv.gemv if tokens <= GEMV_TOKENS else tall.tall
        product(x_TK, weight_NK, bias, out, activation)
    return out


def skinny_linear(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias, [T, N] in x's dtype, for up to 64 tokens.

    `x_TK` and `weight_NK` bfloat16, float16 or float32, both the same; x's and out's rows
    contiguous and as far apart as one likes, the weight contiguous; `bias` float32 [N]. Summed in
    float32 and rounded once. Raises ValueError for anything else.
    """
    return _skinny(x_TK, weight_NK, bias, out, "")


def gated_linear(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    kind: str,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(x G^T + b) * (x U^T + c), [T, I] in x's dtype, for up to 64 tokens.

    `weight_NK` [2 I, K] has the gate's rows G first, then U, and `bias` [2 I] likewise; `kind` is
    "silu" or "gelu_tanh". Else as `skinny_linear`; gate and up are not rounded in between.
    """
    if kind == "":
        raise ValueError("kind: the name of an activation is needed")
    return _skinny(x_TK, weight_NK, bias, out, kind)


def add_norm_fits(tokens: int, k: int) -> bool:
    """Whether `add_norm_linear` can take so many tokens of that size."""
    return tokens == 0 or gemv.norm_gemv_fits(tokens, k)


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
    """Residual addition, RMS norm and linear layer in one kernel: (y, new residual).

    new residual = residual + x, rounded (x None: `residual_TK` itself is returned); y = x' W^T +
    bias, or gated as in `gated_linear` with a `kind`, where x' = new residual / rms * norm weight
    (float32 [K]) is rounded as a norm of its own would, and also written to `normed` [T, K],
    contiguous, where that is given. `residual_TK` is not written. Raises ValueError where
    add_norm_fits says no, and as `skinny_linear`.
    """
    out = check_operands(residual_TK, weight_NK, bias, None, kind)
    tokens, k = residual_TK.shape
    if not add_norm_fits(tokens, k):
        raise ValueError(f"x: {tokens} tokens of {k} values are too many for one program")
    if x_TK is not None and (x_TK.shape != residual_TK.shape or x_TK.dtype != residual_TK.dtype):
        raise ValueError(
            f"x: {x_TK.dtype} {list(x_TK.shape)} does not match the residual's "
            f"{residual_TK.dtype} {list(residual_TK.shape)}"
        )
    if norm_weight_K.shape != (k,) or norm_weight_K.dtype != torch.float32:
        raise ValueError(f"norm weight: expected float32 [{k}]")
    if normed is not None and not (normed.shape == residual_TK.shape and normed.is_contiguous()):
        raise ValueError(f"normed: expected contiguous {list(residual_TK.shape)}")
    if tokens == 0 or out.shape[1] == 0:
        return out, residual_TK if x_TK is None else residual_TK + x_TK
    residual_out = gemv.norm_gemv(
        x_TK, residual_TK, norm_weight_K, eps, weight_NK, bias, out, kind, normed
    )
    return out, residual_out
