"""The grouped product of e4m3 pairs with e4m3 weights: short blocks, odd sizes, both ways round."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.quantized.scaled_grouped_gemm import scaled_grouped_gemm as reference
from quire.kernels.triton.moe.align import align
from quire.kernels.triton.quantized.pack import pack
from quire.kernels.triton.quantized.quantize import QuantizedTokens, quantize
from quire.kernels.triton.quantized.scaled_grouped_gemm import GroupedTile, scaled_grouped_gemm
from tests.kernels.triton.moe_inputs import poisoned_memory, random, random_ids
from tests.kernels.triton.quantized_inputs import quantized_experts

TALL = GroupedTile(16, 64, 4, 2, 1, True)
FLAT = GroupedTile(64, 32, 4, 2, 1)


def both(
    ids: torch.Tensor,
    sizes: tuple[int, int, int],
    format: str,
    kind: str,
    tile: GroupedTile,
    device: torch.device,
    *,
    from_tokens: bool,
    exact: bool = False,
) -> None:
    """The kernel and the reference on the same codes; `sizes`: experts, outputs, inputs."""
    e, n, c = sizes
    rows = ids.shape[0] if from_tokens else ids.numel()
    x = random(1, rows, c).to(device, torch.bfloat16)
    codes, scales = quantize(x, 0 if format == "fp8" else 128)
    height = n if kind == "" else 2 * n
    weight = quantized_experts(format, e, height, c, device, 4)
    bias = random(6, e, height).to(device)
    with poisoned_memory():
        aligned = align(ids.to(device), e, tile.tokens)
        found = scaled_grouped_gemm(
            QuantizedTokens(codes, scales), pack(weight), aligned, tile, kind=kind,
            bias=bias, from_tokens=from_tokens, dtype=torch.float32, exact=exact,
        )  # fmt: skip
    wanted = reference(
        codes, scales, weight, aligned, kind=kind, bias=bias, from_tokens=from_tokens,
        dtype=torch.float32,
    )  # fmt: skip
    # Hopper's instruction keeps 13 bits of a sum of e4m3 products.
    tolerance = 1e-5 if device.type == "cpu" else 5e-3
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tile", [TALL, FLAT])
@pytest.mark.parametrize("from_tokens", [False, True])
@pytest.mark.parametrize("format", ["fp8", "fp8_block"])
def test_product_equals_reference(
    format: str, from_tokens: bool, tile: GroupedTile, device: torch.device
) -> None:
    ids = random_ids(3, 21, 3, 2)
    both(ids, (3, 136, 160), format, "", tile, device, from_tokens=from_tokens)
    both(ids, (3, 128, 160), format, "silu", tile, device, from_tokens=from_tokens, exact=True)


@pytest.mark.parametrize("t", [0, 1, 17])
def test_few_tokens_and_experts_without_any(t: int, device: torch.device) -> None:
    both(random_ids(4, t, 9, 1), (9, 24, 40), "fp8", "", TALL, device, from_tokens=True)


def test_rows_of_any_length(device: torch.device) -> None:
    """Rows of 33 and 130 bytes, which the copy engine cannot read."""
    ids = random_ids(5, 9, 3, 2)
    both(ids, (3, 7, 33), "fp8", "", TALL, device, from_tokens=False)
    both(ids, (3, 128, 130), "fp8_block", "gelu_tanh", FLAT, device, from_tokens=False)


def test_a_rows_bits_depend_on_nothing_but_the_row(device: torch.device) -> None:
    weight = pack(quantized_experts("fp8", 3, 40, 256, device, 4))
    codes, scales = quantize(random(1, 30, 256).to(device, torch.bfloat16))
    ids = random_ids(2, 30, 3, 1).to(device)

    def product(rows: slice) -> torch.Tensor:
        tokens = QuantizedTokens(codes[rows].contiguous(), scales[rows].contiguous())
        aligned = align(ids[rows], 3, TALL.tokens)
        found = scaled_grouped_gemm(tokens, weight, aligned, TALL, from_tokens=True)
        return found[aligned.pairs.argsort()]

    assert torch.equal(product(slice(0, 30))[29:], product(slice(29, 30)))


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    tokens = QuantizedTokens(*quantize(random(1, 3, 64).to(device, torch.bfloat16)))
    aligned = align(random_ids(2, 3, 2, 1).to(device), 2, 16)

    def product(format: str, n: int, k: int, tile: GroupedTile, kind: str = "") -> None:
        weight = pack(quantized_experts(format, 2, n, k, device, 4))
        scaled_grouped_gemm(tokens, weight, aligned, tile, kind=kind, from_tokens=True)

    with pytest.raises(ValueError, match="64 tokens for blocks of 16"):
        product("fp8", 8, 64, FLAT)
    with pytest.raises(ValueError, match="nvfp4 is no stack"):
        product("nvfp4", 8, 64, TALL)
    with pytest.raises(ValueError, match="codes: expected"):
        product("fp8", 8, 96, TALL)
    with pytest.raises(ValueError, match="scales: expected"):
        product("fp8_block", 128, 64, TALL)
    tokens = QuantizedTokens(*quantize(random(1, 3, 64).to(device, torch.bfloat16), 128))
    with pytest.raises(ValueError, match="cut blocks of 128"):
        product("fp8_block", 128, 64, TALL, "silu")
