"""The ways checkpoints store floating-point codes with scales, each read as a QuantTensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from quire.formats.float8 import UE8M0_NAN, decode_ue8m0
from quire.formats.layout import FP8_BLOCK, QUANT_FORMATS
from quire.formats.quantized import QuantTensor
from quire.quant.errors import bad_values, contradiction, cut_group, group_mismatch
from quire.quant.parts import FLOATS, Parts

# Shape, format and value of a part of a dummy weight; None for random values.
Dummy = tuple[tuple[int, ...], str, float | None]
# What values of dummy weights deviate by, and e2m1 and integer codes chosen at random.
DEVIATION, E2M1_DEVIATION, INT4_DEVIATION, INT8_DEVIATION = 0.02, 2.9, 4.6, 74.0
SCALES = ("weight_scale_inv", "weight_scale", "scale")
E4M3_NAN = 0x7F  # without the sign
INPUT_SCALES = ("input_scale", "activation_scale")


class Storage(ABC):
    """How one weight lies in the files.

    `format`: that of the QuantTensor that `read` gives, or one of ORDERED_FORMATS, where it gives
    values in float32. `group`: columns that share a scale and must divide the width, 0 where any
    width will do.
    """

    format: str
    group: int = 0

    @property
    def layout(self) -> str:
        """The format with what kernels must know of groups (formats.layout.grouped)."""
        return self.format

    def check_width(self, module: str, columns: int) -> None:
        """Raises ModelError where groups do not divide the columns."""
        if self.group and columns % self.group:
            raise group_mismatch(module, f"groups of {self.group} do not divide {columns} columns")

    @abstractmethod
    def open(self, parts: Parts) -> tuple[int, int]:
        """The weight's shape [N, K], from headers. Raises ModelError for parts that are missing,
        or of wrong formats and shapes."""

    @abstractmethod
    def read(self, parts: Parts, rows: slice) -> QuantTensor | torch.Tensor:
        """Some rows. Raises ModelError for values that cannot be right, ValueError for rows that
        cut a block."""

    @abstractmethod
    def dummies(self, rows: int, columns: int) -> dict[str, Dummy]:
        """The parts that a dummy weight [N, K] has."""


@dataclass(frozen=True)
class Fp8(Storage):
    """`weight` e4m3 [N, K] with a multiplier for all, for each row or, if `block`, for each block
    of 128 x 128. `activation` as in QuantTensor."""

    block: bool = False
    activation: str = "token"

    @property
    def format(self) -> str:  # type: ignore[override]
        return "fp8_block" if self.block else "fp8"

    def open(self, parts: Parts) -> tuple[int, int]:
        weight = parts.need("weight", formats=("f8_e4m3",), dimensions=2)
        rows, columns = parts.info(weight).shape
        scale = parts.need(*SCALES, formats=(*FLOATS, "f8_e8m0"))
        if self.block:
            high, wide = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
            parts.expect(scale, (high, wide), (high, 1, wide, 1))
        else:
            parts.expect(scale, (), (1,), (1, 1), (rows,), (rows, 1))
        if self.activation == "tensor":
            name = parts.need(*INPUT_SCALES, formats=FLOATS)
            parts.expect(name, (), (1,))
        return rows, columns

    def read(self, parts: Parts, rows: slice) -> QuantTensor:
        height, columns = parts.info("weight").shape
        name = parts.first(*SCALES)
        assert name is not None
        scales = _float(parts.read(name))
        if self.block:
            scales = scales.reshape(-1, max(1, -(-columns // FP8_BLOCK)))
            if rows.start % FP8_BLOCK or (rows.stop % FP8_BLOCK and rows.stop != height):
                raise cut_group(
                    f"{parts.module}.weight",
                    f"rows {rows.start} to {rows.stop} cut a block of {FP8_BLOCK}",
                )
            scales = scales[rows.start // FP8_BLOCK : -(-rows.stop // FP8_BLOCK)]
        else:
            scales = scales.reshape(-1).expand(height)[rows].contiguous()
        codes = parts.read("weight", rows)
        if parts.doubtful and not _all_below(codes.view(torch.uint8) & 0x7F, E4M3_NAN):
            raise bad_values(parts.module, "some of its codes are NaN")
        input_scale = None
        if self.activation == "tensor":
            input_scale = parts.read_scalar(parts.first(*INPUT_SCALES) or "")
            if parts.doubtful and not 0 < float(input_scale) < torch.inf:
                raise bad_values(parts.module, f"its input scale is {float(input_scale)}")
        shape = (codes.shape[0], columns)
        tensor = QuantTensor(
            self.format, shape, codes, scales, activation=self.activation, input_scale=input_scale
        )
        if parts.doubtful:
            _check_scales(parts.module, scales)
            _check_lost(parts.module, tensor)
            check_symmetric(parts)
        return tensor

    def dummies(self, rows: int, columns: int) -> dict[str, Dummy]:
        blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        found: dict[str, Dummy] = {
            "weight": ((rows, columns), "f8_e4m3", None),
            "weight_scale": (blocks if self.block else (rows, 1), "f32", 1.0),
        }
        return found | ({"input_scale": ((), "f32", 1.0)} if self.activation == "tensor" else {})


@dataclass(frozen=True)
class Nvfp4(Storage):
    """e2m1 pairs with an e4m3 scale for each 16 columns and a float32 for all: ModelOpt's
    `weight_scale_2` is a multiplier, the `weight_global_scale` of compressed-tensors a divisor.
    Scales for four-bit activations are left aside: weights alone are quantised here."""

    format = "nvfp4"
    group = QUANT_FORMATS["nvfp4"]

    def open(self, parts: Parts) -> tuple[int, int]:
        weight = parts.need("weight_packed", "weight", formats=("u8",), dimensions=2)
        rows, columns = parts.info(weight).shape[0], 2 * parts.info(weight).shape[1]
        self.check_width(parts.module, columns)
        parts.need("weight_scale", formats=("f8_e4m3",))
        parts.expect("weight_scale", (rows, columns // self.group))
        factor = parts.need("weight_scale_2", "weight_global_scale", formats=("f32",))
        parts.expect(factor, (), (1,))
        return rows, columns

    def read(self, parts: Parts, rows: slice) -> QuantTensor:
        weight = parts.first("weight_packed", "weight")
        factor = parts.first("weight_scale_2", "weight_global_scale")
        assert weight is not None and factor is not None
        value = parts.read_scalar(factor)
        # A global scale of zero loses every value; as a divisor it gives infinities.
        if parts.doubtful and not 0 < float(value) < torch.inf:
            raise bad_values(parts.module, f"its {factor} is {float(value)}")
        if factor == "weight_global_scale":
            value = 1 / value
            if parts.doubtful and not value.isfinite():
                raise bad_values(parts.module, f"one over its {factor} is infinite")
        codes, scales = parts.read(weight, rows), parts.read("weight_scale", rows)
        if parts.doubtful:
            _check_scales(parts.module, scales)
        return QuantTensor(
            "nvfp4",
            (codes.shape[0], 2 * codes.shape[1]),
            codes,
            scales,
            row_scales=value.expand(codes.shape[0]).contiguous(),
        )

    def dummies(self, rows: int, columns: int) -> dict[str, Dummy]:
        return {
            "weight": ((rows, columns // 2), "u8", None),
            "weight_scale": ((rows, columns // self.group), "f8_e4m3", 1.0),
            "weight_scale_2": ((), "f32", DEVIATION / E2M1_DEVIATION),
        }


@dataclass(frozen=True)
class Mxfp4(Storage):
    """e2m1 pairs with a power of two for each 32 columns."""

    format = "mxfp4"
    group = QUANT_FORMATS["mxfp4"]

    def open(self, parts: Parts) -> tuple[int, int]:
        weight = parts.need("weight_packed", "weight", formats=("u8", "i8"), dimensions=2)
        rows, columns = parts.info(weight).shape[0], 2 * parts.info(weight).shape[1]
        self.check_width(parts.module, columns)
        scale = parts.need("weight_scale", "scale", formats=("u8", "f8_e8m0"))
        parts.expect(scale, (rows, columns // self.group))
        return rows, columns

    def read(self, parts: Parts, rows: slice) -> QuantTensor:
        weight, scale = parts.first("weight_packed", "weight"), parts.first("weight_scale", "scale")
        assert weight is not None and scale is not None
        codes = parts.read(weight, rows).view(torch.uint8)
        scales = parts.read(scale, rows).view(torch.uint8)
        if parts.doubtful and not _all_below(scales, UE8M0_NAN):
            raise bad_values(parts.module, "some of its scales are NaN")
        return QuantTensor("mxfp4", (codes.shape[0], 2 * codes.shape[1]), codes, scales)

    def dummies(self, rows: int, columns: int) -> dict[str, Dummy]:
        return {
            "weight_packed": ((rows, columns // 2), "u8", None),
            "weight_scale": ((rows, columns // self.group), "f8_e8m0", 2.0**-7),
        }


def _float(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float32, exactly."""
    if scales.dtype == torch.float8_e8m0fnu:
        return decode_ue8m0(scales)
    return scales.float()


def check_symmetric(parts: Parts) -> None:
    """Raises ModelError for zero points, which some tools write although there are none, that are
    not zero."""
    if "weight_zero_point" in parts.present and parts.read("weight_zero_point").float().any():
        raise contradiction(parts.module, "it has zero points, and the config says symmetric")


def _all_below(codes: torch.Tensor, limit: int) -> bool:
    """Whether the bytes of all codes are below a number."""
    return not codes.numel() or int(codes.view(torch.uint8).amax()) < limit


def _check_scales(module: str, scales: torch.Tensor) -> None:
    """A zero is a scale like any other where it is rounded: NVFP4's groups far below the rest of
    their tensor have it, and are zeros."""
    if scales.dtype == torch.float8_e4m3fn and _all_below(scales, E4M3_NAN):
        return  # positive and finite: one look at the bytes
    values = scales.float()
    if not values.isfinite().all():
        raise bad_values(module, "some of its scales are NaN or infinite")
    if (values < 0).any():
        raise bad_values(module, "some of its scales are negative")


def _check_lost(module: str, tensor: QuantTensor) -> None:
    """A float32 scale of zero cannot have come from rounding: under it the codes' values are lost,
    unless they are zeros themselves."""
    if not (tensor.scales == 0).any():
        return
    step = QuantTensor(tensor.format, tensor.shape, tensor.codes, (tensor.scales == 0).float())
    if step.dequantize().any():
        raise bad_values(module, "a scale of zero stands over codes that are not zero")
