"""QuantTensor and the encoders: values entry by entry, error bounds, slices, contradictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.formats.layout import quantized_nbytes
from quire.formats.quantized import QuantTensor, concatenate_rows
from quire.formats.scaled import (
    quantize_fp8,
    quantize_fp8_block,
    quantize_integer,
    quantize_mxfp4,
    quantize_nvfp4,
)

ENCODERS: dict[str, Any] = {
    "fp8": quantize_fp8,
    "fp8 per tensor": lambda x: quantize_fp8(x, "tensor"),
    "fp8_block": quantize_fp8_block,
    "fp8_block ue8m0": lambda x: quantize_fp8_block(x, ue8m0=True),
    "nvfp4": quantize_nvfp4,
    "mxfp4": quantize_mxfp4,
    "int4": lambda x: quantize_integer(x, 4, 32),
    "int4 zeros": lambda x: quantize_integer(x, 4, 16, symmetric=False),
    "int8": lambda x: quantize_integer(x, 8, 64, dtype=torch.float32),
    "int8 zeros": lambda x: quantize_integer(x, 8, 32, symmetric=False, dtype=torch.bfloat16),
}
WIDTHS = {"fp8": 200, "fp8_block": 200}


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def make(name: str, rows: int = 200, seed: int = 0) -> tuple[QuantTensor, torch.Tensor]:
    values = matrix(rows, WIDTHS.get(name.split()[0], 256), seed)
    return ENCODERS[name](values), values


def e2m1(code: int) -> float:
    return (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)[code & 7] * (-1.0 if code & 8 else 1.0)


def nibble(tensor: QuantTensor, row: int, column: int) -> int:
    return int(tensor.codes[row, column // 2]) >> (4 * (column % 2)) & 15


def entry(tensor: QuantTensor, row: int, column: int) -> float:
    """One value by the definition of its format, in Python floats."""
    if tensor.format == "fp8":
        return float(tensor.codes[row, column]) * float(tensor.scales[row])
    if tensor.format == "fp8_block":
        return float(tensor.codes[row, column]) * float(tensor.scales[row // 128, column // 128])
    scale = tensor.scales[row, column // tensor.group[1]]
    if tensor.format == "nvfp4":
        assert tensor.row_scales is not None
        return e2m1(nibble(tensor, row, column)) * float(scale) * float(tensor.row_scales[row])
    if tensor.format == "mxfp4":
        return e2m1(nibble(tensor, row, column)) * 2.0 ** (int(scale) - 127)
    four = tensor.format == "int4"
    code = nibble(tensor, row, column) if four else int(tensor.codes[row, column])
    middle = 8 if four else 128
    zero = middle if tensor.zeros is None else int(tensor.zeros[row, column // tensor.group[1]])
    return (code - zero) * float(scale)


@pytest.mark.parametrize("name", ENCODERS)
def test_values_are_those_of_the_definition(name: str) -> None:
    tensor, _ = make(name, rows=131)
    values = tensor.dequantize()
    assert values.shape == tensor.shape and values.dtype == torch.float32
    for row in (0, 1, 127, 128, 130):
        for column in (0, 1, 15, 16, 31, 32, 127, 128, 199):
            assert float(values[row, column]) == pytest.approx(entry(tensor, row, column), rel=1e-6)


# Half a step of the coarsest binade, relative to the largest magnitude of a group that shares a
# scale: e4m3 32 / 2 of 448, e2m1 2 / 2 of 6. NVFP4's scale is itself rounded (1 / 16); a power of
# two may be twice as large as needed; integers have steps of 1 / 7 and 1 / 127, or 1 / 15 and
# 1 / 255 of a range of up to twice the largest magnitude, and rounded scales.
BOUNDS = {
    "fp8": 16 / 448,
    "fp8 per tensor": 16 / 448,
    "fp8_block": 16 / 448,
    "fp8_block ue8m0": 16 / 448 * 2,
    "nvfp4": (1 / 6) * (1 + 1 / 16) + 1 / 16,
    "mxfp4": 1 / 6 * 2,
    "int4": 0.51 / 7,
    "int4 zeros": 2 * 1.02 / 15,
    "int8": 0.51 / 127,
    "int8 zeros": 2 * 1.02 / 255 + 2**-8,
}


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), power=st.integers(-8, 8), rows=st.sampled_from([0, 1, 3, 129]))
def test_round_trip_errors_stay_within_half_a_step(
    name: str, seed: int, power: int, rows: int
) -> None:
    values = make(name, rows, seed)[1] * 2.0**power
    tensor = ENCODERS[name](values)
    error = (tensor.dequantize() - values).abs()
    if name in ("fp8", "fp8 per tensor") or tensor.format == "fp8_block":
        largest = values.abs().amax() if values.numel() else torch.zeros(())
        largest = largest.expand(values.shape)
    else:
        groups = values.unflatten(1, (-1, tensor.group[1]))
        largest = groups.abs().amax(2, keepdim=True).expand(groups.shape).reshape(values.shape)
    assert (error <= BOUNDS[name] * largest + 1e-12).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_zeros_stay_zeros_and_bad_values_are_refused(name: str) -> None:
    values = make(name)[1]
    assert not ENCODERS[name](torch.zeros_like(values)).dequantize().any()
    for bad in (torch.nan, torch.inf):
        values[3, 5] = bad
        with pytest.raises(ValueError, match="finite"):
            ENCODERS[name](values)


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_and_columns_are_those_of_the_values(name: str) -> None:
    tensor, _ = make(name)
    values = tensor.dequantize()
    border = 128
    assert torch.equal(tensor.rows(slice(border, 200)).dequantize(), values[border:])
    assert torch.equal(tensor.rows(slice(0, border)).dequantize(), values[:border])
    assert torch.equal(tensor.columns(slice(border, None)).dequantize(), values[:, border:])
    assert tensor.rows(slice(0, 0)).dequantize().shape == (0, tensor.shape[1])
    assert torch.equal(tensor.to("cpu").dequantize(), values)
    if tensor.format == "fp8_block":
        with pytest.raises(ValueError, match="indexed"):
            tensor.rows(torch.tensor([1]))
        with pytest.raises(ValueError, match="cut a group"):
            tensor.rows(slice(0, 100))
    else:
        order = torch.tensor([5, 0, 5])
        assert torch.equal(tensor.rows(order).dequantize(), values[order])
        assert torch.equal(tensor.rows(slice(3, 10)).dequantize(), values[3:10])


@pytest.mark.parametrize("name", [n for n in ENCODERS if not n.startswith("fp8 ") and n != "fp8"])
def test_columns_that_cut_a_group_are_refused(name: str) -> None:
    tensor, _ = make(name)
    with pytest.raises(ValueError, match="cut"):
        tensor.columns(slice(tensor.group[1] // 2, tensor.group[1] + 2))
    with pytest.raises(ValueError, match="step"):
        tensor.columns(slice(0, 128, 2))


def test_columns_within_one_group_of_integers() -> None:
    tensor = quantize_integer(matrix(3, 64), 4, 64)
    part = tensor.columns(slice(16, 32))
    assert torch.equal(part.dequantize(), tensor.dequantize()[:, 16:32])
    with pytest.raises(ValueError, match="pair"):
        tensor.columns(slice(1, 3))


@pytest.mark.parametrize("name", ENCODERS)
def test_stacked_parts_hold_both_and_count_their_bytes(name: str) -> None:
    first, second = make(name, 128)[0], make(name, 7, seed=1)[0]
    both = concatenate_rows([first, second])
    expected = torch.cat([first.dequantize(), second.dequantize()])
    assert torch.equal(both.dequantize(), expected)
    assert both.nbytes == sum(t.numel() * t.element_size() for t in both.tensors)
    if name == "int4 zeros":
        assert both.layout == "int4_g16"
        assert both.nbytes == quantized_nbytes("int4_g16", *both.shape)
    elif both.format not in ("int4", "int8"):
        assert both.nbytes == quantized_nbytes(both.format, *both.shape)


def test_parts_that_contradict_each_other_are_not_stacked() -> None:
    fp8 = quantize_fp8(matrix(4, 64))
    static = replace(fp8, activation="tensor", input_scale=torch.tensor(0.5))
    for other, why in (
        (quantize_mxfp4(matrix(4, 64)), "format"),
        (quantize_fp8(matrix(4, 32)), "width"),
        (replace(fp8, activation="none"), "activation"),
    ):
        with pytest.raises(ValueError, match=why):
            concatenate_rows([fp8, other])
    with pytest.raises(ValueError, match="input scale"):
        concatenate_rows([static, replace(static, input_scale=torch.tensor(0.25))])
    with pytest.raises(ValueError, match="group size"):
        concatenate_rows([quantize_integer(matrix(4, 64), 4, g) for g in (32, 64)])
    with pytest.raises(ValueError, match="within a block"):
        concatenate_rows([quantize_fp8_block(matrix(100, 64)), quantize_fp8_block(matrix(4, 64))])


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("fp8", {"format": "fp7"}, "unknown"),
        ("fp8", {"scales": torch.ones(3)}, "scales must be"),
        ("fp8", {"codes": torch.zeros(200, 200)}, "codes must be"),
        ("fp8", {"activation": "block"}, "activation"),
        ("fp8", {"activation": "tensor"}, "input_scale"),
        ("fp8", {"zeros": torch.zeros(200, 1, dtype=torch.uint8)}, "zeros"),
        ("fp8_block", {"scales": torch.ones(2, 1)}, "scales must be"),
        ("nvfp4", {"row_scales": None}, "row_scales"),
        ("nvfp4", {"scales": torch.ones(200, 16)}, "scales must be"),
        ("mxfp4", {"row_scales": torch.ones(200)}, "row_scales"),
        ("mxfp4", {"shape": (200, 250)}, "must be"),
        ("int4", {"scales": torch.ones(200, 7)}, "divide"),
        ("int4 zeros", {"zeros": torch.zeros(200, 3, dtype=torch.uint8)}, "zeros must be"),
    ],
)
def test_parts_that_do_not_fit_are_refused(name: str, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        replace(make(name)[0], **changes)


def test_nvfp4_scales_rounded_to_nearest_err_less_than_scales_rounded_up() -> None:
    """Although the former cut the largest values of some groups."""
    for seed in range(3):
        values = torch.randn(256, 256, generator=torch.Generator().manual_seed(seed))
        nearest = quantize_nvfp4(values)
        assert nearest.row_scales is not None
        factor = float(nearest.row_scales[0])
        groups = values.view(256, 16, 16)
        exact = groups.abs().amax(2) / 6 / factor
        low = nearest.scales.view(torch.uint8)
        assert (exact > nearest.scales.float()).any()
        higher = torch.where(exact > nearest.scales.float(), low + 1, low)
        step_up = higher.view(torch.float8_e4m3fn).float() * factor
        grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        places = (groups.abs() / step_up[:, :, None])[..., None].sub(grid).abs().argmin(-1)
        up = grid[places] * groups.sign() * step_up[:, :, None]
        errors = [
            (v - groups).square().mean() for v in (nearest.dequantize().view(256, 16, 16), up)
        ]
        assert errors[0] < 0.95 * errors[1]


def test_an_nvfp4_group_far_below_the_largest_becomes_zero_and_a_given_global_counts() -> None:
    values = torch.cat([torch.full((1, 16), 1e4), torch.full((1, 16), 1e-6)], 1)
    assert not quantize_nvfp4(values).dequantize()[:, 16:].any()
    tensor = quantize_nvfp4(matrix(2, 32), global_scale=0.25)
    assert tensor.row_scales is not None and tensor.row_scales.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4", "int8"])
def test_groups_that_do_not_divide_the_columns_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="divide"):
        ENCODERS[name](matrix(2, 70))
