"""Products of e4m3 tokens with e4m3 weights, and linear layers that choose among kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from quire.kernels.reference.quantized import linear as linear_reference
from quire.kernels.reference.quantized.quantize import dequantize_rows
from quire.kernels.reference.quantized.scaled_gemm import scaled_gemm as reference
from quire.kernels.reference.quantized.weights import FORMATS, dequantize
from quire.kernels.triton.norm.rms_norm import add_rms_norm
from quire.kernels.triton.quantized.linear import (
    quantized_gated_linear,
    quantized_linear,
    quantized_norm_linear,
)
from quire.kernels.triton.quantized.pack import pack
from quire.kernels.triton.quantized.quantize import quantize
from quire.kernels.triton.quantized.scaled_gemm import ScaledTile, library_scaled, scaled_gemm
from tests.kernels.triton.gemm_inputs import assert_close, magnitude, matrix, vector
from tests.kernels.triton.marks import ON_GPU
from tests.kernels.triton.quantized_inputs import quantized

BF16 = torch.bfloat16
FP8 = [("fp8", 0), ("fp8_block", 128)]


@pytest.mark.parametrize(("format", "group"), FP8)
@pytest.mark.parametrize(
    ("t", "n", "k"),
    [
        *((0, 5, 64), (1, 1, 32), (70, 150, 288), (65, 24, 256)),
        *(pytest.param(*sizes, marks=ON_GPU) for sizes in ((17, 6144, 4096), (300, 4096, 12288))),
    ],
)
def test_product_equals_reference(
    t: int, n: int, k: int, format: str, group: int, device: torch.device
) -> None:
    weight = quantized(format, n, k, device, 4)
    codes, scales = quantize(matrix(t, k, BF16, device, 1), group)
    bias = vector(n, device, 3) if t == 70 else None
    out = matrix(t, n, BF16, device, 2).fill_(torch.nan)
    assert scaled_gemm(codes, scales, pack(weight), bias, out) is out
    size = magnitude(dequantize_rows(codes, scales), dequantize(weight), bias)
    # Hopper's instruction keeps 13 bits of a sum of e4m3 products.
    inner = 0.0 if device.type == "cpu" else 2.0**-10
    assert_close(out, reference(codes, scales, weight, bias), size, inner)


@pytest.mark.parametrize(("format", "group"), FP8)
@pytest.mark.parametrize("tile", [ScaledTile(128, 128, 8, 2), ScaledTile(64, 32, 4, 2)])
def test_other_tiles_equal_reference(
    tile: ScaledTile, format: str, group: int, device: torch.device
) -> None:
    weight = quantized(format, 200, 256, device, 4)
    codes, scales = quantize(matrix(30, 256, BF16, device, 1), group)
    found = scaled_gemm(codes, scales, pack(weight), tile=tile)
    size = magnitude(dequantize_rows(codes, scales), dequantize(weight))
    assert_close(found, reference(codes, scales, weight), size, 2.0**-10)


def test_torchs_own_product_means_the_same(device: torch.device) -> None:
    weight = quantized("fp8", 48, 256, device, 4)
    codes, scales = quantize(matrix(33, 256, BF16, device, 1))
    found = library_scaled(codes, scales, pack(weight))
    size = magnitude(dequantize_rows(codes, scales), dequantize(weight))
    assert_close(found, reference(codes, scales, weight), size, 2.0**-10)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("t", [2, 40])
def test_linear_layers_equal_reference(
    t: int, format: str, deterministic: bool, device: torch.device
) -> None:
    weight = quantized(format, 32, 128, device, 4)
    x, packed = matrix(t, 128, BF16, device, 1), replace(pack(weight), activation="token")
    out = matrix(t, 32, BF16, device, 2).fill_(torch.nan)
    assert quantized_linear(x, packed, deterministic=deterministic, out=out) is out
    # Tokens of fp8 are quantised too where there are many.
    bound = 0.05 if format.startswith("fp8") and t > 32 and not deterministic else 0.01
    for found, kind in (
        (out, ""),
        (quantized_gated_linear(x, packed, "silu", deterministic=deterministic), "silu"),
    ):
        wanted = linear_reference.quantized_linear(x, weight, kind=kind).float()
        assert (found.float() - wanted).norm() <= bound * (1 + bool(kind)) * wanted.norm()


@pytest.mark.parametrize("activation", ["token", "tensor", "none"])
@pytest.mark.parametrize("format", ["fp8", "fp8_block", "nvfp4"])
def test_fused_quantisation_is_the_one_of_a_kernel_of_its_own(
    format: str, activation: str, device: torch.device
) -> None:
    """After the norm, and after the activation for the product that follows."""
    if activation == "tensor" and format != "fp8":
        return
    up, down = (
        replace(
            pack(quantized(format, n, k, device, n)),
            activation=activation if format != "nvfp4" else "none",
            input_scale=torch.tensor(0.01, device=device) if activation == "tensor" else None,
        )
        for n, k in ((96, 64), (32, 48))
    )
    x, residual = matrix(20, 64, BF16, device, 1), matrix(20, 64, BF16, device, 2)
    norm = vector(64, device, 3)
    normed = add_rms_norm(x, residual.clone(), norm, 1e-5)
    given: dict[str, Any] = {"deterministic": False}
    h, total = quantized_norm_linear(x, residual, norm, 1e-5, up, None, "silu", then=down, **given)
    assert total is residual
    assert isinstance(h, torch.Tensor) == (activation == "none" or format == "nvfp4")
    wanted = quantized_linear(quantized_gated_linear(normed, up, "silu", **given), down, **given)
    torch.testing.assert_close(quantized_linear(h, down, **given), wanted, rtol=1e-2, atol=1e-3)


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    packed = pack(quantized("fp8", 8, 64, device, 4))
    codes, scales = quantize(matrix(3, 64, BF16, device, 1))
    with pytest.raises(ValueError, match="nvfp4 is not one of fp8"):
        scaled_gemm(codes, scales, pack(quantized("nvfp4", 8, 64, device, 4)))
    with pytest.raises(ValueError, match="codes: expected"):
        scaled_gemm(codes[:, :32], scales, packed)
    with pytest.raises(ValueError, match="scales: expected"):
        scaled_gemm(codes, scales[:2], packed)
    with pytest.raises(ValueError, match="bias"):
        scaled_gemm(codes, scales, packed, torch.ones(3, device=device))
