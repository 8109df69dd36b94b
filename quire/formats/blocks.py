"""Matrices stored as rows of packed blocks, as llama.cpp's formats are.

A row is a whole number of blocks and never shares a block with another row, so rows are units:
they can be sliced, permuted and concatenated as bytes. Columns can be cut at block borders only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockFormat:
    """How many values one block holds and how many bytes it takes."""

    name: str
    values_per_block: int
    bytes_per_block: int

    @property
    def bits_per_value(self) -> float:
        return 8 * self.bytes_per_block / self.values_per_block


# Block layouts: ggml/src/ggml-common.h of llama.cpp.
BLOCK_FORMATS: dict[str, BlockFormat] = {
    block.name: block
    for block in (
        BlockFormat("f32", 1, 4),
        BlockFormat("f16", 1, 2),
        BlockFormat("bf16", 1, 2),
        BlockFormat("q4_0", 32, 18),
        BlockFormat("q4_1", 32, 20),
        BlockFormat("q5_0", 32, 22),
        BlockFormat("q5_1", 32, 24),
        BlockFormat("q8_0", 32, 34),
        BlockFormat("q4_k", 256, 144),
        BlockFormat("q5_k", 256, 176),
        BlockFormat("q6_k", 256, 210),
    )
}


def row_bytes(format: str, columns: int) -> int:
    """Bytes of one row of `columns` values. ValueError if blocks do not divide the row."""
    block = BLOCK_FORMATS[format]
    if columns % block.values_per_block:
        raise ValueError(
            f"a row of {columns} values is not a whole number of {format} blocks "
            f"of {block.values_per_block}"
        )
    return columns // block.values_per_block * block.bytes_per_block


@dataclass(frozen=True)
class BlockTensor:
    """A matrix of `shape` [rows, columns] in a block format.

    `data` is uint8 [rows, bytes per row]. It may be a view of a memory-mapped file: treat it as
    read-only. ValueError from the constructor if format, shape and data contradict each other.
    """

    format: str
    shape: tuple[int, int]
    data: torch.Tensor

    def __post_init__(self) -> None:
        if self.format not in BLOCK_FORMATS:
            raise ValueError(f"unknown block format {self.format!r}")
        rows, columns = self.shape
        expected = (rows, row_bytes(self.format, columns))
        if self.data.dtype != torch.uint8 or tuple(self.data.shape) != expected:
            raise ValueError(
                f"{self.format} {rows}x{columns} needs uint8 data {expected}, "
                f"got {self.data.dtype} {tuple(self.data.shape)}"
            )

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> BlockTensor:
        return BlockTensor(self.format, self.shape, self.data.to(device))

    def dequantize(self) -> torch.Tensor:
        """The values, float32 [rows, columns]."""
        from quire.formats.gguf import dequantize

        return dequantize(self.format, self.data, self.shape)

    def rows(self, index: slice | torch.Tensor) -> BlockTensor:
        """The rows of a slice (a view) or of an int64 [n] index (a copy, in its order)."""
        data = self.data[index]
        return BlockTensor(self.format, (data.shape[0], self.shape[1]), data)

    def columns(self, index: slice) -> BlockTensor:
        """A view of whole blocks of columns. ValueError if `index` cuts a block or has a step."""
        start, stop, step = index.indices(self.shape[1])
        if step != 1:
            raise ValueError("columns of a block tensor cannot be taken with a step")
        stop = max(start, stop)
        data = self.data[:, row_bytes(self.format, start) : row_bytes(self.format, stop)]
        return BlockTensor(self.format, (self.shape[0], stop - start), data)


def concatenate_rows(parts: Sequence[BlockTensor]) -> BlockTensor:
    """Stacks matrices of one format and width. ValueError if they differ."""
    first = parts[0]
    for part in parts:
        if (part.format, part.shape[1]) != (first.format, first.shape[1]):
            raise ValueError(
                f"cannot stack {part.format} of width {part.shape[1]} "
                f"on {first.format} of width {first.shape[1]}"
            )
    data = torch.cat([part.data for part in parts])
    return BlockTensor(first.format, (data.shape[0], first.shape[1]), data)
