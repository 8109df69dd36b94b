"""Mixture of experts against a dense computation: every expert for every token, then weighted."""

from dataclasses import replace

import pytest
import torch
from models.harness import KERNELS
from torch.nn import functional

from layers.source import Matrix, load
from quire.engine.startup import kernel_facts
from quire.formats.scaled import quantize_fp8
from quire.kernels.reference import ops
from quire.kernels.triton.ops import TritonKernels
from quire.kernels.triton.quantized.quantize import QuantizedTokens
from quire.layers.build import Build, Kernels
from quire.layers.experts import StackedExperts
from quire.layers.moe import MoE
from quire.layers.norm import ResidualStream, RMSNorm

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


def quantized_layer(
    activation: str, scales: list[float], deterministic: bool = False
) -> tuple[MoE, RMSNorm]:
    """Two experts in fp8 on the GPU's kernels (their interpreter without one); `scales`: static
    ones of gate, up and down, expert by expert."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build = Build(TritonKernels(torch.bfloat16, device, deterministic), device=device)
    norm = RMSNorm(build, "n", H, 1e-6)
    layer = MoE(build, "m", hidden=H, intermediate=WIDTH, experts=2, experts_per_token=2,
                normalize=True)  # fmt: skip
    torch.manual_seed(3)
    tensors: dict[str, Matrix] = {"m.gate.weight": torch.randn(2, H), "n.weight": torch.ones(H)}
    static = iter(scales)
    for e in range(2):
        for name, shape in (("gate", (WIDTH, H)), ("up", (WIDTH, H)), ("down", (H, WIDTH))):
            tensor = replace(quantize_fp8(torch.randn(shape) * 0.3), activation="none")
            scale = torch.tensor(next(static)) if activation == "tensor" else None
            tensors[f"m.experts.{e}.{name}_proj.weight"] = replace(
                tensor, activation=activation, input_scale=scale
            )
    load(build, tensors)
    return layer, norm


@pytest.mark.parametrize("deterministic", [False, True])
def test_many_tokens_of_fp8_experts_are_quantised_by_the_norms_kernel(deterministic: bool) -> None:
    layer, norm = quantized_layer("token", [], deterministic)
    x = torch.randn(40, H).to(layer.build.device, torch.bfloat16)
    apart = layer(norm(x))
    normed = layer.experts.normed(norm, ResidualStream(x.clone()), 2)
    assert (normed is None) is deterministic
    assert normed is None or isinstance(normed[1], QuantizedTokens)
    assert torch.equal(layer.after(norm, ResidualStream(x.clone())), apart)
    stream = ResidualStream(x - x / 2)
    stream.add(x / 2)
    assert torch.equal(layer.after(norm, stream), apart) and stream.pending is None
    assert torch.equal(stream.value, x)


def test_static_scales_of_experts_become_the_largest() -> None:
    layer, _ = quantized_layer("tensor", [0.5, 0.25, 0.125, 2.0, 0.5, 0.0625])
    assert isinstance(layer.experts, StackedExperts)
    for stack, scale in ((layer.experts.gate_up_EIH, 2.0), (layer.experts.down_EHI, 0.125)):
        assert stack.activation == "tensor" and float(stack.input_scale) == scale
