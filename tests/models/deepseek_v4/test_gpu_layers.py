"""Experts, router and grouped products on a GPU's kernels against those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from layers.source import Matrix, load

from models.deepseek_v4.published import FLASH
from quire.formats.quantized import QuantTensor
from quire.formats.scaled import quantize_fp8_block, quantize_mxfp4, quantize_nvfp4
from quire.kernels.reference import ops
from quire.kernels.triton.ops import TritonKernels
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.layers.build import Build
from quire.layers.experts import SeparateExperts, StackedExperts
from quire.layers.linear import Linear
from quire.layers.mlp import GatedMLP
from quire.layers.norm import ResidualStream, RMSNorm
from quire.models.deepseek_v4.config import Config, Layer
from quire.models.deepseek_v4.moe import MoE
from quire.models.deepseek_v4.parts import GroupedLinear

# exp's overflow is meant: the gate is then far below zero.
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = torch.bfloat16
SMALL = {
    "vocab_size": 50, "hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "swiglu_limit": 0.5,
}  # fmt: skip
Quantise = Callable[[torch.Tensor], QuantTensor]
FORMATS: dict[str, Quantise | None] = {
    "bf16": None, "mxfp4": quantize_mxfp4, "nvfp4": quantize_nvfp4, "fp8_block": quantize_fp8_block,
}  # fmt: skip


def gpu(deterministic: bool = False) -> Build:
    return Build(TritonKernels(BF16, DEVICE, deterministic), dtype=BF16, device=DEVICE)


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Values that bfloat16 has."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(BF16).float()


def stored(seed: int, rows: int, columns: int, quantise: Quantise | None) -> Matrix:
    values = normal(seed, rows, columns) * 0.25
    return values if quantise is None else replace(quantise(values), activation="none")


def plain(tensor: Matrix) -> torch.Tensor:
    """The values of a stored matrix."""
    assert isinstance(tensor, torch.Tensor | QuantTensor)
    return tensor if isinstance(tensor, torch.Tensor) else tensor.dequantize()


def moe_tensors(config: Config, hashed: bool, quantise: Quantise | None) -> dict[str, Matrix]:
    hidden, inner, experts = config.hidden, config.expert_intermediate, config.experts
    names = [*(f"m.experts.{e}" for e in range(experts)), "m.shared_experts"]
    tensors: dict[str, Matrix] = {"m.gate.weight": normal(1, experts, hidden) / 4}
    for i, name in enumerate(names):
        for j, (part, shape) in enumerate(
            (("w1", (inner, hidden)), ("w3", (inner, hidden)), ("w2", (hidden, inner)))
        ):
            tensors[f"{name}.{part}.weight"] = stored(10 + 3 * i + j, *shape, quantise)
    if hashed:
        scores = normal(2, config.vocab_size, experts)
        tensors["m.gate.tid2eid"] = scores.argsort(dim=1)[:, : config.experts_per_token]
    else:
        tensors["m.gate.bias"] = normal(3, experts) / 4
    return tensors


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-2) -> None:
    found = found.cpu().double()
    assert torch.isfinite(found).all()
    assert (found - wanted.double()).norm() <= tolerance * wanted.double().norm()


QUICK = (("bf16", False, False), ("mxfp4", True, False), ("bf16", True, True))
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.full)
    for case in product(FORMATS, (False, True), (False, True))
]


@pytest.mark.parametrize(("format", "hashed", "deterministic"), CASES)
def test_experts_clamp_and_follow_tokens_or_scores(
    format: str, hashed: bool, deterministic: bool
) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128} if format == "fp8_block" else {}
    config = Config.from_hf({**FLASH, **SMALL, **sizes})
    layer = Layer(ratio=0, sparse=False, hashed=hashed)
    cpu, other = Build(ops), gpu(deterministic)
    wanted, found = MoE(config, cpu, "m", layer), MoE(config, other, "m", layer)
    tensors = moe_tensors(config, hashed, FORMATS[format])
    load(cpu, {name: plain(t) if name != "m.gate.tid2eid" else t for name, t in tensors.items()})
    load(other, dict(tensors))
    assert isinstance(wanted.experts, SeparateExperts) and isinstance(found.experts, StackedExperts)
    stack = found.experts.gate_up_EIH
    assert isinstance(stack, PackedQuantized) is (format != "bf16")
    for t in (1, 33):
        x, tokens = normal(4, t, config.hidden), torch.arange(t) % config.vocab_size
        given = x.to(DEVICE, BF16), tokens.to(DEVICE)
        close(found(*given), wanted(x, tokens))
        weights, ids = found.route(*given)
        wanted_weights, wanted_ids = wanted.route(x, tokens)
        assert torch.equal(ids.cpu(), wanted_ids)
        torch.testing.assert_close(weights.cpu(), wanted_weights, rtol=1e-4, atol=1e-6)
        if t == 1:  # without the clamps it is another result
            found.experts.limit = found.shared.limit = 0.0
            with pytest.raises(AssertionError):
                close(found(*given), wanted(x, tokens))
            found.experts.limit = found.shared.limit = config.limit


def test_benchmarks_choose_evenly_whatever_the_table_says() -> None:
    config = Config.from_hf({**FLASH, **SMALL})
    for build in (Build(ops, moe_routing="uniform"), replace(gpu(), moe_routing="uniform")):
        layer = MoE(config, build, "m", Layer(ratio=0, sparse=False, hashed=True))
        tensors = moe_tensors(config, True, None)
        tensors["m.gate.tid2eid"] = torch.zeros(config.vocab_size, 2, dtype=torch.int64)
        load(build, tensors)
        x = normal(4, 60, config.hidden).to(build.device, build.dtype)
        _, ids = layer.route(x, torch.zeros(60, dtype=torch.int64, device=build.device))
        assert len(ids.unique()) == config.experts


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("format", "outputs", "held"),
    [("bf16", 20, False), ("fp8_block", 128, True), ("fp8_block", 20, False), ("mxfp4", 20, True)],
)
def test_groups_have_weights_of_their_own(
    format: str, outputs: int, held: bool, deterministic: bool
) -> None:
    groups, inputs = 3, 128
    quantise = FORMATS[format]
    tensor = stored(5, groups * outputs, inputs, quantise)
    cpu, other = Build(ops), gpu(deterministic)
    layers = [GroupedLinear(build, "g", groups, inputs, outputs) for build in (cpu, other)]
    load(cpu, {"g.weight": plain(tensor)})
    load(other, {"g.weight": tensor})
    assert isinstance(layers[1].stacked, PackedQuantized) is held
    for t in (0, 1, 66):
        x = normal(6, t, groups * inputs)
        close(layers[1](x.to(DEVICE, BF16)), layers[0](x))


@pytest.mark.parametrize("quantise", [None, quantize_mxfp4], ids=["bf16", "mxfp4"])
def test_a_layer_behind_a_norm_clamps_too(quantise: Quantise | None) -> None:
    build = gpu()
    norm = RMSNorm(build, "n", 64, 1e-6)
    layer = GatedMLP(build, "m", 64, 32, limit=0.5)
    load(
        build,
        {
            "n.weight": torch.ones(64), "m.gate_proj.weight": stored(1, 32, 64, quantise),
            "m.up_proj.weight": stored(2, 32, 64, quantise),
            "m.down_proj.weight": stored(3, 64, 32, quantise),
        },
    )  # fmt: skip
    for t in (1, 5):
        x = normal(4, t, 64).to(DEVICE, BF16)
        close(layer.after(norm, ResidualStream(x.clone())), layer(norm(x)).cpu())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("quantise", [None, quantize_mxfp4], ids=["bf16", "mxfp4"])
def test_results_in_float32_keep_more_than_the_models_dtype(
    quantise: Quantise | None, deterministic: bool
) -> None:
    """Of parts that are one weight, and of parts that are not."""
    values = [stored(7, 24, 64, None), stored(8, 8, 64, quantise)]
    build = gpu(deterministic)
    layer = Linear(build, ["a", "b"], 64, [24, 8])
    load(build, {"a.weight": values[0], "b.weight": values[1]})
    matrix = torch.cat([plain(v) for v in values]).double()
    for t in (0, 1, 3, 40):
        x = normal(9, t, 64)
        y = layer.exact(x.to(DEVICE, BF16))
        assert y.dtype == torch.float32 and y.shape == (t, 32)
        close(y, x.double() @ matrix.T, 1e-5)
