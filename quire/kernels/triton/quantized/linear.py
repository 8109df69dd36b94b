"""Linear layers with quantised weights by whichever kernel is fastest for the number of tokens, or
by the one that gives the same bits for all of them.

Where a scheme has activations in e4m3, tokens of large batches are quantised too on Hopper, by the
kernel that makes them where one does: after the norm, or after the gated activation.
"""

from __future__ import annotations

import torch

from quire.kernels.triton.activation.gated_activation import gated_activation
from quire.kernels.triton.gemm.linear import linear
from quire.kernels.triton.gemm.shared import is_hopper
from quire.kernels.triton.norm.rms_norm import add_rms_norm, rms_norm
from quire.kernels.triton.quantized import quantize
from quire.kernels.triton.quantized.gemm import quantized_gemm
from quire.kernels.triton.quantized.norm_gemv import norm_gemv, norm_gemv_serves
from quire.kernels.triton.quantized.operands import check_linear
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.kernels.triton.quantized.quantize import QuantizedTokens
from quire.kernels.triton.quantized.scaled_gemm import library_scaled, scaled_gemm
from quire.kernels.triton.quantized.skinny import skinny
from quire.kernels.triton.quantized.widen import FORMATS as WIDENED_FORMATS
from quire.kernels.triton.quantized.widen import widen

# Rows from which a four-bit weight gives quantized_gemm work for all multiprocessors.
TALL = 16384
# Tokens from which a weight of four bits, or of int8, is decoded to memory first. On an H200 cuBLAS
# takes a quarter of quantized_gemm's time at 256 tokens; to decode is estimated to take as much.
WIDENED_FROM = 65
# Hopper's faster sums of e4m3 products (scaled_gemm.py): up to a tenth less time, and torch's
# default in other engines. Sums then have about 14 bits, the tokens themselves have 4.
EXACT = False


Tokens = torch.Tensor | QuantizedTokens


def skinny_crossing(weight: PackedQuantized) -> int:
    """Most tokens for which `skinny` serves a weight; quantized_gemm and e4m3 products above.

    Measured on an H200 with benchmarks/gpu/quantized.py, for fp8 and nvfp4. Of four bits, decoding
    is what takes time: larger tiles decode less often.
    """
    if weight.format in ("nvfp4", "mxfp4", "int4"):
        return 0 if weight.n >= TALL else 8
    return 32 if weight.activation == "none" else 16


def library_serves(tokens: int, weight: PackedQuantized) -> bool:
    """Whether torch's own e4m3 product serves so many tokens. Measured as skinny_crossing."""
    fits = weight.format == "fp8" and weight.n % 16 == 0 and weight.k % 16 == 0
    return fits and weight.codes.is_cuda and (tokens > 64 or weight.n >= TALL)


def takes_quantized_tokens(weight: PackedQuantized, tokens: int, device: torch.device) -> bool:
    """Whether quantized_linear would quantise its tokens too: then a kernel before it may do that
    as it stores them. Not in deterministic mode, where every number of tokens takes one kernel."""
    return (
        weight.format in ("fp8", "fp8_block")
        and weight.activation != "none"
        and (is_hopper(device) or device.type == "cpu")  # the interpreter has all instructions
        and tokens > skinny_crossing(weight)
    )


def takes_widened(weight: PackedQuantized, tokens: int) -> bool:
    """Whether so many tokens are multiplied by cuBLAS with the weight's values in bfloat16, which
    are made for that product alone. Not in deterministic mode."""
    return tokens >= WIDENED_FROM and weight.format in WIDENED_FORMATS


def group_of_tokens(weight: PackedQuantized) -> int:
    """Columns that share a scale of the tokens that a weight is multiplied with, 0 for all."""
    return 0 if weight.format == "fp8" else quantize.GROUP


def scaled_linear(
    tokens: QuantizedTokens,
    weight: PackedQuantized,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias, [T, N] bfloat16, of tokens that quantize gave codes and scales."""
    codes, scales = tokens.codes, tokens.scales
    if library_serves(codes.shape[0], weight):
        y = library_scaled(codes, scales, weight, bias, exact=EXACT)
        return y if out is None else out.copy_(y)
    return scaled_gemm(codes, scales, weight, bias, out, exact=EXACT)


def quantized_linear(
    x_TK: Tokens,
    weight: PackedQuantized,
    bias: torch.Tensor | None = None,
    *,
    deterministic: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias, [T, N] bfloat16; operands as in `skinny`, any number of tokens, which may be
    quantised already where takes_quantized_tokens says so.

    `deterministic`: tokens are never quantised, and a row's bits depend on nothing but the row and
    the weight. Raises ValueError for operands that do not go together.
    """
    if isinstance(x_TK, torch.Tensor):
        tokens, device = x_TK.shape[0], x_TK.device
        if deterministic:
            return quantized_gemm(x_TK, weight, bias, out)
        if tokens <= skinny_crossing(weight):
            return skinny(x_TK, weight, bias, out)
        if takes_widened(weight, tokens):
            return linear(x_TK, widen(weight), bias, deterministic=False, out=out)
        if not takes_quantized_tokens(weight, tokens, device):
            return quantized_gemm(x_TK, weight, bias, out, deterministic=False)
        if out is not None:
            check_linear(x_TK, weight, bias, out, "")
        fixed = weight.input_scale
        x_TK = QuantizedTokens(*quantize.quantize(x_TK, group_of_tokens(weight), fixed=fixed))
    return scaled_linear(x_TK, weight, bias, out)


def quantized_gated_linear(
    x_TK: Tokens,
    weight: PackedQuantized,
    kind: str,
    bias: torch.Tensor | None = None,
    *,
    limit: float = 0.0,
    deterministic: bool,
    then: PackedQuantized | None = None,
) -> Tokens:
    """act(gate) * up, [T, N / 2] bfloat16, of the product with a weight whose first half of rows is
    the gate's. Where there are many tokens, gate and up are rounded to bfloat16 in between, and the
    result is quantised if the weight `then` takes it so."""
    if isinstance(x_TK, torch.Tensor):
        tokens, device = x_TK.shape[0], x_TK.device
        if not deterministic and tokens <= skinny_crossing(weight):
            return skinny(x_TK, weight, bias, kind=kind, limit=limit)
        decoded = not takes_widened(weight, tokens) and not takes_quantized_tokens(
            weight, tokens, device
        )
        if deterministic or decoded:
            return quantized_gemm(
                x_TK, weight, bias, kind=kind, limit=limit, deterministic=deterministic
            )
        check_linear(x_TK, weight, bias, None, kind)
    y = quantized_linear(x_TK, weight, bias, deterministic=False)
    if then is None or not takes_quantized_tokens(then, y.shape[0], y.device):
        return gated_activation(y, kind, limit=limit)
    return QuantizedTokens(
        *quantize.gated_activation_quantize(
            y, kind, group_of_tokens(then), limit=limit, fixed=then.input_scale
        )
    )


def quantized_norm_linear(
    x_TK: torch.Tensor | None,
    residual_TK: torch.Tensor,
    norm_weight_K: torch.Tensor,
    eps: float,
    weight: PackedQuantized,
    bias: torch.Tensor | None = None,
    kind: str = "",
    *,
    limit: float = 0.0,
    deterministic: bool,
    then: PackedQuantized | None = None,
) -> tuple[Tokens, torch.Tensor]:
    """Residual addition, RMS norm and linear layer, gated with a `kind`: (y, new residual), as
    gemm.linear.add_norm_linear: only the returned residual counts afterwards. Tokens that are
    quantised are so by the norm's kernel."""
    if not deterministic and norm_gemv_serves(x_TK, residual_TK, weight, kind):
        return norm_gemv(x_TK, residual_TK, norm_weight_K, eps, weight, bias, kind, limit)
    normed: Tokens
    tokens, device = residual_TK.shape[0], residual_TK.device
    if not deterministic and takes_quantized_tokens(weight, tokens, device):
        given = (x_TK, residual_TK, norm_weight_K, eps, group_of_tokens(weight))
        normed = QuantizedTokens(*quantize.add_rms_norm_quantize(*given, fixed=weight.input_scale))
    elif x_TK is None:
        normed = rms_norm(residual_TK, norm_weight_K, eps)
    else:
        normed = add_rms_norm(x_TK, residual_TK, norm_weight_K, eps)
    if kind == "":
        return quantized_linear(normed, weight, bias, deterministic=deterministic), residual_TK
    y = quantized_gated_linear(
        normed, weight, kind, bias, limit=limit, deterministic=deterministic, then=then
    )
    return y, residual_TK
