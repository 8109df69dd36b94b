"""Matrices of small codes with scales, in the layouts that kernels read.

| format | codes | scales | value |
|---|---|---|---|
| fp8 | float8_e4m3fn [N, K] | float32 [N] | code * scale |
| fp8_block | float8_e4m3fn [N, K] | float32 [ceil(N / 128), ceil(K / 128)] | code * scale |
| nvfp4 | e2m1 pairs, uint8 [N, K / 2] | float8_e4m3fn [N, K / 16], row_scales float32 [N] | \
code * scale * row_scale |
| mxfp4 | e2m1 pairs, uint8 [N, K / 2] | ue8m0, uint8 [N, K / 32] | code * 2 ** (scale - 127) |
| int4 | uint8 [N, K / 2] | float [N, K / g], zeros uint8 [N, K / g] or None (8) | \
(code - zero) * scale |
| int8 | uint8 [N, K] | float [N, K / g], zeros uint8 [N, K / g] or None (128) | \
(code - zero) * scale |

Pairs have the even column in the low half of a byte. The group size g follows from the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from quire.formats.float4 import decode_e2m1, unpack_nibbles
from quire.formats.float8 import decode_ue8m0
from quire.formats.layout import FP8_BLOCK, QUANT_FORMATS, grouped

ACTIVATIONS = ("none", "token", "tensor")
_INTEGER_SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class QuantTensor:
    """A matrix of `shape` [rows, columns]; the module's table says what the tensors hold.

    `activation`: how the checkpoint wants the activations that it is multiplied with: "none" as
    they are, "token" in e4m3 with a scale for each token, "tensor" in e4m3 with the fixed scale
    `input_scale` (float32 of no dimension). Tensors may be views of a mapped file: treat them as
    read-only. ValueError from the constructor if the parts contradict each other.
    """

    format: str
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor
    row_scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    activation: str = "none"
    input_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Codes, scales and what else there is."""
        parts = (self.codes, self.scales, self.row_scales, self.zeros, self.input_scale)
        return [part for part in parts if part is not None]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def group(self) -> tuple[int, int]:
        """Rows and columns that share a scale of `scales`; borders may cut the last ones."""
        if self.format == "fp8_block":
            return FP8_BLOCK, FP8_BLOCK
        if self.format == "fp8":
            return 1, max(1, self.shape[1])
        return 1, self.shape[1] // max(1, self.scales.shape[1])

    @property
    def layout(self) -> str:
        """The format's name with the group size of integers (formats.layout.grouped)."""
        group = self.group[1]
        return grouped(self.format, 0 if group == self.shape[1] else group)

    def to(self, device: torch.device | str) -> QuantTensor:
        """The same where it lies there."""

        def move(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.to(device)

        names = ("codes", "scales", "row_scales", "zeros", "input_scale")
        parts: dict[str, Any] = {name: move(getattr(self, name)) for name in names}
        if all(part is getattr(self, name) for name, part in parts.items()):
            return self
        return replace(self, **parts)

    def dequantize(self) -> torch.Tensor:
        """The values, float32 [rows, columns]; activations do not come into it."""
        rows, columns = self.shape
        if self.format == "fp8":
            return self.codes.float() * self.scales[:, None]
        if self.format == "fp8_block":
            scales = self.scales.repeat_interleave(FP8_BLOCK, 0)[:rows]
            return self.codes.float() * scales.repeat_interleave(FP8_BLOCK, 1)[:, :columns]
        if self.format in ("nvfp4", "mxfp4"):
            values = decode_e2m1(self.codes)
            scales = decode_ue8m0(self.scales) if self.format == "mxfp4" else self.scales.float()
            if self.row_scales is not None:
                scales = scales * self.row_scales[:, None]
        else:
            codes = unpack_nibbles(self.codes) if self.format == "int4" else self.codes
            values, scales = codes.float(), self.scales.float()
        if not values.numel():
            return values
        values = values.view(rows, scales.shape[1], -1)
        if self.format in ("int4", "int8"):
            middle = 8 if self.format == "int4" else 128
            values -= middle if self.zeros is None else self.zeros.float()[:, :, None]
        return (values * scales[:, :, None]).view(rows, columns)

    def rows(self, index: slice | torch.Tensor) -> QuantTensor:
        """The rows of a slice (a view), or of an int64 [n] index (a copy, in its order).

        ValueError where a slice cuts a block of fp8_block, whose rows cannot be indexed.
        """
        codes = self.codes[index]
        if self.format != "fp8_block":
            return replace(
                self,
                shape=(codes.shape[0], self.shape[1]),
                codes=codes,
                scales=self.scales[index],
                row_scales=None if self.row_scales is None else self.row_scales[index],
                zeros=None if self.zeros is None else self.zeros[index],
            )
        if not isinstance(index, slice):
            raise ValueError("rows of fp8_block share scales: they can be sliced, not indexed")
        first, last = _blocks(index, self.shape[0], FP8_BLOCK, "rows", self.format)
        shape = (codes.shape[0], self.shape[1])
        return replace(self, shape=shape, codes=codes, scales=self.scales[first:last])

    def columns(self, index: slice) -> QuantTensor:
        """A view of whole groups of columns, or of columns within one group of int4 or int8.

        ValueError if `index` has a step or cuts a group.
        """
        start, stop, step = index.indices(self.shape[1])
        stop = max(start, stop)
        if step != 1:
            raise ValueError("columns of a quantised tensor cannot be taken with a step")
        pairs = 2 if self.format in ("nvfp4", "mxfp4", "int4") else 1
        if start % pairs or stop % pairs:
            raise ValueError(f"{index} cuts a pair of columns of {self.format}")
        codes = self.codes[:, start // pairs : stop // pairs]
        shape = (self.shape[0], stop - start)
        if self.format == "fp8":
            return replace(self, shape=shape, codes=codes)
        group = self.group[1]
        if self.format in ("int4", "int8") and start < stop <= (start // group + 1) * group:
            first, last = start // group, start // group + 1
        else:
            first, last = _blocks(slice(start, stop), self.shape[1], group, "columns", self.format)
        return replace(
            self,
            shape=shape,
            codes=codes,
            scales=self.scales[:, first:last],
            zeros=None if self.zeros is None else self.zeros[:, first:last],
        )


def concatenate_rows(parts: Sequence[QuantTensor]) -> QuantTensor:
    """Stacks matrices of one format, width, group size and activation.

    ValueError if they differ, or if one of fp8_block ends within a block and another follows.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        _check_alike(first, part)
    if first.format == "fp8_block":
        for part in parts[:-1]:
            if part.shape[0] % FP8_BLOCK:
                raise ValueError(
                    f"{part.shape[0]} rows of fp8_block end within a block of {FP8_BLOCK}: "
                    "nothing can follow them"
                )

    def stack(name: str) -> torch.Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    # Concatenation of eight-bit floats goes by their bytes, which every device has.
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(first.codes.dtype)
    byte_scales = first.scales.dtype.itemsize == 1
    kind = torch.uint8 if byte_scales else first.scales.dtype
    scales = torch.cat([part.scales.view(kind) for part in parts]).view(first.scales.dtype)
    rows = sum(part.shape[0] for part in parts)
    return replace(
        first,
        shape=(rows, first.shape[1]),
        codes=codes,
        scales=scales,
        row_scales=stack("row_scales"),
        zeros=stack("zeros"),
    )


def _check_alike(first: QuantTensor, part: QuantTensor) -> None:
    for what, a, b in (
        ("format", first.format, part.format),
        ("width", first.shape[1], part.shape[1]),
        ("group size", first.group[1], part.group[1]),
        ("dtype of scales", first.scales.dtype, part.scales.dtype),
        ("zero points", first.zeros is None, part.zeros is None),
        ("activation", first.activation, part.activation),
        ("input scale", _number(first.input_scale), _number(part.input_scale)),
    ):
        if a != b:
            raise ValueError(f"matrices of another {what} cannot be stacked: {a} and {b}")


def _number(scale: torch.Tensor | None) -> float | None:
    return None if scale is None else float(scale)


def _blocks(index: slice, size: int, block: int, what: str, format: str) -> tuple[int, int]:
    """First and last block of a slice that cuts none. A border at `size` is always one."""
    start, stop, step = index.indices(size)
    stop = max(start, stop)
    cut = [place for place in (start, stop) if place % block and place != size]
    if step != 1 or cut:
        raise ValueError(
            f"{what} {start} to {stop} of {format} cut a group: borders are multiples of {block}"
        )
    return start // block, -(-stop // block)


def _check(tensor: QuantTensor) -> None:
    """ValueError unless format, shape, dtypes and shapes of the tensors agree."""
    if tensor.format not in QUANT_FORMATS:
        raise ValueError(f"unknown quantised format {tensor.format!r}")
    rows, columns = tensor.shape
    pairs = tensor.format in ("nvfp4", "mxfp4", "int4")
    if pairs and columns % 2:
        raise ValueError(f"{tensor.format} of {columns} columns: pairs need an even number")
    eight_bit = tensor.format in ("fp8", "fp8_block")
    code_type = torch.float8_e4m3fn if eight_bit else torch.uint8
    _expect("codes", tensor.codes, (code_type,), (rows, columns // 2 if pairs else columns))
    if tensor.format == "fp8":
        _expect("scales", tensor.scales, (torch.float32,), (rows,))
    elif tensor.format == "fp8_block":
        shape = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        _expect("scales", tensor.scales, (torch.float32,), shape)
    elif tensor.format in ("nvfp4", "mxfp4"):
        group = QUANT_FORMATS[tensor.format]
        if columns % group:
            raise ValueError(f"groups of {group} do not divide {columns} columns")
        kind = torch.float8_e4m3fn if tensor.format == "nvfp4" else torch.uint8
        _expect("scales", tensor.scales, (kind,), (rows, columns // group))
    else:
        groups = tensor.scales.shape[1] if tensor.scales.dim() == 2 else 0
        if columns and (not groups or columns % groups):
            raise ValueError(f"{groups} groups do not divide {columns} columns")
        _expect("scales", tensor.scales, _INTEGER_SCALES, (rows, groups))
        if tensor.zeros is not None:
            _expect("zeros", tensor.zeros, (torch.uint8,), (rows, groups))
    if (tensor.row_scales is not None) != (tensor.format == "nvfp4"):
        raise ValueError("nvfp4, and no other format, has row_scales")
    if tensor.row_scales is not None:
        _expect("row_scales", tensor.row_scales, (torch.float32,), (rows,))
    if tensor.zeros is not None and tensor.format not in ("int4", "int8"):
        raise ValueError(f"{tensor.format} has no zeros")
    _check_activation(tensor)


def _check_activation(tensor: QuantTensor) -> None:
    if tensor.activation not in ACTIVATIONS:
        raise ValueError(f"activation {tensor.activation!r} is not one of {ACTIVATIONS}")
    if (tensor.input_scale is not None) != (tensor.activation == "tensor"):
        raise ValueError('activation "tensor", and no other, has an input_scale')
    if tensor.input_scale is not None:
        _expect("input_scale", tensor.input_scale, (torch.float32,), ())


def _expect(
    name: str, part: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    if part.dtype not in dtypes or tuple(part.shape) != shape:
        raise ValueError(
            f"{name} must be {' or '.join(map(str, dtypes))} {shape}, "
            f"not {part.dtype} {tuple(part.shape)}"
        )
