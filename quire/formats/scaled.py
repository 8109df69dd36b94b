"""Encoders from float matrices to codes with scales: what a quantising tool does, in plain torch.

Scales are chosen so that the largest magnitude of a group lands on the format's largest value, and
codes round to nearest, ties to even. Only NVFP4 saturates: its scales are rounded to e4m3, to
nearest, so that a group's largest magnitude can lie up to a sixteenth (more, where the scale is
subnormal) above 6 steps, and is cut to 6. Rounding them up instead makes the mean squared error of
random matrices a tenth to a fifth larger. Groups of zeros get a scale that decodes to zeros.
ValueError for values that are not finite, or where groups do not divide the columns.
"""

from __future__ import annotations

import math

import torch

from quire.formats.float4 import E2M1_MAX, encode_e2m1, pack_nibbles
from quire.formats.float8 import E4M3_MAX, decode_ue8m0, encode_e4m3, encode_ue8m0
from quire.formats.layout import FP8_BLOCK, QUANT_FORMATS
from quire.formats.quantized import QuantTensor

# No scale is smaller than this: with it every code still times it is a normal float32.
LEAST_SCALE = 2.0**-100


def quantize_fp8(
    values: torch.Tensor, per: str = "channel", activation: str = "token"
) -> QuantTensor:
    """e4m3 of [N, K] with a scale for each row ("channel", "token") or one ("tensor")."""
    values = _finite(values)
    size = values.abs().amax(1) if values.shape[1] else values.new_zeros(values.shape[0])
    if per == "tensor" and size.numel():
        size = size.max().expand(size.shape)
    elif per not in ("channel", "token", "tensor"):
        raise ValueError(f"per {per!r} is not channel, token or tensor")
    scales = _scale(size, E4M3_MAX).contiguous()
    codes = encode_e4m3(values / scales[:, None])
    return QuantTensor("fp8", _shape(values), codes, scales, activation=activation)


def quantize_fp8_block(
    values: torch.Tensor, ue8m0: bool = False, activation: str = "token"
) -> QuantTensor:
    """e4m3 of [N, K] with a scale for each 128 x 128 block; `ue8m0`: scales are powers of two."""
    values = _finite(values)
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    high, wide = (size // FP8_BLOCK for size in padded.shape)
    blocks = padded.view(high, FP8_BLOCK, wide, FP8_BLOCK)
    scales = _scale(blocks.abs().amax((1, 3)), E4M3_MAX)
    if ue8m0:
        scales = decode_ue8m0(encode_ue8m0(scales))
    codes = encode_e4m3((blocks / scales[:, None, :, None]).flatten(2, 3).flatten(0, 1))
    codes = codes[:rows, :columns].contiguous()
    return QuantTensor("fp8_block", (rows, columns), codes, scales, activation=activation)


def quantize_nvfp4(values: torch.Tensor, global_scale: float | None = None) -> QuantTensor:
    """e2m1 of [N, K] with an e4m3 scale for each 16 columns and one float32 multiplier for all:
    by default the one that gives the group of the largest values the scale 448. A smaller one
    saturates."""
    values = _finite(values)
    groups = _groups(values, QUANT_FORMATS["nvfp4"])
    size = groups.abs().amax(2)
    if global_scale is None:
        global_scale = nvfp4_global_scale(float(size.max()) if size.numel() else 0.0)
    scales = encode_e4m3(size / E2M1_MAX / global_scale)
    step = scales.float() * global_scale
    # A group far below the largest rounds to the scale zero, and with it to zeros.
    scaled = torch.where(step[:, :, None] > 0, groups / step[:, :, None], groups.new_zeros(()))
    codes = encode_e2m1(scaled.flatten(1))
    rows = values.new_full((values.shape[0],), global_scale)
    return QuantTensor("nvfp4", _shape(values), codes, scales, row_scales=rows)


def nvfp4_global_scale(largest: float) -> float:
    """The multiplier of a matrix whose largest magnitude is this."""
    if not math.isfinite(largest):
        raise ValueError("values to quantise must be finite")
    return max(largest / (E2M1_MAX * E4M3_MAX), LEAST_SCALE)


def quantize_mxfp4(values: torch.Tensor) -> QuantTensor:
    """e2m1 of [N, K] with a power of two for each 32 columns, the least that keeps all in range."""
    values = _finite(values)
    groups = _groups(values, QUANT_FORMATS["mxfp4"])
    scales = encode_ue8m0(_scale(groups.abs().amax(2), E2M1_MAX))
    codes = encode_e2m1((groups / decode_ue8m0(scales)[:, :, None]).flatten(1))
    return QuantTensor("mxfp4", _shape(values), codes, scales)


def quantize_integer(
    values: torch.Tensor,
    bits: int,
    group: int,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
) -> QuantTensor:
    """int4 or int8 of [N, K] in groups of `group` columns, with scales in `dtype`, and a zero
    point for each group unless `symmetric`."""
    if bits not in (4, 8):
        raise ValueError(f"integers of {bits} bits: there are 4 and 8")
    groups = _groups(_finite(values), group)
    middle, largest = 1 << (bits - 1), (1 << bits) - 1
    zeros = None
    if symmetric:
        scales = _scale(groups.abs().amax(2), middle - 1).to(dtype)
        offset = torch.full_like(scales, float(middle), dtype=torch.float32)
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = _scale(high - low, largest).to(dtype)
        offset = (-low / scales.float()).round().clamp(0, largest)
        zeros = offset.to(torch.uint8)
    if (scales == 0).any():
        raise ValueError(f"a group's scale is too small for {dtype}")
    codes = (groups / scales.float()[:, :, None] + offset[:, :, None]).round().clamp(0, largest)
    codes = codes.to(torch.uint8).flatten(1)
    return QuantTensor(
        f"int{bits}",
        _shape(values),
        pack_nibbles(codes) if bits == 4 else codes,
        scales,
        zeros=zeros,
    )


def _finite(values: torch.Tensor) -> torch.Tensor:
    values = values.float()
    if not values.isfinite().all():
        raise ValueError("values to quantise must be finite")
    return values


def _shape(values: torch.Tensor) -> tuple[int, int]:
    rows, columns = values.shape
    return rows, columns


def _groups(values: torch.Tensor, group: int) -> torch.Tensor:
    if values.shape[1] % group:
        raise ValueError(f"groups of {group} do not divide {values.shape[1]} columns")
    return values.reshape(values.shape[0], values.shape[1] // group, group)


def _scale(size: torch.Tensor, largest: float) -> torch.Tensor:
    """What brings magnitudes up to `size` into `largest`; 1 for zeros."""
    scale = torch.where(size == 0, torch.ones_like(size), size / largest)
    return scale.clamp(min=LEAST_SCALE)
