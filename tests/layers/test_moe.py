"""Mixture of experts against a dense computation: every expert for every token, then weighted."""

import pytest
import torch
from models.harness import KERNELS
from torch.nn import functional

from layers.source import load
from quire.engine.startup import kernel_facts
from quire.kernels.reference import ops
from quire.layers.build import Build, Kernels
from quire.layers.moe import MoE

H, WIDTH, E = 32, 16, 8


def make(kernels: Kernels, k: int, normalize: bool) -> tuple[MoE, dict[str, torch.Tensor]]:
    build = Build(kernels)
    layer = MoE(
        build,
        "m",
        hidden=H,
        intermediate=WIDTH,
        experts=E,
        experts_per_token=k,
        normalize=normalize,
    )
    torch.manual_seed(3)
    tensors = {"m.gate.weight": torch.randn(E, H)}
    for e in range(E):
        for name, shape in (("gate", (WIDTH, H)), ("up", (WIDTH, H)), ("down", (H, WIDTH))):
            tensors[f"m.experts.{e}.{name}_proj.weight"] = torch.randn(shape) * 0.3
    load(build, dict(tensors))
    return layer, tensors


def dense(x: torch.Tensor, w: dict[str, torch.Tensor], k: int, normalize: bool) -> torch.Tensor:
    x = x.double()
    probabilities = torch.softmax(x @ w["m.gate.weight"].double().T, dim=-1)
    kept = torch.zeros_like(probabilities)
    for row, values in enumerate(probabilities):
        chosen = sorted(range(E), key=lambda e: -float(values[e]))[:k]
        kept[row, chosen] = values[chosen] / (values[chosen].sum() if normalize else 1.0)
    total = torch.zeros_like(x)
    for e in range(E):
        gate, up, down = (
            w[f"m.experts.{e}.{n}_proj.weight"].double() for n in ("gate", "up", "down")
        )
        total += kept[:, e : e + 1] * ((functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return total.float()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("k", [1, 3, E])
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_the_sum_of_the_chosen_experts(tokens: int, k: int, normalize: bool) -> None:
    layer, weights = make(ops, k, normalize)
    x = torch.randn(tokens, H)
    assert torch.allclose(layer(x), dense(x, weights, k, normalize), atol=1e-4)


def test_equal_probabilities_go_to_the_lower_experts() -> None:
    layer, _ = make(ops, 3, True)
    weights, experts = layer.choose(torch.zeros(4, E))
    assert experts.tolist() == [[0, 1, 2]] * 4
    assert torch.allclose(weights, torch.full((4, 3), 1 / 3))


@pytest.mark.skipif("native" not in KERNELS, reason="the native kernels are not built")
def test_a_tokens_bits_do_not_depend_on_the_others_of_its_step() -> None:
    native = kernel_facts().native
    assert native is not None
    layer, _ = make(native, 3, True)
    x = torch.randn(33, H)
    together = layer(x)
    for t in range(33):
        assert torch.equal(layer(x[t : t + 1])[0], together[t])
    assert torch.equal(layer(x[7:20].contiguous()), together[7:20])
