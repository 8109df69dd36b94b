"""What is known of a tensor from a file's header."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from quire.formats.layout import (
    BLOCK_FORMATS,
    DENSE_BYTES,
    is_quantized,
    quantized_nbytes,
    row_bytes,
)


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    `shape` counts values, outermost dimension first; `format` is a key of DENSE_BYTES,
    BLOCK_FORMATS, of QUANT_FORMATS with the group size of integers (layout.grouped), or of
    ORDERED_FORMATS. `stored`: bytes of the tensors that it is made of, where they are several.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    stored: int | None = None

    @property
    def nbytes(self) -> int:
        if self.stored is not None:
            return self.stored
        if self.format in DENSE_BYTES:
            return prod(self.shape) * DENSE_BYTES[self.format]
        if is_quantized(self.format):
            return quantized_nbytes(self.format, prod(self.shape[:-1]), self.shape[-1])
        return prod(self.shape[:-1]) * row_bytes(self.format, self.shape[-1])

    @property
    def packed(self) -> bool:
        return self.format not in DENSE_BYTES and self.format in BLOCK_FORMATS
