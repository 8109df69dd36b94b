"""RMS norm against float64 arithmetic."""

import pytest
import torch

from layers.source import load
from quire.kernels.reference import ops
from quire.layers.build import Build
from quire.layers.norm import ResidualStream, RMSNorm


def expected(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return (x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight).float()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_norm_of_a_sum(offset: float, dtype: torch.dtype) -> None:
    build = Build(ops)
    norm = RMSNorm(build, "n", 48, 1e-3, offset)
    weight = torch.randn(48).to(dtype)
    load(build, {"n.weight": weight})
    x, residual = torch.randn(5, 48), torch.randn(5, 48)
    assert norm.weight.dtype == torch.float32
    assert torch.allclose(norm(x), expected(x, weight.float() + offset, 1e-3), atol=1e-5)
    total = x + residual
    stream = ResidualStream(residual)
    stream.add(x)
    want = expected(total, weight.float() + offset, 1e-3)
    assert torch.allclose(norm.read(stream), want, atol=1e-5)
    assert torch.equal(stream.value, total)
    assert torch.allclose(norm.read(stream), want, atol=1e-5), "nothing is added twice"


def test_its_memory_is_float32_whatever_the_file_has() -> None:
    assert RMSNorm(Build(ops), "n", 48, 1e-6).nbytes(lambda name: "bf16") == 4 * 48
