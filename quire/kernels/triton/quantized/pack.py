"""Quantised weights as the kernels read them: reordered once while loading, no value changed.

K is padded with zeros to whole blocks of 128 columns. A block of 4-bit codes is 16 words of 32
bits; word j has the codes of columns 32 d + 2 j + h, d = 0..3 in each half h of the word, so that
hardly more than a shift and a mask give both halves their code d where a bfloat16 has its bits
(decode.py), and a word's halves are the two neighbours that a matrix instruction takes together.

Scales lie by block first and row second, so that a tile's scales are neighbours. Those of a block
in nvfp4 are eight bytes (int64), of mxfp4 four (int32). An nvfp4 scale has one bit of exponent
more than e4m3 and none for the sign: then it is a bfloat16's bits, shifted, with no subnormals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from quire.formats.layout import group_of, ungrouped
from quire.kernels.reference.quantized.weights import (
    BLOCK,
    FOUR_BITS,
    QuantizedWeight,
)

COLUMNS = 128
# Weights come out of the registers smaller than they are by these factors, which keep scales
# within bfloat16: 448 * 2^(126 - 7) and 2^(65 + 126 - 64) are about its largest numbers.
NVFP4_FACTOR = 2.0**7
MXFP4_FACTOR = 2.0**64
# The largest scale of mxfp4 is 2^(192 - 127); larger ones would overflow.
MXFP4_MOST = 192
# Of nvfp4, in place of a scale that has no meaning: more than any that has.
NO_SCALE = 255


@dataclass(frozen=True)
class PackedQuantized:
    """A weight [N, K] or [E, N, K] for the kernels of this package.

    codes       4 bits: int32 [.., N, blocks * 16]; 8 bits: uint8 [.., N, blocks * 128]
    scales      nvfp4: int64 [.., blocks, N]; mxfp4: int32 [.., blocks, N]; fp8_block: float32
                [.., K / 128, N / 128]; int4, int8: as stored [.., K / group, N]; fp8: None
    row_scales  float32 [.., N], multiplied in at the end, or None
    zeros       uint8 like the scales of int4 and int8, or None for 8 and 128

    `activation`, of fp8 and fp8_block: whether tokens of large batches may become e4m3 too, "token"
    with a scale for each, "tensor" with `input_scale` (float32, of no dimension), "none".
    """

    format: str
    codes: torch.Tensor
    scales: torch.Tensor | None
    row_scales: torch.Tensor | None
    zeros: torch.Tensor | None
    n: int
    k: int
    group: int
    activation: str = "none"
    input_scale: torch.Tensor | None = None

    @property
    def experts(self) -> int | None:
        return int(self.codes.shape[0]) if self.codes.dim() == 3 else None

    @property
    def blocks(self) -> int:
        return -(-self.k // COLUMNS)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts.values() if part is not None)

    def stack(self, count: int) -> PackedQuantized:
        """Room for `count` weights like this one, or like each of these, as experts have them. How
        activations are wanted does not come with it: who stacks them says so for all."""
        single = 0 if self.experts is None else 1
        room: dict[str, Any] = {
            name: None if part is None else part.new_empty((count, *part.shape[single:]))
            for name, part in self._parts.items()
        }
        return replace(self, **room, activation="none", input_scale=None)

    def one(self, place: int) -> PackedQuantized:
        """A weight of a stack, in the stack's memory."""
        parts: dict[str, Any] = {
            name: None if part is None else part[place] for name, part in self._parts.items()
        }
        return replace(self, **parts)

    def put(self, place: int, some: PackedQuantized) -> None:
        """Write a weight into a stack, or several from that place on. ValueError where they are
        not like the others."""
        for name, part in some._parts.items():
            into = self._parts[name]
            if (part is None) != (into is None):
                raise ValueError(f"{name}: some experts have them, others do not")
            if part is not None and into is not None:
                part = part[None] if some.experts is None else part
                if part.dtype != into.dtype or part.shape[1:] != into.shape[1:]:
                    raise ValueError(f"{name}: other shapes or dtypes than other experts'")
                into[place : place + len(part)] = part

    @property
    def _parts(self) -> dict[str, torch.Tensor | None]:
        names = ("codes", "scales", "row_scales", "zeros")
        return {name: getattr(self, name) for name in names}


def quantized_nbytes(name: str, n: int, k: int) -> int:
    """Bytes of a packed weight [n, k] by its format's name (layout.grouped): integers with half
    scales and zero points. Raises ValueError where groups do not divide k."""
    format, group, blocks = ungrouped(name), group_of(name, k), -(-k // COLUMNS)
    codes = n * blocks * (COLUMNS // 2 if format in FOUR_BITS else COLUMNS)
    if format == "fp8":
        return codes + 4 * n
    if format == "fp8_block":
        return codes + 4 * blocks * -(-n // BLOCK)
    if k % group:
        raise ValueError(f"groups of {group} do not divide {k} columns of {format}")
    if format in ("nvfp4", "mxfp4"):
        return codes + n * (blocks * (8 if format == "nvfp4" else 4) + 4)
    groups = 1 if group == k else blocks * COLUMNS // group if group < COLUMNS else k // group
    return codes + 3 * n * groups


def _pack_codes(codes: torch.Tensor, zero: torch.Tensor | None, format: str) -> torch.Tensor:
    """Padded and reordered codes; where `zero` [.., N, K / 16] says so, a group's become 0."""
    if format in FOUR_BITS:
        # Here, since plans count bytes with this file where there is no Triton.
        from quire.kernels.triton.quantized.words import pack_words

        rows = codes.flatten(0, -2)
        words = pack_words(
            rows, None if zero is None else zero.flatten(0, -2), floats=format != "int4"
        )
        return words.view(*codes.shape[:-1], -1)
    missing = -codes.shape[-1] % COLUMNS
    return torch.nn.functional.pad(codes, (0, missing)) if missing else codes.contiguous()


def _nvfp4_scale(scales: torch.Tensor) -> torch.Tensor:
    """e4m3 scales as uint8: 8 * (exponent + 10) + mantissa, all normal; 0 for zero."""
    bytes_ = _nvfp4_scales(scales.device)[scales.view(torch.uint8).int()]
    if bytes_.numel() and int(bytes_.amax()) == NO_SCALE:
        raise ValueError("scales of nvfp4: negative ones and NaN have no meaning")
    return bytes_


@cache
def _nvfp4_scales(device: torch.device) -> torch.Tensor:
    """uint8 [256], by the byte of an e4m3 scale."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    mantissa, exponent = torch.frexp(values)
    byte = (exponent - 1 + 10) * 8 + (mantissa * 16 - 8).int()
    byte = torch.where(values > 0, byte, 0).where(values >= 0, NO_SCALE)  # NaN is not either
    return byte.to(torch.uint8).to(device)


def _by_block(bytes_: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [.., N, groups] as words of a block's `count` bytes, [.., blocks, N]."""
    padded = torch.nn.functional.pad(bytes_, (0, -bytes_.shape[-1] % count))
    return padded.contiguous().view(dtype).mT.contiguous()


def _pack(weight: QuantizedWeight) -> PackedQuantized:
    format, codes, scales, n, k = weight.format, weight.codes, weight.scales, weight.n, weight.k
    zero = row_scales = zeros = None
    group = weight.group
    packed: torch.Tensor | None
    if format == "nvfp4":
        assert weight.row_scales is not None
        bytes_ = _nvfp4_scale(scales)
        zero, packed = bytes_ == 0, _by_block(bytes_, 8, torch.int64)
        row_scales = weight.row_scales * NVFP4_FACTOR
    elif format == "mxfp4":
        if bool((scales == 255).any()):
            raise ValueError("scales of mxfp4: 255 is NaN")
        packed = _by_block(scales.clamp(max=MXFP4_MOST), 4, torch.int32)
        row_scales = torch.full(codes.shape[:-1], MXFP4_FACTOR, device=codes.device)
    elif format == "fp8":
        packed, row_scales = None, scales.clone()
    elif format == "fp8_block":
        packed = scales.mT.contiguous()
    else:
        missing, padded = 0, -(-k // COLUMNS) * COLUMNS
        if scales.shape[-1] == 1:
            group = padded
        elif group < COLUMNS:
            missing = padded // group - scales.shape[-1]
        packed = torch.nn.functional.pad(scales, (0, missing)).mT.contiguous()
        if weight.zeros is not None:
            zeros = torch.nn.functional.pad(weight.zeros, (0, missing)).mT.contiguous()
    if codes.dtype == torch.float8_e4m3fn:
        codes = codes.view(torch.uint8)
    return PackedQuantized(
        format, _pack_codes(codes, zero, format), packed, row_scales, zeros, n, k, group
    )


def pack(weight: QuantizedWeight) -> PackedQuantized:
    """`weight` for the kernels. Raises ValueError for shapes and dtypes that do not go together,
    for groups of a number of columns that the kernels do not have, and for scales that are NaN.

    An mxfp4 scale above 2^65 becomes 2^65, one below 2^-62 and what it scales zero: neither is in
    any model. Codes of fp8 that are NaN stay NaN on a GPU with float8, elsewhere they are 480.
    """
    weight.check()
    group, k = weight.group, weight.k
    if weight.format in ("int4", "int8") and not (
        group in (32, 64) or group % COLUMNS == 0 or group == k
    ):
        raise ValueError(f"group: {group} columns; 32, 64 and multiples of 128 can be served")
    return _pack(weight)
