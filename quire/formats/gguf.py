"""Exact codecs of llama.cpp's block formats in plain torch.

Layouts: ggml/src/ggml-common.h of llama.cpp. `dequantize` gives the same float32 bits as the
`gguf` package; `quantize` does too for the formats of 32 values. For the k formats it is a plain
min-max encoder: correct, but without llama.cpp's search for the best scales.

Shape suffixes: B blocks, G groups of a k-format block, V values of a block or group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.formats.blocks import BlockTensor
from quire.formats.layout import BLOCK_FORMATS, BlockFormat, row_bytes

__all__ = [
    "BLOCK_FORMATS",
    "DENSE_TYPES",
    "BlockFormat",
    "BlockTensor",
    "dequantize",
    "quantize",
    "row_bytes",
]

DENSE_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def dequantize(format: str, data: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Values of packed rows.

    data: uint8 [rows, bytes per row]. Returns float32 [rows, columns] = `shape`.
    ValueError if the format is unknown or the shapes disagree.
    """
    tensor = BlockTensor(format, shape, data)  # checks that the three agree
    if format in DENSE_TYPES:
        return tensor.data.contiguous().view(DENSE_TYPES[format]).float().reshape(shape)
    blocks = data.reshape(-1, BLOCK_FORMATS[format].bytes_per_block)
    return _DECODERS[format](blocks).reshape(shape)


def quantize(format: str, values: torch.Tensor) -> BlockTensor:
    """Packs a float tensor [rows, columns], rounding to nearest.

    ValueError if the format is unknown or a row is not a whole number of blocks.
    """
    if format not in BLOCK_FORMATS:
        raise ValueError(f"unknown block format {format!r}")
    rows, columns = values.shape
    width = row_bytes(format, columns)
    if format in DENSE_TYPES:
        data = values.to(DENSE_TYPES[format]).contiguous().view(torch.uint8)
    else:
        blocks = values.float().reshape(-1, BLOCK_FORMATS[format].values_per_block)
        data = _ENCODERS[format](blocks)
    return BlockTensor(format, (rows, columns), data.reshape(rows, width))


def _half(bytes_B2: torch.Tensor) -> torch.Tensor:
    return bytes_B2.contiguous().view(torch.float16).float()


def _half_bytes(values_B1: torch.Tensor) -> torch.Tensor:
    return values_B1.half().view(torch.uint8)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def _nibbles(bytes_BV: torch.Tensor, group: int) -> torch.Tensor:
    """Low then high nibbles of each run of `group` bytes: [B, 2 * V]."""
    blocks, width = bytes_BV.shape
    runs = bytes_BV.reshape(blocks, width // group, 1, group)
    return torch.cat([runs & 0x0F, runs >> 4], dim=2).reshape(blocks, 2 * width)


def _pack_nibbles(values_BV: torch.Tensor, group: int) -> torch.Tensor:
    """Inverse of `_nibbles`: uint8 values below 16, [B, V] to [B, V / 2]."""
    blocks, width = values_BV.shape
    runs = values_BV.reshape(blocks, width // (2 * group), 2, group)
    return (runs[:, :, 0] | (runs[:, :, 1] << 4)).reshape(blocks, width // 2)


def _bit_planes(bytes_BV: torch.Tensor, bits: int) -> torch.Tensor:
    """The fields of `bits` bits of each byte, field-major: [B, 8 / bits, V]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=bytes_BV.device)
    return (bytes_BV[:, None, :] >> shifts[:, None]) & ((1 << bits) - 1)


def _pack_planes(fields_BFV: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `_bit_planes`: uint8 [B, 8 / bits, V] to [B, V]."""
    packed = torch.zeros_like(fields_BFV[:, 0])
    for field in range(8 // bits):
        packed |= fields_BFV[:, field] << (field * bits)
    return packed


# Formats of 32 values: a half scale, for the _1 kinds a half minimum, then the codes. The fifth
# bits of q5 are one little-endian word, bit v for value v.


def _decode_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks[:, :2])


def _encode_q8_0(values: torch.Tensor) -> torch.Tensor:
    scale = values.abs().amax(1, keepdim=True) / 127
    scaled = values * _inverse(scale)
    # C's roundf: halves away from zero.
    magnitude = scaled.abs()
    floor = magnitude.floor()
    rounded = scaled.sign() * (floor + (2 * (magnitude - floor)).floor())
    return torch.cat([_half_bytes(scale), rounded.to(torch.int8).view(torch.uint8)], 1)


def _decode_q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks[:, :2]) * (_nibbles(blocks[:, 2:], 16).float() - 8)


def _encode_q4_0(values: torch.Tensor) -> torch.Tensor:
    scale, codes = _symmetric_codes(values, 8)
    return torch.cat([_half_bytes(scale), _pack_nibbles(codes, 16)], 1)


def _decode_q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks[:, :2]) * _nibbles(blocks[:, 4:], 16).float() + _half(blocks[:, 2:4])


def _encode_q4_1(values: torch.Tensor) -> torch.Tensor:
    scale, minimum, codes = _affine_codes(values, 15)
    return torch.cat([_half_bytes(scale), _half_bytes(minimum), _pack_nibbles(codes, 16)], 1)


def _decode_q5_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 6:], 16) | (_fifth_bits(blocks[:, 2:6]) << 4)
    return _half(blocks[:, :2]) * (codes.float() - 16)


def _encode_q5_0(values: torch.Tensor) -> torch.Tensor:
    scale, codes = _symmetric_codes(values, 16)
    low = _pack_nibbles(codes & 0x0F, 16)
    return torch.cat([_half_bytes(scale), _pack_fifth_bits(codes >> 4), low], 1)


def _decode_q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 8:], 16) | (_fifth_bits(blocks[:, 4:8]) << 4)
    return _half(blocks[:, :2]) * codes.float() + _half(blocks[:, 2:4])


def _encode_q5_1(values: torch.Tensor) -> torch.Tensor:
    scale, minimum, codes = _affine_codes(values, 31)
    low = _pack_nibbles(codes & 0x0F, 16)
    high = _pack_fifth_bits(codes >> 4)
    return torch.cat([_half_bytes(scale), _half_bytes(minimum), high, low], 1)


def _symmetric_codes(values: torch.Tensor, half_range: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale [B, 1] and codes 0 to 2 * half_range - 1; the largest magnitude gets code 0."""
    extreme = values.gather(1, values.abs().argmax(1, keepdim=True))
    scale = extreme / -half_range
    codes = (values * _inverse(scale) + (half_range + 0.5)).trunc()
    return scale, codes.clamp(0, 2 * half_range - 1).to(torch.uint8)


def _affine_codes(
    values: torch.Tensor, largest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale [B, 1], minimum [B, 1] and codes 0 to `largest`."""
    minimum = values.amin(1, keepdim=True)
    scale = (values.amax(1, keepdim=True) - minimum) / largest
    codes = ((values - minimum) * _inverse(scale) + 0.5).trunc()
    return scale, minimum, codes.clamp(0, largest).to(torch.uint8)


def _fifth_bits(bytes_B4: torch.Tensor) -> torch.Tensor:
    return _bit_planes(bytes_B4, 1).transpose(1, 2).reshape(bytes_B4.shape[0], 32)


def _pack_fifth_bits(bits_BV: torch.Tensor) -> torch.Tensor:
    return _pack_planes(bits_BV.reshape(-1, 4, 8).transpose(1, 2), 1)


# Formats of 256 values. q4_k and q5_k: half scale and half minimum, eight 6-bit scales and eight
# 6-bit minima in 12 bytes, codes. q6_k: codes, sixteen int8 scales, half scale.


def _unpack_scales(packed_B12: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight 6-bit scales and eight 6-bit minima, float32 [B, 8] each."""
    first, second, mixed = packed_B12[:, :4], packed_B12[:, 4:8], packed_B12[:, 8:]
    scales = torch.cat([first & 0x3F, (mixed & 0x0F) | ((first >> 2) & 0x30)], 1)
    minima = torch.cat([second & 0x3F, (mixed >> 4) | ((second >> 2) & 0x30)], 1)
    return scales.float(), minima.float()


def _pack_scales(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Inverse of `_unpack_scales`: uint8 [B, 8] below 64 each, to [B, 12]."""
    first = scales[:, :4] | ((scales[:, 4:] & 0x30) << 2)
    second = minima[:, :4] | ((minima[:, 4:] & 0x30) << 2)
    mixed = (scales[:, 4:] & 0x0F) | ((minima[:, 4:] & 0x0F) << 4)
    return torch.cat([first, second, mixed], 1)


def _scale_groups(blocks: torch.Tensor, codes_BV: torch.Tensor) -> torch.Tensor:
    scales, minima = _unpack_scales(blocks[:, 4:16])
    scales = (_half(blocks[:, :2]) * scales)[:, :, None]
    minima = (_half(blocks[:, 2:4]) * minima)[:, :, None]
    return scales * codes_BV.reshape(-1, 8, 32).float() - minima


def _grouped_codes(values: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 bytes of scales, and codes 0 to `largest` as uint8 [B, 256]."""
    values_BGV = values.reshape(-1, 8, 32)
    minima = (-values_BGV.amin(2)).clamp(min=0)
    scales = (values_BGV.amax(2) + minima).clamp(min=0) / largest
    scale = (scales.amax(1, keepdim=True) / 63).half().float()
    minimum = (minima.amax(1, keepdim=True) / 63).half().float()
    scale_codes = (scales * _inverse(scale)).round().clamp(0, 63)
    minimum_codes = (minima * _inverse(minimum)).round().clamp(0, 63)
    offset = (minimum * minimum_codes)[:, :, None]
    codes = ((values_BGV + offset) * _inverse(scale * scale_codes)[:, :, None]).round()
    packed = _pack_scales(scale_codes.to(torch.uint8), minimum_codes.to(torch.uint8))
    head = torch.cat([_half_bytes(scale), _half_bytes(minimum), packed], 1)
    return head, codes.clamp(0, largest).to(torch.uint8).reshape(-1, 256)


def _decode_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _scale_groups(blocks, _nibbles(blocks[:, 16:], 32))


def _encode_q4_k(values: torch.Tensor) -> torch.Tensor:
    head, codes = _grouped_codes(values, 15)
    return torch.cat([head, _pack_nibbles(codes, 32)], 1)


def _decode_q5_k(blocks: torch.Tensor) -> torch.Tensor:
    high = _bit_planes(blocks[:, 16:48], 1).reshape(-1, 256)
    return _scale_groups(blocks, _nibbles(blocks[:, 48:], 32) | (high << 4))


def _encode_q5_k(values: torch.Tensor) -> torch.Tensor:
    head, codes = _grouped_codes(values, 31)
    high = _pack_planes((codes >> 4).reshape(-1, 8, 32), 1)
    return torch.cat([head, high, _pack_nibbles(codes & 0x0F, 32)], 1)


def _decode_q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _nibbles(blocks[:, :128], 64)
    high = torch.cat([_bit_planes(blocks[:, 128:160], 2), _bit_planes(blocks[:, 160:192], 2)], 1)
    codes = (low | (high.reshape(-1, 256) << 4)).float() - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    scales = (_half(blocks[:, 208:]) * scales)[:, :, None]
    return scales * codes.reshape(-1, 16, 16)


def _encode_q6_k(values: torch.Tensor) -> torch.Tensor:
    values_BGV = values.reshape(-1, 16, 16)
    scales = values_BGV.abs().amax(2) / 31
    scale = (scales.amax(1, keepdim=True) / 127).half().float()
    scale_codes = (scales * _inverse(scale)).round().clamp(0, 127)
    codes = (values_BGV * _inverse(scale * scale_codes)[:, :, None]).round().clamp(-32, 31)
    unsigned = (codes + 32).to(torch.uint8).reshape(-1, 256)
    low = _pack_nibbles(unsigned & 0x0F, 64)
    high = unsigned >> 4
    halves = [_pack_planes(half.reshape(-1, 4, 32), 2) for half in (high[:, :128], high[:, 128:])]
    return torch.cat([low, *halves, scale_codes.to(torch.uint8), _half_bytes(scale)], 1)


_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "q4_0": _decode_q4_0,
    "q4_1": _decode_q4_1,
    "q5_0": _decode_q5_0,
    "q5_1": _decode_q5_1,
    "q8_0": _decode_q8_0,
    "q4_k": _decode_q4_k,
    "q5_k": _decode_q5_k,
    "q6_k": _decode_q6_k,
}

_ENCODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "q4_0": _encode_q4_0,
    "q4_1": _encode_q4_1,
    "q5_0": _encode_q5_0,
    "q5_1": _encode_q5_1,
    "q8_0": _encode_q8_0,
    "q4_k": _encode_q4_k,
    "q5_k": _encode_q5_k,
    "q6_k": _encode_q6_k,
}
