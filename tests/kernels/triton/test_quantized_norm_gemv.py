"""Residual addition, norm and product of one or two tokens with an e4m3 weight, in one kernel."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.gemm.skinny import add_norm_linear
from quire.kernels.reference.quantized.linear import quantized_linear as reference
from quire.kernels.reference.quantized.weights import dequantize
from quire.kernels.triton.launch import INTERPRETED
from quire.kernels.triton.quantized.linear import quantized_norm_linear
from quire.kernels.triton.quantized.norm_gemv import norm_gemv, norm_gemv_serves
from quire.kernels.triton.quantized.pack import pack
from tests.kernels.triton.gemm_inputs import assert_close, magnitude, matrix, vector
from tests.kernels.triton.quantized_inputs import quantized

# exp's overflow is meant: the gate is then far below zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
BF16 = torch.bfloat16
EPS = 1e-5


@pytest.mark.parametrize("format", ["fp8", "fp8_block"])
@pytest.mark.parametrize(
    ("t", "n", "k", "kind", "add", "programs_per_sm"),
    [
        (1, 144, 260, "", True, 1),
        (1, 304, 388, "silu", True, 2),
        (2, 160, 1312, "gelu_tanh", True, 1),
        (2, 150, 512, "", False, None),
        (1, 48, 2048, "silu", False, None),
        (1, 9, 4096, "", True, None),
        (2, 16, 4, "swiglu_oai", True, None),
    ],
)
def test_equals_the_norm_and_the_product_of_kernels_of_their_own(
    t: int, n: int, k: int, kind: str, add: bool, programs_per_sm: int | None, format: str,
    device: torch.device,
) -> None:  # fmt: skip
    """Rows of several scale blocks, ragged tiles, several groups of rows to a program."""
    x = matrix(t, k, BF16, device, 1) if add else None
    residual, scale = matrix(t, k, BF16, device, 2), vector(k, device, 3)
    weight, before = quantized(format, n, k, device, 4), residual.clone()
    bias, limit = (vector(n, device, 5), 0.0) if add else (None, 2.0)
    packed = pack(weight)
    y, total = norm_gemv(
        x, residual, scale, EPS, packed, bias, kind, limit, programs_per_sm=programs_per_sm
    )
    assert torch.equal(residual, before)
    if x is None:
        assert total is residual
    else:
        # The interpreter cuts where a GPU rounds.
        allowed = 2.0**-7 if INTERPRETED else 0.0
        torch.testing.assert_close(total, residual + x, rtol=allowed, atol=0)
    normed = torch.empty_like(total)
    add_norm_linear(None, total, scale, EPS, torch.zeros(1, k, device=device), None, "", normed)
    wanted = reference(normed, weight, bias, kind=kind, limit=limit)
    size, unit = magnitude(normed, dequantize(weight), bias), torch.finfo(BF16).eps
    # Normed values may be rounded to a neighbour.
    if kind:
        gate, up = size.chunk(2, dim=1)
        size, unit = (gate + 1) * (up + 2), 2 * unit
    assert_close(y, wanted, size, unit)
    assert (y.float() - wanted.float()).norm() < 0.02 * wanted.float().norm()


@pytest.mark.parametrize(("rows", "warps"), [(2, 1), (8, 4)])
def test_other_tiles_give_the_same(rows: int, warps: int, device: torch.device) -> None:
    x, residual = matrix(2, 512, BF16, device, 1), matrix(2, 512, BF16, device, 2)
    packed, scale = pack(quantized("fp8_block", 96, 512, device, 4)), vector(512, device, 3)
    given = (x, residual, scale, EPS, packed, None, "silu")
    wanted, _ = norm_gemv(*given)
    found, _ = norm_gemv(*given, tiles={"ROWS": rows, "num_warps": warps}, programs_per_sm=2)
    torch.testing.assert_close(found, wanted, rtol=2.0**-6, atol=1e-3)


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_serves_one_or_two_tokens_outside_deterministic_mode(
    format: str, device: torch.device
) -> None:
    """Elsewhere the residual is added to in place."""
    packed, scale = pack(quantized(format, 34, 224, device, 4)), vector(224, device, 3)
    for t in (0, 1, 2, 3):
        for deterministic in (False, True):
            x, residual = matrix(t, 224, BF16, device, 1), matrix(t, 224, BF16, device, 2)
            before = residual.clone()
            y, total = quantized_norm_linear(
                x, residual, scale, EPS, packed, deterministic=deterministic
            )
            assert isinstance(y, torch.Tensor) and y.shape == (t, 34) and y.isfinite().all()
            if format == "fp8" and 1 <= t <= 2 and not deterministic:
                assert torch.equal(residual, before)
            else:
                assert total is residual
            torch.testing.assert_close(total, before + x, rtol=2.0**-7, atol=0)


def test_operands_it_does_not_serve(device: torch.device) -> None:
    def serves(t: int, n: int, k: int, kind: str = "", format: str = "fp8_block") -> bool:
        residual = torch.ones(t, k, dtype=BF16, device=device)
        return norm_gemv_serves(None, residual, pack(quantized(format, n, k, device, 4)), kind)

    assert serves(1, 6, 8192) and serves(2, 6, 4096) and not serves(2, 6, 8192)
    assert serves(1, 6, 768) and not serves(1, 6, 640)  # of 1,024 columns
    assert serves(1, 48, 768, "silu") and not serves(1, 36, 768, "silu")
    assert serves(1, 36, 768, "silu", "fp8")
    packed = pack(quantized("fp8", 6, 64, device, 4))
    one = torch.ones(1, 64, dtype=BF16, device=device)
    assert not norm_gemv_serves(one.float(), one, packed, "")
    with pytest.raises(ValueError, match="residual"):
        norm_gemv(one[:, :32], one, vector(64, device, 3), EPS, packed)
