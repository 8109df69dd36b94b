"""Experts on e4m3 tokens against the reference, and when they are chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from quire.kernels.reference.quantized.experts import quantized_experts as decoded_reference
from quire.kernels.reference.quantized.scaled_experts import scaled_experts as reference
from quire.kernels.triton.quantized import experts as module
from quire.kernels.triton.quantized.experts import quantized_experts
from quire.kernels.triton.quantized.pack import PackedQuantized, pack
from quire.kernels.triton.quantized.quantize import QuantizedTokens, quantize
from quire.kernels.triton.quantized.scaled_experts import (
    SCALED_FROM,
    scaled_experts,
    scaled_tiles,
    takes_quantized_pairs,
)
from tests.kernels.triton.marks import ON_GPU
from tests.kernels.triton.moe_inputs import poisoned_memory
from tests.kernels.triton.test_quantized_experts import inputs

pytestmark = pytest.mark.triton

EXPERTS = 20  # of which SCALED_FROM times as many pairs are more than the path for few takes


def wanting(weight: Any, activation: str = "token", scale: float | None = None) -> PackedQuantized:
    fixed = None if scale is None else torch.tensor(scale, device=weight.codes.device)
    return replace(pack(weight), activation=activation, input_scale=fixed)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.dtype == wanted.dtype and torch.isfinite(found).all()
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("format", ["fp8", "fp8_block"])
@pytest.mark.parametrize(
    "sizes",
    [
        *((t, 3, 2, 136, 128) for t in (1, 13, 70)),
        pytest.param((300, 16, 4, 2048, 768), marks=ON_GPU),
    ],
)
def test_experts_equal_reference(sizes: tuple[int, ...], format: str, device: torch.device) -> None:
    given, biases = inputs(format, *sizes, device)
    ready = *given[:3], wanting(given[3]), wanting(given[4])
    with poisoned_memory():
        found = scaled_experts(*ready, "silu", **biases)
    # Inner values that lie on a border of two codes may fall to either side.
    assert distance(found, reference(*given, "silu", **biases)) < 0.02
    assert distance(found, decoded_reference(*given, "silu", **biases)) < 0.06


def test_no_tokens(device: torch.device) -> None:
    given, _ = inputs("fp8", 0, 4, 2, 64, 32, device)
    found = scaled_experts(*given[:3], wanting(given[3]), wanting(given[4]), "silu")
    assert found.shape == (0, 64)


@pytest.mark.parametrize(("kind", "limit"), [("silu", 0.4), ("swiglu_oai", 0.7)])
def test_clamped_activations_and_static_scales(
    kind: str, limit: float, device: torch.device
) -> None:
    """Scales so small that values are cut."""
    given, _ = inputs("fp8", 20, 3, 2, 128, 64, device)
    ready = *given[:3], wanting(given[3], "tensor", 0.004), wanting(given[4], "tensor", 0.001)
    fixed = ready[3].input_scale, ready[4].input_scale
    found = scaled_experts(*ready, kind, limit=limit)
    wanted = reference(*given, kind, limit=limit, input_scales=fixed)
    assert distance(found, wanted) < 0.02
    assert distance(wanted, decoded_reference(*given, kind, limit=limit)) > 0.05


def test_an_expert_that_no_token_chose_is_not_read(device: torch.device) -> None:
    given, _ = inputs("fp8", 70, 4, 3, 64, 32, device)
    ids, gate_up, down = given[2:]
    ids.copy_(torch.tensor([0, 2, 3], dtype=torch.int32, device=device).expand(70, 3))
    gate_up.scales[1], down.scales[1] = torch.nan, torch.nan
    found = scaled_experts(*given[:3], wanting(gate_up), wanting(down), "silu")
    assert distance(found, reference(*given, "silu")) < 0.02


def test_bits_of_a_token_do_not_depend_on_the_others(device: torch.device) -> None:
    """With one tile: other tiles are other instructions on a GPU."""
    given, _ = inputs("fp8", 40, 3, 2, 128, 64, device)
    x, weights, ids = given[:3]
    gate_up, down = wanting(given[3]), wanting(given[4])
    tiles = scaled_tiles(80, 3, "fp8")
    together = scaled_experts(x, weights, ids, gate_up, down, "silu", tiles=tiles)
    for row in (0, 39):
        mine = slice(row, row + 1)
        given = x[mine], weights[mine], ids[mine], gate_up, down
        assert torch.equal(scaled_experts(*given, "silu", tiles=tiles)[0], together[row])


def test_many_pairs_whose_scheme_says_so_are_quantised(device: torch.device) -> None:
    """And no others: not in deterministic mode, not of few tokens, not by blocks that a tile would
    cut. Tokens that are quantised already give the same."""
    least = SCALED_FROM * EXPERTS
    if not takes_quantized_pairs(*both_wanting("fp8", 32, device), least, device):
        pytest.skip("this GPU does not multiply e4m3 tokens")
    for format, intermediate, wanted in (
        ("fp8", 32, True), ("fp8_block", 128, True), ("fp8_block", 64, False), ("nvfp4", 32, False),
    ):  # fmt: skip
        found = both_wanting(format, intermediate, device)
        assert takes_quantized_pairs(*found, least, device) is wanted
        assert not takes_quantized_pairs(*found, least - 1, device)
        plain = replace(found[1], activation="none")
        assert not takes_quantized_pairs(found[0], plain, least, device)
    t = module.SMALL_PAIRS + 1
    given, _ = inputs("fp8", t, 4, 1, 64, 32, device)
    x, weights, ids = given[:3]
    gate_up, down = wanting(given[3]), wanting(given[4])
    chosen = quantized_experts(x, weights, ids, gate_up, down, "silu", deterministic=False)
    assert torch.equal(chosen, scaled_experts(x, weights, ids, gate_up, down, "silu"))
    tokens = QuantizedTokens(*quantize(x))
    again = quantized_experts(tokens, weights, ids, gate_up, down, "silu", deterministic=False)
    assert torch.equal(again, chosen)
    exact = quantized_experts(x, weights, ids, gate_up, down, "silu", deterministic=True)
    decoded = quantized_experts(x, weights, ids, pack(given[3]), pack(given[4]), "silu",
                                deterministic=True)  # fmt: skip
    assert torch.equal(exact, decoded)


def both_wanting(
    format: str, intermediate: int, device: torch.device
) -> tuple[PackedQuantized, PackedQuantized]:
    given, _ = inputs(format, 1, EXPERTS, 2, 64, intermediate, device)
    activation = "token" if format.startswith("fp8") else "none"
    return wanting(given[3], activation), wanting(given[4], activation)
