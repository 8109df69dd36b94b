"""Gated activations against the reference."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.activation import gated_activation as reference
from quire.kernels.triton.activation.gated_activation import KINDS, gated_activation

# exp's overflow is meant: the gate is then far below zero.
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("t", "i"), [(0, 8), (1, 1), (1, 1024), (3, 33), (5, 1536), (2, 2049)])
def test_activation_equals_reference(
    t: int, i: int, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(t + i)
    whole = torch.full((t, 2 * i + 24), torch.nan, dtype=dtype, device=device)
    x = whole[:, 8 : 8 + 2 * i]
    x.copy_(3 * torch.randn(t, 2 * i, generator=generator))
    wanted = reference.gated_activation(x, kind)
    out = torch.full((t, i + 8), torch.nan, dtype=dtype, device=device)
    gated_activation(x, kind, out=out[:, :i])
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out[:, :i], wanted, rtol=tolerance, atol=tolerance)
    assert out[:, i:].isnan().all()
    assert torch.equal(gated_activation(x, kind), out[:, :i])


@pytest.mark.parametrize("kind", KINDS)
def test_large_gates_neither_overflow_nor_vanish(kind: str, device: torch.device) -> None:
    gate = torch.tensor([[-1e20, -1e4, -100.0, -0.0, 0.0, 100.0, 1e4, 1e20]], device=device)
    found = gated_activation(torch.cat([gate, torch.full_like(gate, 2.0)], dim=1), kind)
    wanted = torch.tensor([[0, 0, 0, 0, 0, 200.0, 2e4, 2e20]], device=device)
    if kind == "swiglu_oai":  # which adds one to up
        wanted *= 1.5
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_clamps_gate_from_above_and_up_from_both_sides(
    kind: str, device: torch.device
) -> None:
    gate, up = torch.tensor([[-9.0, 9.0, 1.0]]), torch.tensor([[9.0, -9.0, torch.nan]])
    clamped = torch.cat([gate.clamp(max=2.5), up.clamp(-2.5, 2.5)], dim=1).to(device)
    found = gated_activation(torch.cat([gate, up], dim=1).to(device), kind, limit=2.5)
    torch.testing.assert_close(found, gated_activation(clamped, kind), equal_nan=True)
    torch.testing.assert_close(found, reference.gated_activation(clamped, kind), equal_nan=True)
    assert found[0, 2].isnan()


def test_other_kinds_and_layouts_are_refused(device: torch.device) -> None:
    x = torch.ones(2, 8, device=device)
    with pytest.raises(ValueError, match="'relu' is not one of silu, gelu_tanh"):
        gated_activation(x, "relu")
    with pytest.raises(ValueError, match="no gate and up"):
        gated_activation(x[:, :7], "silu")
    with pytest.raises(ValueError, match="contiguous rows"):
        gated_activation(x[:, ::2], "silu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_rows_beyond_two_billion_values() -> None:
    stride = 2**30 + 16
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device="cuda")
    x = storage.as_strided((3, 64), (stride, 1))
    x.copy_(torch.randn(3, 64))
    found = gated_activation(x, "silu")
    torch.testing.assert_close(found, reference.gated_activation(x, "silu"), rtol=1e-2, atol=1e-3)
