"""Linear layers, by whichever kernel, on both sides of every boundary between kernels."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.gemm import linear as reference
from quire.kernels.triton.gemm import linear as dense
from quire.kernels.triton.gemm.skinny import GEMV_TOKENS
from tests.kernels.triton.gemm_inputs import assert_close, flat, magnitude, matrix, vector

N, K, EPS = 22, 72, 1e-5
CROSSING = dense.crossing(2 * N, K, torch.bfloat16)
TOKENS = sorted({0, 1, GEMV_TOKENS, GEMV_TOKENS + 1, CROSSING, CROSSING + 1})
# Gate and up, or a norm, may be rounded on the way.
ROUNDED = 2.0**-6


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("t", TOKENS)
def test_linear_equals_reference(
    t: int, with_bias: bool, deterministic: bool, device: torch.device
) -> None:
    dtype = torch.bfloat16
    x, weight = matrix(t, K, dtype, device, 1), flat(N, K, dtype, device, 2)
    bias = vector(N, device, 3).to(dtype).float() if with_bias else None
    out = matrix(t, N, dtype, device, 4).fill_(torch.nan)
    assert dense.linear(x, weight, bias, deterministic=deterministic, out=out) is out
    wanted = reference.linear(x, weight, bias, deterministic=deterministic)
    size = magnitude(x, weight, bias)
    assert_close(out, wanted, size)
    assert_close(dense.linear(x, weight, bias, deterministic=deterministic), wanted, size)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("t", TOKENS)
def test_a_float32_result_is_not_rounded(t: int, deterministic: bool, device: torch.device) -> None:
    """Its columns lie apart, as parts of a larger result do."""
    x, weight = (matrix(t, K, torch.bfloat16, device, 1), flat(N, K, torch.bfloat16, device, 2))
    out = matrix(t, N, torch.float32, device, 4).fill_(torch.nan)
    assert dense.linear(x, weight, deterministic=deterministic, out=out) is out
    assert_close(out, x.float() @ weight.float().T, magnitude(x, weight))
    with pytest.raises(ValueError, match="out"):
        dense.linear(x, weight, deterministic=deterministic, out=out.half())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("t", TOKENS)
def test_gated_linear_equals_reference(t: int, deterministic: bool, device: torch.device) -> None:
    dtype = torch.bfloat16
    x, weight = matrix(t, K, dtype, device, 1) / K**0.5, flat(2 * N, K, dtype, device, 2)
    gate, up = magnitude(x, weight).chunk(2, dim=1)
    found = dense.gated_linear(x, weight, "silu", deterministic=deterministic)
    wanted = reference.gated_linear(x, weight, "silu", deterministic=deterministic)
    assert_close(found, wanted, (gate + 1) * (up + 1), ROUNDED)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["", "gelu_tanh"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("t", [0, 1, dense.ADD_NORM_TOKENS + 1])
def test_add_norm_linear_equals_reference(
    t: int, add: bool, kind: str, deterministic: bool, device: torch.device
) -> None:
    dtype = torch.float16
    x = matrix(t, K, dtype, device, 1) if add else None
    residual, scale = matrix(t, K, dtype, device, 2), vector(K, device, 3) / K**0.5
    weight, bias = flat(2 * N, K, dtype, device, 4), vector(2 * N, device, 5).to(dtype).float()
    norms = [torch.full_like(residual, torch.nan) for _ in range(2)]
    wanted, total = reference.add_norm_linear(
        x, residual.clone(), scale, EPS, weight, bias, kind, norms[0], deterministic=deterministic
    )
    y, found = dense.add_norm_linear(
        x, residual, scale, EPS, weight, bias, kind, norms[1], deterministic=deterministic
    )
    torch.testing.assert_close(norms[1], norms[0], rtol=2**-9, atol=2**-20)
    torch.testing.assert_close(found, total, rtol=2**-10, atol=0)
    rms = (total.float().square().mean(1, keepdim=True) + EPS).sqrt()
    size = magnitude(total.float() / rms * scale, weight, bias)
    if kind:
        gate, up = size.chunk(2, dim=1)
        size = (gate + 1) * (up + 1)
    assert_close(y, wanted, size, ROUNDED / 8)


def test_float32_is_not_multiplied_as_tf32(device: torch.device) -> None:
    # 1 + 2^-12 is 1 in TF32.
    x = torch.full((40, 16), 1 + 2.0**-12, device=device)
    for deterministic in (False, True):
        for t in (1, 40):
            y = dense.linear(x[:t], torch.eye(16, device=device), deterministic=deterministic)
            assert torch.equal(y, x[:t])
