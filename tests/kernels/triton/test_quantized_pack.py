"""Packing for the kernels loses nothing, and refuses what the kernels do not have."""

from __future__ import annotations

import pytest
import torch

from quire.formats.quantized import QuantTensor
from quire.kernels.dense import TOGETHER, DenseWeights
from quire.kernels.reference.quantized.weights import (
    FORMATS,
    FOUR_BITS,
    QuantizedWeight,
    dequantize,
    unpack_codes,
)
from quire.kernels.triton.quantized.pack import PackedQuantized, pack
from tests.kernels.triton.quantized_inputs import quantized, quantized_experts, unpacked_codes


def as_tensor(weight: QuantizedWeight) -> QuantTensor:
    parts = weight.codes, weight.scales, weight.row_scales, weight.zeros
    return QuantTensor(weight.format, (weight.n, weight.k), *parts)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (3, 288), (130, 256)])
def test_codes_come_back_in_order(format: str, n: int, k: int, device: torch.device) -> None:
    weight = quantized(format, n, k, device, 1, group=32)
    if format == "nvfp4":  # whose codes under a scale of zero are cleared
        weight.scales.copy_(weight.scales.float() + 1)
    codes = unpack_codes(weight.codes) if format in FOUR_BITS else weight.codes.view(torch.uint8)
    assert torch.equal(unpacked_codes(pack(weight)), codes)


def test_every_nvfp4_scale_keeps_its_value(device: torch.device) -> None:
    # 127 scales, all of e4m3 that are not negative nor NaN, and one more zero for a whole block.
    numbers = torch.arange(128, dtype=torch.uint8, device=device).clamp(max=126)
    scales = numbers.view(torch.float8_e4m3fn)
    codes = torch.full((1, 1024), 0x22, dtype=torch.uint8, device=device)
    weight = QuantizedWeight("nvfp4", codes, scales[None], torch.ones(1, device=device))
    packed = pack(weight)
    assert packed.scales is not None and packed.row_scales is not None
    bytes_ = packed.scales.t().contiguous().view(torch.uint8).int()
    value = torch.exp2((bytes_ >> 3) - 10.0) * (1 + (bytes_ & 7) / 8)
    wanted = scales.float()
    assert torch.equal(value[0, 1:126], wanted[1:126])
    # Zero has no such byte: its codes, 1.0 elsewhere, are zero instead.
    assert not unpacked_codes(packed)[0, :16].any()
    assert unpacked_codes(packed)[0, 16:].all()
    assert packed.row_scales.tolist() == [128.0]


def test_experts_are_packed_one_by_one(device: torch.device) -> None:
    weight = quantized_experts("nvfp4", 3, 8, 96, device, 1)
    packed = pack(weight)
    for expert in range(3):
        alone = pack(weight[expert])
        assert alone.scales is not None and packed.scales is not None
        assert torch.equal(alone.codes, packed.codes[expert])
        assert torch.equal(alone.scales, packed.scales[expert])


@pytest.mark.parametrize("format", FORMATS)
def test_experts_packed_some_at_a_time_are_those_packed_alone(
    format: str, device: torch.device
) -> None:
    kernels = DenseWeights(torch.bfloat16, device)
    count = 2 * TOGETHER + 3
    some = quantized_experts(format, count, 128, 96, device, 1, group=32)
    matrices = [as_tensor(some[expert]) for expert in range(count)]
    packed = kernels.pack_experts(count, iter(matrices))
    alone = kernels.stack(count, map(kernels.pack, matrices))
    assert isinstance(packed, PackedQuantized) and isinstance(alone, PackedQuantized)
    assert packed.experts == count and (packed.n, packed.k) == (128, 96)
    for name in ("codes", "scales", "row_scales", "zeros"):
        found, wanted = getattr(packed, name), getattr(alone, name)
        assert (found is None) == (wanted is None)
        assert found is None or torch.equal(found, wanted)


def test_experts_that_differ_are_refused_wherever_they_meet(device: torch.device) -> None:
    kernels = DenseWeights(torch.bfloat16, device)
    for other in (quantized("nvfp4", 16, 64, device, 1), quantized("int8", 8, 64, device, 1, 32)):
        for place in (1, TOGETHER, TOGETHER + 1):
            matrices = [as_tensor(quantized("nvfp4", 8, 64, device, 1)) for _ in range(place)]
            with pytest.raises(ValueError, match=r"other experts|others do not"):
                kernels.pack_experts(place + 1, iter([*matrices, as_tensor(other)]))


def test_values_by_hand() -> None:
    # Codes 1 to 8 and their negatives' nibbles: 0.5, 1, 1.5, 2, 3, 4, 6, -0.
    codes = torch.tensor([[0x21, 0x43, 0x65, 0x87] * 4], dtype=torch.uint8)
    weight = QuantizedWeight("mxfp4", codes, torch.tensor([[128]], dtype=torch.uint8))
    assert dequantize(weight)[0, :8].tolist() == [1, 2, 3, 4, 6, 8, 12, 0]
    scales = torch.tensor([[1.5, 3.0]]).to(torch.float8_e4m3fn)
    weight = QuantizedWeight("nvfp4", codes, scales, torch.tensor([2.0]))
    assert dequantize(weight)[0, [0, 6, 16, 22]].tolist() == [1.5, 18, 3, 36]
    ints = QuantizedWeight("int4", codes, torch.tensor([[0.5]], dtype=torch.float16))
    assert dequantize(ints)[0, :4].tolist() == [-3.5, -3, -2.5, -2]
    zeros = torch.tensor([[3]], dtype=torch.uint8)
    ints = QuantizedWeight("int8", codes, torch.ones(1, 1, dtype=torch.bfloat16), None, zeros)
    assert dequantize(ints)[0, :2].tolist() == [0x21 - 3, 0x43 - 3]


def test_what_no_kernel_serves_is_refused() -> None:
    weight = quantized("nvfp4", 4, 64, torch.device("cpu"), 1)
    scales = weight.scales.float()
    scales[1, 2] = torch.nan
    bad = QuantizedWeight("nvfp4", weight.codes, scales.to(torch.float8_e4m3fn), weight.row_scales)
    with pytest.raises(ValueError, match="NaN have no meaning"):
        pack(bad)
    with pytest.raises(ValueError, match="row_scales of nvfp4"):
        pack(QuantizedWeight("nvfp4", weight.codes, weight.scales))
    with pytest.raises(ValueError, match="'fp4' is not one of"):
        pack(QuantizedWeight("fp4", weight.codes, weight.scales))
    with pytest.raises(ValueError, match=r"scales of mxfp4: expected torch\.uint8 \[4, 2\]"):
        pack(QuantizedWeight("mxfp4", weight.codes, weight.scales.view(torch.uint8)))
    with pytest.raises(ValueError, match="255 is NaN"):
        full = torch.full((4, 2), 255, dtype=torch.uint8)
        pack(QuantizedWeight("mxfp4", weight.codes, full))
    with pytest.raises(ValueError, match="48 columns"):
        codes = torch.zeros(4, 48, dtype=torch.uint8)
        pack(QuantizedWeight("int4", codes, torch.ones(4, 2, dtype=torch.float16)))
