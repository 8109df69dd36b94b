"""The gated feed-forward layer against the formula."""

import pytest
import torch
from torch.nn import functional

from layers.source import load
from quire.kernels.reference import ops
from quire.layers.build import Build
from quire.layers.mlp import GatedMLP


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_down_of_activated_gate_times_up(activation: str, bias: bool) -> None:
    build = Build(ops)
    layer = GatedMLP(build, "m", 32, 48, activation, bias)
    shapes = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    biases = {name: torch.randn(shape[0]) if bias else None for name, shape in shapes.items()}
    tensors = {f"m.{name}.weight": w for name, w in weights.items()}
    tensors |= {f"m.{name}.bias": b for name, b in biases.items() if b is not None}
    load(build, tensors)
    x = torch.randn(5, 32)
    gate, up = (
        functional.linear(x, weights[f"{p}_proj"], biases[f"{p}_proj"]) for p in ("gate", "up")
    )
    act = (
        functional.silu
        if activation == "silu"
        else (lambda v: functional.gelu(v, approximate="tanh"))
    )
    expected = functional.linear(act(gate) * up, weights["down_proj"], biases["down_proj"])
    assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-3)
    assert build.width == 3 * 48
