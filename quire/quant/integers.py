"""The ways checkpoints store integers of 4 and 8 bits, each read as a QuantTensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.formats.float4 import pack_nibbles
from quire.formats.integer import unpack_awq, unpack_words
from quire.formats.layout import grouped
from quire.formats.quantized import QuantTensor
from quire.quant.errors import bad_values, contradiction, part_mismatch
from quire.quant.parts import FLOATS, Parts
from quire.quant.storage import (
    DEVIATION,
    INT4_DEVIATION,
    INT8_DEVIATION,
    Dummy,
    Storage,
    check_symmetric,
)


@dataclass(frozen=True)
class _Integers(Storage):
    """`group`: columns that share a scale, 0 for the whole row. `ordered`: columns belong to groups
    in an order that the file gives (GPTQ's desc_act); the layout of kernels has no place for it, so
    the values are read."""

    bits: int = 4
    group: int = 128
    ordered: bool = False

    @property
    def format(self) -> str:  # type: ignore[override]
        return f"int{self.bits}_ordered" if self.ordered else f"int{self.bits}"

    def check_width(self, module: str, columns: int) -> None:
        super().check_width(module, columns)
        if self.bits == 4 and columns % 2:
            raise part_mismatch(module, f"{columns} columns of 4 bits are no pairs")

    @property
    def layout(self) -> str:
        return grouped(self.format, self.group)

    def groups_of(self, parts: Parts, columns: int) -> int:
        self.check_width(parts.module, columns)
        return self.groups(columns)

    def groups(self, columns: int) -> int:
        return columns // self.group if self.group else 1

    @property
    def dummy_scale(self) -> float:
        return DEVIATION / (INT4_DEVIATION if self.bits == 4 else INT8_DEVIATION)

    def middle_word(self, less: int = 0) -> int:
        """A word of zero points in the middle of the range, or a little below."""
        middle = (1 << (self.bits - 1)) - less
        word = sum(middle << shift for shift in range(0, 32, self.bits))
        return word - (word >> 31 << 32)

    def make(
        self,
        parts: Parts,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        order: torch.Tensor | None = None,
    ) -> QuantTensor | torch.Tensor:
        """codes uint8 [N, K], scales [N, G], zeros uint8 [N, G], `order` the group of each column.
        Zero scales and negative ones are kept: tools round the former, and use the latter."""
        if not scales.isfinite().all():
            raise bad_values(parts.module, "some of its scales are NaN or infinite")
        middle = 1 << (self.bits - 1)
        if zeros is not None and bool((zeros == middle).all()):
            zeros = None
        rows, columns = codes.shape
        if self.ordered:
            return self._values(parts, codes, scales, zeros, order)
        if order is not None:
            plain = torch.arange(columns) // (self.group or columns)
            if not torch.equal(order.long(), plain):
                raise contradiction(
                    parts.module, "its columns are ordered, and the config does not say so"
                )
        packed = pack_nibbles(codes) if self.bits == 4 else codes.contiguous()
        return QuantTensor(
            f"int{self.bits}", (rows, columns), packed, scales.contiguous(), zeros=zeros
        )

    def _values(
        self,
        parts: Parts,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        order: torch.Tensor | None,
    ) -> torch.Tensor:
        if order is None:
            raise part_mismatch(parts.module, "there is no order of its columns (g_idx)")
        index = order.long()
        if not bool(((index >= 0) & (index < scales.shape[1])).all()):
            raise bad_values(parts.module, "its g_idx names groups that are not there")
        middle = 1 << (self.bits - 1)
        offset = middle if zeros is None else zeros.float()[:, index]
        return (codes.float() - offset) * scales.float()[:, index]


@dataclass(frozen=True)
class Gptq(_Integers):
    """`qweight` int32 [K * bits / 32, N], `scales` [G, N], `qzeros` int32 [G, N * bits / 32],
    `g_idx` int32 [K]. Zero points are stored less one, but for checkpoint_format gptq_v2."""

    less_one: bool = True

    def open(self, parts: Parts) -> tuple[int, int]:
        parts.need("qweight", formats=("i32",), dimensions=2)
        words, rows = parts.info("qweight").shape
        columns, groups = words * 32 // self.bits, self.groups_of(parts, words * 32 // self.bits)
        parts.need("scales", formats=FLOATS)
        parts.expect("scales", (groups, rows))
        parts.need("qzeros", formats=("i32",))
        parts.expect("qzeros", (groups, rows * self.bits // 32))
        if self.ordered or "g_idx" in parts.present:
            parts.need("g_idx", formats=("i32", "i64"))
            parts.expect("g_idx", (columns,))
        return rows, columns

    def read(self, parts: Parts, rows: slice) -> QuantTensor | torch.Tensor:
        codes_KN = unpack_words(parts.read("qweight", columns=rows), self.bits, dim=0)
        scales = parts.read("scales", columns=rows)
        zeros = unpack_words(parts.read("qzeros"), self.bits)[:, rows]
        if self.less_one:
            zeros = (zeros + 1) & ((1 << self.bits) - 1)
        order = parts.read("g_idx") if "g_idx" in parts.present else None
        return self.make(parts, codes_KN.T, scales.T, zeros.T.contiguous(), order)

    def dummies(self, rows: int, columns: int) -> dict[str, Dummy]:
        found: dict[str, Dummy] = {
            "qweight": ((columns * self.bits // 32, rows), "i32", None),
            "scales": ((self.groups(columns), rows), "f16", self.dummy_scale),
            "qzeros": (
                (self.groups(columns), rows * self.bits // 32),
                "i32",
                self.middle_word(self.less_one),
            ),
        }
        return found | ({"g_idx": ((columns,), "i32", 0.0)} if self.ordered else {})


@dataclass(frozen=True)
class Awq(_Integers):
    """`qweight` int32 [K, N / 8], `scales` [G, N], `qzeros` int32 [G, N / 8], words interleaved."""

    def open(self, parts: Parts) -> tuple[int, int]:
        parts.need("qweight", formats=("i32",), dimensions=2)
        columns, words = parts.info("qweight").shape
        groups = self.groups_of(parts, columns)
        parts.need("scales", formats=FLOATS)
        parts.expect("scales", (groups, 8 * words))
        parts.need("qzeros", formats=("i32",))
        parts.expect("qzeros", (groups, words))
        return 8 * words, columns

    def read(self, parts: Parts, rows: slice) -> QuantTensor | torch.Tensor:
        # Whole words, of which some rows may be others'.
        words = slice(rows.start // 8, -(-rows.stop // 8))
        within = slice(rows.start - 8 * words.start, rows.stop - 8 * words.start)
        codes_KN = unpack_awq(parts.read("qweight", columns=words))[:, within]
        zeros = unpack_awq(parts.read("qzeros", columns=words))[:, within]
        scales = parts.read("scales", columns=rows)
        return self.make(parts, codes_KN.T, scales.T, zeros.T.contiguous())

    def dummies(self, rows: int, columns: int) -> dict[str, Dummy]:
        return {
            "qweight": ((columns, rows // 8), "i32", None),
            "scales": ((self.groups(columns), rows), "f16", self.dummy_scale),
            "qzeros": ((self.groups(columns), rows // 8), "i32", self.middle_word()),
        }


@dataclass(frozen=True)
class PackedIntegers(_Integers):
    """pack-quantized of compressed-tensors: `weight_packed` int32 [N, K * bits / 32],
    `weight_scale` [N, G], `weight_zero_point` int32 [N * bits / 32, G] unless `symmetric`,
    `weight_shape` [2], `weight_g_idx` [K]. Codes and zero points are offset to be positive."""

    symmetric: bool = True

    def open(self, parts: Parts) -> tuple[int, int]:
        parts.need("weight_packed", formats=("i32",), dimensions=2)
        rows, words = parts.info("weight_packed").shape
        columns = words * 32 // self.bits
        if "weight_shape" in parts.present:
            parts.need("weight_shape", formats=("i64", "i32"))
            parts.expect("weight_shape", (2,))
            declared = tuple(int(size) for size in parts.read("weight_shape"))
            if declared[0] != rows or -(-declared[1] * self.bits // 32) != words:
                raise part_mismatch(
                    parts.module,
                    f"weight_shape is {list(declared)}, weight_packed has {rows} rows of "
                    f"{columns} columns",
                )
            columns = declared[1]
        groups = self.groups_of(parts, columns)
        parts.need("weight_scale", formats=FLOATS)
        parts.expect("weight_scale", (rows, groups))
        if not self.symmetric:
            parts.need("weight_zero_point", formats=("i32",))
            parts.expect("weight_zero_point", (-(-rows * self.bits // 32), groups))
        if self.ordered or "weight_g_idx" in parts.present:
            parts.need("weight_g_idx", formats=("i32", "i64"))
            parts.expect("weight_g_idx", (columns,))
        return rows, columns

    def read(self, parts: Parts, rows: slice) -> QuantTensor | torch.Tensor:
        _, columns = self.open(parts)
        codes = unpack_words(parts.read("weight_packed", rows), self.bits)[:, :columns]
        zeros = None
        if self.symmetric:
            check_symmetric(parts)
        else:
            zeros = unpack_words(parts.read("weight_zero_point"), self.bits, dim=0)[rows]
            zeros = zeros.contiguous()
        order = parts.read("weight_g_idx") if "weight_g_idx" in parts.present else None
        return self.make(parts, codes, parts.read("weight_scale", rows), zeros, order)

    def dummies(self, rows: int, columns: int) -> dict[str, Dummy]:
        found: dict[str, Dummy] = {
            "weight_packed": ((rows, -(-columns * self.bits // 32)), "i32", None),
            "weight_scale": ((rows, self.groups(columns)), "bf16", self.dummy_scale),
        }
        if not self.symmetric:
            shape = (-(-rows * self.bits // 32), self.groups(columns))
            found["weight_zero_point"] = (shape, "i32", self.middle_word())
        return found | ({"weight_g_idx": ((columns,), "i32", 0.0)} if self.ordered else {})


@dataclass(frozen=True)
class PlainIntegers(_Integers):
    """int-quantized of compressed-tensors: `weight` int8 [N, K], `weight_scale` for all, for each
    row or for each group of columns, `weight_zero_point` int8 like it unless `symmetric`."""

    symmetric: bool = True

    def open(self, parts: Parts) -> tuple[int, int]:
        parts.need("weight", formats=("i8",), dimensions=2)
        rows, columns = parts.info("weight").shape
        groups = self.groups_of(parts, columns)
        shapes = [(rows, groups)] if self.group else [(), (1,), (1, 1), (rows,), (rows, 1)]
        parts.need("weight_scale", formats=FLOATS)
        parts.expect("weight_scale", *shapes)
        if not self.symmetric:
            parts.need("weight_zero_point", formats=("i8",))
            parts.expect("weight_zero_point", *shapes)
        return rows, columns

    def read(self, parts: Parts, rows: slice) -> QuantTensor | torch.Tensor:
        height, columns = parts.info("weight").shape
        groups = self.groups_of(parts, columns)

        def spread(name: str) -> torch.Tensor:
            return parts.read(name).reshape(-1, groups).expand(height, groups)[rows]

        codes = parts.read("weight", rows).view(torch.uint8) ^ 0x80  # adds 128
        zeros = None
        if self.symmetric:
            check_symmetric(parts)
        else:
            zeros = spread("weight_zero_point").contiguous().view(torch.uint8) ^ 0x80
        return self.make(parts, codes, spread("weight_scale"), zeros)

    def dummies(self, rows: int, columns: int) -> dict[str, Dummy]:
        shape = (rows, self.groups(columns))
        found: dict[str, Dummy] = {
            "weight": ((rows, columns), "i8", None),
            "weight_scale": (shape, "bf16", self.dummy_scale),
        }
        return found | ({} if self.symmetric else {"weight_zero_point": (shape, "i8", 0.0)})
