"""Mixture of experts with quantised weights against the reference; deterministic bits of a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quire.kernels.reference.quantized.experts import quantized_experts as reference
from quire.kernels.reference.quantized.weights import FORMATS
from quire.kernels.triton.quantized.experts import SMALL_PAIRS, quantized_experts
from quire.kernels.triton.quantized.experts_small import experts_small, small_tiles
from quire.kernels.triton.quantized.pack import pack
from tests.kernels.triton import quantized_inputs
from tests.kernels.triton.marks import FULL
from tests.kernels.triton.moe_inputs import poisoned_memory, random, random_ids

# exp's overflow is meant: the gate is then far below zero.
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def inputs(
    format: str,
    t: int,
    e: int,
    k: int,
    h: int,
    i: int,
    device: torch.device,
    down: str | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """x, weights, ids, gate_up, down (in a format of its own if one is given), and the biases."""
    given = (
        random(1, t, h).to(device, torch.bfloat16),
        random(2, t, k).softmax(-1).to(device),
        random_ids(3, t, e, k).to(device),
        quantized_inputs.quantized_experts(format, e, 2 * i, h, device, 4),
        quantized_inputs.quantized_experts(down or format, e, h, i, device, 40),
    )
    biases = {"gate_up_bias": random(6, e, 2 * i), "down_bias": random(7, e, h)}
    return given, {name: b.to(device) for name, b in biases.items()}


def packed(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*given[:3], pack(given[3]), pack(given[4]))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """By the size of the whole: where large terms cancel, one value may be far off relatively."""
    assert found.dtype == wanted.dtype and torch.isfinite(found).all()
    error = (found.double() - wanted.double()).norm()
    assert error <= 2e-2 * wanted.double().norm()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("t", "e", "k", "h", "i"), [(0, 4, 2, 32, 32), (1, 4, 3, 32, 64), (40, 2, 2, 96, 32)]
)
def test_experts_equal_reference(
    t: int, e: int, k: int, h: int, i: int, format: str, deterministic: bool, device: torch.device
) -> None:
    given, biases = inputs(format, t, e, k, h, i, device)
    ready = packed(given)
    with poisoned_memory():
        found = quantized_experts(*ready, "silu", **biases, deterministic=deterministic)
    close(found, reference(*given, "silu", **biases))


@pytest.mark.parametrize(
    ("gate_up", "down"),
    [("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("nvfp4", "int4"), ("fp8_block", "mxfp4")],
)
def test_sorted_pairs_of_few_tokens_an_expert(
    gate_up: str, down: str, device: torch.device
) -> None:
    """In blocks of eight where both formats are served so; formats need not be alike."""
    given, biases = inputs(gate_up, 9, 32, 8, 96, 64, device, down)
    found = quantized_experts(*packed(given), "silu", **biases, deterministic=False)
    close(found, reference(*given, "silu", **biases))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="too slow in the interpreter")
@pytest.mark.parametrize("format", FORMATS)
def test_experts_of_production_sizes_equal_reference(format: str, device: torch.device) -> None:
    """Those of Qwen3-30B-A3B, of few pairs and of many; a row's deterministic bits are its own."""
    given, biases = inputs(format, 300, 16, 4, 2048, 768, device)
    ready = packed(given)
    wanted = reference(*given, "silu", **biases)
    bits = None
    for t in (300, 64, 9, 1):
        for deterministic in (False, True):
            tokens = (tensor[:t] for tensor in ready[:3])
            found = quantized_experts(
                *tokens, *ready[3:], "silu", **biases, deterministic=deterministic
            )
            close(found, wanted[:t])
        bits = found if bits is None else bits
        assert torch.equal(found, bits[:t])


@pytest.mark.parametrize(
    ("gate_up", "down"),
    [("fp8", "fp8"), ("fp8_block", "fp8_block"), ("nvfp4", "int4"), ("fp8_block", "mxfp4")],
)
def test_single_pairs_by_the_matrix_instruction(
    gate_up: str, down: str, device: torch.device
) -> None:
    """E4m3 as GPUs without an instruction for it have to; and formats that are not alike."""
    given, biases = inputs(gate_up, 2, 4, 3, 288, 320, device, down)
    wanted = reference(*given, "silu", **biases)
    for sms in (132, 1):  # few rows for the GPU, and many
        tiles = small_tiles(gate_up, down, 3, 2 * 3 * 640, sms)
        close(experts_small(*packed(given), "silu", **biases, tiles=tiles), wanted)


@pytest.mark.parametrize("first", [0, 2])
def test_a_token_may_lie_anywhere(first: int, device: torch.device) -> None:
    given, _ = inputs("fp8", 1, 4, 2, 132, 64, device)
    wide = torch.zeros(1, 140, device=device, dtype=torch.bfloat16)
    wide[:, first : first + 132] = given[0]
    ready = (wide[:, first : first + 132], *packed(given)[1:])
    found = quantized_experts(*ready, "silu", deterministic=False)
    close(found, reference(*given, "silu"))


@pytest.mark.parametrize(("kind", "limit"), [("silu", 0.4), ("swiglu_oai", 0.7)])
@pytest.mark.parametrize("t", [2, 40])
def test_clamped_activations(kind: str, limit: float, t: int, device: torch.device) -> None:
    given, _ = inputs("nvfp4", t, 3, 2, 128, 64, device)
    found = quantized_experts(*packed(given), kind, limit=limit, deterministic=False)
    close(found, reference(*given, kind, limit=limit))


def test_an_expert_that_no_token_chose_is_not_read(device: torch.device) -> None:
    for t in (1, 70):
        given, biases = inputs("int4", t, 4, 3, 64, 32, device)
        ids, gate_up, down = given[2:]
        ids.copy_(torch.tensor([0, 2, 3], dtype=torch.int32, device=device).expand(t, 3))
        gate_up.scales[1], down.scales[1] = torch.nan, torch.nan
        biases["down_bias"][1] = torch.nan
        found = quantized_experts(*packed(given), "silu", **biases, deterministic=False)
        close(found, reference(*given, "silu", **biases))


@pytest.mark.parametrize(
    "format",
    [
        pytest.param(format, marks=() if format in ("fp8", "nvfp4", "int8") else FULL)
        for format in FORMATS
    ],
)
def test_deterministic_bits_do_not_depend_on_the_other_tokens(
    format: str, device: torch.device
) -> None:
    given, _ = inputs(format, 37, 2, 2, 64, 32, device)
    x, weights, ids, gate_up, down = packed(given)
    together = quantized_experts(x, weights, ids, gate_up, down, "silu", deterministic=True)
    for row in (0, 36):
        mine = slice(row, row + 1)
        alone = quantized_experts(
            x[mine], weights[mine], ids[mine], gate_up, down, "silu", deterministic=True
        )
        assert torch.equal(alone[0], together[row])


def test_what_does_not_go_together_is_refused(device: torch.device) -> None:
    for t in (1, SMALL_PAIRS):
        given, _ = inputs("fp8", t, 4, 2, 64, 32, device)
        x, weights, ids, gate_up, down = packed(given)
        with pytest.raises(ValueError, match="kind"):
            quantized_experts(x, weights, ids, gate_up, down, "relu", deterministic=False)
        with pytest.raises(ValueError, match="x: expected"):
            quantized_experts(x[:, :32], weights, ids, gate_up, down, "silu", deterministic=False)
        with pytest.raises(ValueError, match="gate_up: expected"):
            quantized_experts(x, weights, ids, down, gate_up, "silu", deterministic=False)
        with pytest.raises(ValueError, match="down_bias"):
            quantized_experts(
                x, weights, ids, gate_up, down, "silu", deterministic=False, down_bias=x
            )
