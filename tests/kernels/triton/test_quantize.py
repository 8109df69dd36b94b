"""Activations as e4m3: alone against the reference, fused against the kernels they are made of."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.quantized import quantize as reference
from quire.kernels.triton.activation.gated_activation import gated_activation
from quire.kernels.triton.launch import INTERPRETED
from quire.kernels.triton.norm.rms_norm import add_rms_norm, rms_norm
from quire.kernels.triton.quantized.quantize import (
    add_rms_norm_quantize,
    gated_activation_quantize,
    quantize,
)
from tests.kernels.triton.gemm_inputs import matrix, vector
from tests.kernels.triton.moe_inputs import poisoned_memory

BF16 = torch.bfloat16
SHAPES = [(0, 64), (1, 1), (3, 33), (5, 300), (2, 1024)]
Quantized = tuple[torch.Tensor, torch.Tensor]


def same(found: Quantized, wanted: Quantized) -> None:
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-6, atol=0)
    # A quotient may fall on the other side of a tie where the division is not quite exact.
    differ = found[0].view(torch.uint8) != wanted[0].view(torch.uint8)
    assert found[0].shape == wanted[0].shape and differ.sum() <= 1 + differ.numel() // 200


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize(("t", "k"), SHAPES)
def test_codes_and_scales_equal_reference(
    t: int, k: int, group: int, power_of_two: bool, device: torch.device
) -> None:
    x = matrix(t, k, BF16, device, 1)
    with poisoned_memory():
        found = quantize(x, group, power_of_two=power_of_two)
    same(found, reference.quantize(x, group, power_of_two=power_of_two))


@pytest.mark.parametrize(("t", "k"), SHAPES)
def test_a_fixed_scale_is_every_rows_and_cuts_what_is_beyond_it(
    t: int, k: int, device: torch.device
) -> None:
    x, gated = matrix(t, k, BF16, device, 1), matrix(t, 2 * k, BF16, device, 2)
    fixed = torch.tensor(2.0**-9, device=device)  # 448 of them are 0.875
    found = quantize(x, fixed=fixed)
    assert found[1].tolist() == [2.0**-9] * t
    wanted = (x.float() * 512).clamp(-448, 448).to(torch.float8_e4m3fn)
    same(found, (wanted, found[1]))
    if x.numel() > 100:
        assert found[0].float().abs().max() == 448
    same(gated_activation_quantize(gated, "silu", fixed=fixed),
         quantize(gated_activation(gated, "silu"), fixed=fixed))  # fmt: skip
    residual, weight = matrix(t, k, BF16, device, 3), vector(k, device, 4)
    normed = add_rms_norm(x, residual.clone(), weight, 1e-5)
    same(add_rms_norm_quantize(x, residual, weight, 1e-5, fixed=fixed),
         quantize(normed, fixed=fixed))  # fmt: skip


def test_rounding_is_to_nearest_and_ties_go_to_even(device: torch.device) -> None:
    # With 448 in the row the scale is 1. Codes by the table of e4m3: 1.0625 lies between 1 and
    # 1.125, 1.1875 between 1.125 and 1.25, 2^-10 between 0 and the smallest, 2^-9.
    given = [448, 1.0625, 1.1875, 1.07, 2.0**-10, 3 * 2.0**-10, 17.0, -19.0, 0.0]
    wanted = [448, 1.0, 1.25, 1.125, 0.0, 2 * 2.0**-9, 16.0, -20.0, 0.0]
    codes, scales = quantize(torch.tensor([given], dtype=BF16, device=device))
    assert scales.tolist() == [1.0] and codes.float().tolist() == [wanted]


def test_zeros_and_nan_stay_what_they_are(device: torch.device) -> None:
    x = torch.zeros(3, 256, dtype=BF16, device=device)
    x[1, 3], x[2] = torch.nan, 2.0
    for group in (0, 128):
        codes, scales = quantize(x, group)
        values = reference.dequantize_rows(codes, scales)
        assert not values[0].any()
        # Triton's interpreter makes NaN a number as it makes e4m3.
        assert INTERPRETED or values[1, 3].isnan()
        torch.testing.assert_close(values[2], x[2].float())


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("t", "h"), SHAPES)
def test_norm_and_quantisation_in_one(
    t: int, h: int, add: bool, group: int, device: torch.device
) -> None:
    x = matrix(t, h, BF16, device, 1) if add else None
    residual, weight = matrix(t, h, BF16, device, 2), vector(h, device, 3)
    other = residual.clone()
    y = rms_norm(other, weight, 1e-5) if x is None else add_rms_norm(x, other, weight, 1e-5)
    normed = torch.full((t, h), torch.nan, dtype=BF16, device=device)
    with poisoned_memory():
        found = add_rms_norm_quantize(x, residual, weight, 1e-5, group, normed=normed)
    assert torch.equal(residual, other) and torch.equal(normed, y)
    same(found, reference.quantize(y, group))


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize(("kind", "limit"), [("silu", 0.0), ("gelu_tanh", 0.0), ("swiglu_oai", 1)])
@pytest.mark.parametrize(("t", "i"), SHAPES)
def test_activation_and_quantisation_in_one(
    t: int, i: int, kind: str, limit: float, group: int, device: torch.device
) -> None:
    x = matrix(t, 2 * i, BF16, device, 1)
    with poisoned_memory():
        codes, scales = gated_activation_quantize(x, kind, group, limit=limit)
    y = gated_activation(x, kind, limit=limit)
    wanted = reference.dequantize_rows(*reference.quantize(y, group))
    found = reference.dequantize_rows(codes, scales)
    assert found.shape == wanted.shape
    # The activation may be rounded to its neighbour, and with it the code and the scale.
    assert (found - wanted).norm() <= 0.02 * wanted.norm() + 1e-6
    torch.testing.assert_close(scales, reference.quantize(y, group)[1], rtol=1e-2, atol=0)


def test_a_rows_codes_do_not_depend_on_the_others(device: torch.device) -> None:
    x = matrix(9, 160, BF16, device, 1)
    codes, scales = quantize(x)
    for row in range(9):
        alone = quantize(x[row : row + 1])
        assert torch.equal(alone[0][0].view(torch.uint8), codes[row].view(torch.uint8))
        assert torch.equal(alone[1][0], scales[row])


def test_other_groups_and_layouts_are_refused(device: torch.device) -> None:
    x = torch.ones(2, 8, dtype=BF16, device=device)
    with pytest.raises(ValueError, match="group: 64"):
        quantize(x, 64)
    with pytest.raises(ValueError, match="contiguous rows"):
        quantize(x[:, ::2])
    with pytest.raises(ValueError, match="no gate and up"):
        gated_activation_quantize(x[:, :7], "silu")
    with pytest.raises(ValueError, match="relu"):
        gated_activation_quantize(x, "relu")
    with pytest.raises(ValueError, match="is not the residual's"):
        add_rms_norm_quantize(x, x[:1], torch.ones(8, device=device), 1e-5)
