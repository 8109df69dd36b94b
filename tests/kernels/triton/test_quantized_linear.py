"""Linear layers with quantised weights against the reference, for few tokens and for any number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quire.kernels.reference.quantized.linear import quantized_linear as reference
from quire.kernels.reference.quantized.weights import FORMATS, QuantizedWeight, dequantize
from quire.kernels.triton.launch import INTERPRETED
from quire.kernels.triton.quantized.gemm import QuantizedTile, quantized_gemm
from quire.kernels.triton.quantized.linear import (
    WIDENED_FROM,
    quantized_gated_linear,
    quantized_linear,
)
from quire.kernels.triton.quantized.pack import pack
from quire.kernels.triton.quantized.skinny import skinny
from quire.kernels.triton.quantized.widen import FORMATS as WIDENED_FORMATS
from quire.kernels.triton.quantized.widen import widen
from tests.kernels.triton.gemm_inputs import assert_close, magnitude, matrix, vector
from tests.kernels.triton.quantized_inputs import quantized

# exp's overflow is meant: the gate is then far below zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="bits of a GPU's instructions")
BF16 = torch.bfloat16
Product = Callable[..., torch.Tensor]


def check(
    product: Product, t: int, weight: QuantizedWeight, device: torch.device, bias: bool = False
) -> None:
    x, out = matrix(t, weight.k, BF16, device, 1), matrix(t, weight.n, BF16, device, 2)
    out.fill_(torch.nan)
    b = vector(weight.n, device, 3) if bias else None
    assert product(x, pack(weight), b, out) is out
    assert_close(out, reference(x, weight, b), magnitude(x, dequantize(weight), b))


@pytest.mark.parametrize("product", [skinny, quantized_gemm])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("t", "n", "k", "group"),
    [(0, 5, 64, 32), (1, 1, 32, 32), (1, 40, 1024, 128), (9, 17, 288, 32), (33, 20, 576, 64)],
)
def test_linear_equals_reference(
    t: int, n: int, k: int, group: int, format: str, product: Product, device: torch.device
) -> None:
    check(product, t, quantized(format, n, k, device, 4, group, t != 9), device, t == 9)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_and_columns_of_several_scale_blocks(format: str, device: torch.device) -> None:
    weight = quantized(format, 150, 512, device, 4, 256)
    check(skinny, 3, weight, device)
    check(quantized_gemm, 70, weight, device)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 12288)])
def test_layers_of_production_sizes_equal_reference(n: int, k: int, format: str) -> None:
    device = torch.device("cuda")
    weight = quantized(format, n, k, device, 4)
    for product, t in ((skinny, 1), (skinny, 8), (skinny, 32), (quantized_gemm, 300)):
        check(product, t, weight, device, bias=t == 8)


@pytest.mark.parametrize("format", ["fp8", "fp8_block"])
@pytest.mark.parametrize(("t", "n", "k"), [(1, 300, 260), (2, 150, 1312), (1, 7, 2048)])
@pytest.mark.parametrize("kind", ["", "silu"])
def test_one_or_two_tokens_by_multiply_adds(
    t: int, n: int, k: int, kind: str, format: str, device: torch.device
) -> None:
    """Rows of several scale blocks, ragged tiles; and x as it lies where that path is not open."""
    weight, bias = quantized(format, n - n % 2, k, device, 4), vector(n - n % 2, device, 3)
    wide = matrix(t, k + 8, BF16, device, 1)
    for x in (wide[:, 8:], wide[:, 1 : k + 1]):
        found = skinny(x, pack(weight), bias, kind=kind, limit=2.0)
        wanted = reference(x, weight, bias, kind=kind, limit=2.0)
        allowed = magnitude(x, dequantize(weight), bias)
        if kind:
            gate, up = allowed.chunk(2, dim=1)
            allowed = (gate + 1) * (up + 2)
        assert_close(found, wanted, allowed)


@pytest.mark.parametrize("product", [skinny, quantized_gemm])
@pytest.mark.parametrize(("kind", "limit"), [("silu", 0.0), ("silu", 0.5), ("swiglu_oai", 0.7)])
def test_gated_equals_reference(
    kind: str, limit: float, product: Product, device: torch.device
) -> None:
    weight = quantized("nvfp4", 2 * 21, 256, device, 4)
    x, bias = matrix(5, 256, BF16, device, 1), vector(42, device, 2)
    found = product(x, pack(weight), bias, kind=kind, limit=limit)
    wanted = reference(x, weight, bias, kind=kind, limit=limit)
    gate, up = magnitude(x, dequantize(weight), bias).chunk(2, dim=1)
    assert_close(found, wanted, (gate + 1) * (up + 2))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kind", ["", "silu"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1000, 2048)])
def test_a_rows_bits_do_not_depend_on_its_batch(n: int, k: int, format: str, kind: str) -> None:
    device = torch.device("cuda")
    packed = pack(quantized(format, n, k, device, 4))
    x = matrix(1024, k, BF16, device, 1)
    whole = quantized_gemm(x, packed, kind=kind)
    for t in (1, 3, 16, 17, 33, 65, 200, 1024):
        for first in {0, 1024 - t, (1024 - t) // 2}:
            part = quantized_gemm(x[first : first + t], packed, kind=kind)
            assert torch.equal(part, whole[first : first + t]), (t, first)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("tokens", [16, 64])
def test_other_tiles_equal_reference(tokens: int, blocks: int, device: torch.device) -> None:
    tile = QuantizedTile(64, tokens, blocks, 4, 2)
    weight = quantized("mxfp4", 72, 640, device, 4)
    x = matrix(20, 640, BF16, device, 1)
    found = quantized_gemm(x, pack(weight), tile=tile)
    assert_close(found, reference(x, weight), magnitude(x, dequantize(weight)))


@pytest.mark.parametrize("format", WIDENED_FORMATS)
@pytest.mark.parametrize(("n", "k", "group"), [(1, 32, 32), (40, 288, 32), (33, 512, 256)])
def test_widened_weights_are_the_values_rounded_once(
    n: int, k: int, group: int, format: str, device: torch.device
) -> None:
    for zeros in (False, True):
        weight = quantized(format, n, k, device, 4, group, zeros)
        wanted = dequantize(weight)
        found = widen(pack(weight)).float()
        # The interpreter cuts where a GPU rounds to nearest.
        assert ((found - wanted).abs() <= wanted.abs() * 2.0 ** (-7 if INTERPRETED else -8)).all()
        if not INTERPRETED:  # the order of two float32 factors may decide
            assert (found == wanted.bfloat16().float()).float().mean() > 0.99


@pytest.mark.parametrize("format", ["nvfp4", "int8"])
def test_many_tokens_take_widened_weights(format: str, device: torch.device) -> None:
    weight, t = quantized(format, 34, 96, device, 4, 32), WIDENED_FROM
    x, bias = matrix(t, 96, BF16, device, 1), vector(34, device, 3)
    given: dict[str, Any] = {"deterministic": False}
    found = quantized_linear(x, pack(weight), bias, **given)
    size = magnitude(x, dequantize(weight), bias)
    assert_close(found, reference(x, weight, bias), size, 2.0**-8)
    found = quantized_gated_linear(x, pack(weight), "silu", bias, **given)
    assert isinstance(found, torch.Tensor)
    wanted = reference(x, weight, bias, kind="silu").float()
    assert (found.float() - wanted).norm() < 0.02 * wanted.norm()


def test_extreme_scales(device: torch.device) -> None:
    codes = torch.full((3, 16), 0x77, dtype=torch.uint8, device=device)
    scales = torch.tensor([[127 - 50], [127 + 60], [127]], dtype=torch.uint8, device=device)
    x = torch.zeros(1, 32, dtype=BF16, device=device)
    x[0, 0] = 1
    weight = QuantizedWeight("mxfp4", codes, scales)
    for product in (skinny, quantized_gemm):
        found = product(x, pack(weight))
        assert found.tolist() == [[6 * 2.0**-50, 6 * 2.0**60, 6.0]]


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    packed = pack(quantized("fp8", 6, 64, device, 4))
    x = matrix(3, 64, BF16, device, 1)
    with pytest.raises(ValueError, match="at most 64"):
        skinny(matrix(65, 64, BF16, device, 1), packed)
    for product in (skinny, quantized_gemm):
        with pytest.raises(ValueError, match=r"x: expected \[T, 64\]"):
            product(x[:, :32], packed)
        with pytest.raises(ValueError, match="bfloat16"):
            product(x.half(), packed)
        with pytest.raises(ValueError, match="bias"):
            product(x, packed, torch.ones(5, device=device))
        with pytest.raises(ValueError, match="out"):
            product(x, packed, None, torch.ones(3, 5, device=device))
        with pytest.raises(ValueError, match="relu"):
            product(x, packed, kind="relu")
        with pytest.raises(ValueError, match="no gate and up"):
            product(x, pack(quantized("fp8", 5, 64, device, 4)), kind="silu")
