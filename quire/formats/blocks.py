"""Matrices stored as rows of packed blocks, as llama.cpp's formats are.

A row is a whole number of blocks and never shares a block with another row, so rows are units:
they can be sliced, permuted and concatenated as bytes. Columns can be cut at block borders only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quire.formats.layout import BLOCK_FORMATS, row_bytes


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
