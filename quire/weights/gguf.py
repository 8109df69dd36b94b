"""Weights in a GGUF file, mapped into memory and read as views."""

from __future__ import annotations

import mmap
import warnings
from pathlib import Path

import torch

from quire.errors import ModelError
from quire.formats.blocks import BlockTensor
from quire.formats.layout import row_bytes
from quire.weights.gguf_header import GgufHeader, StoredTensor, corrupt, read_header
from quire.weights.gguf_names import Mapped, map_names
from quire.weights.source import (
    DENSE_DTYPES,
    SAMPLE_PIECE_BYTES,
    SAMPLE_PIECES,
    TensorInfo,
    WeightSource,
    bounds,
    missing_tensor,
    sample_places,
    source_closed,
)


class GgufSource(WeightSource):
    """The tensors of one GGUF file under their Hugging Face names.

    Packed tensors come as BlockTensor. Everything is a view of the mapped file, except where the
    converter's change of values has to be undone (rotary rows of Llama, norms of Gemma, halves of
    DeepSeek's kv_b_proj) and column slices of dense tensors are strided views. ModelError if the
    file is corrupt.
    """

    def __init__(self, file: GgufHeader | Path | str):
        self._header = file if isinstance(file, GgufHeader) else read_header(file)
        self._mapped = map_names(self._header)
        self._names = sorted(self._mapped)
        self._data: torch.Tensor | None = _map_file(self._header.path)
        ends = [t.start + t.info.nbytes for t in self._header.tensors.values()]
        if ends and max(ends) > self._data.numel():
            raise corrupt(self._header.path, "the file was cut off after its header was read")

    @property
    def header(self) -> GgufHeader:
        return self._header

    def names(self) -> list[str]:
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        return self._find(name).info

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor | BlockTensor:
        entry = self._find(name)
        shape = entry.info.shape
        first, last = bounds(rows, shape[0])
        if entry.widened:
            left, right = bounds(columns, shape[1])
            return self._widened(entry)[first:last, left:right]
        stored = self._header.tensors[entry.stored]
        if len(shape) == 1:
            if columns is not None:
                raise ValueError(f"{name} of shape {shape} has no columns to slice")
            return self._read_vector(entry, stored, first, last)
        left, right = bounds(columns, shape[1])
        width = row_bytes(entry.info.format, shape[1]) if entry.info.packed else None
        itemsize = 1 if width else DENSE_DTYPES[stored.info.format].itemsize
        raw = self._bytes(stored).view(-1, width or shape[1] * itemsize)
        raw = _take_rows(raw[entry.first_row : entry.first_row + shape[0]], entry, first, last)
        if width:
            packed = BlockTensor(entry.info.format, (last - first, shape[1]), raw)
            return packed if columns is None else packed.columns(slice(left, right))
        values = raw.view(DENSE_DTYPES[stored.info.format])
        return values if columns is None else values[:, left:right]

    def _widened(self, entry: Mapped) -> torch.Tensor:
        """What keys and values are made of, in float32: of each head the rows for its keys, which
        the converter transposed where they stand alone, and then those for its values."""
        parts = [self._matrix(name) for name in entry.widened]
        if len(parts) == 1:
            return parts[0]
        rank, heads = entry.info.shape[1], self._header.tensors[entry.stored].info.shape[0]
        keys, values = parts[0].view(heads, rank, -1), parts[1].view(heads, -1, rank)
        return torch.cat([keys.transpose(1, 2), values], dim=1).view(-1, rank)

    def _matrix(self, name: str) -> torch.Tensor:
        """A stored tensor's values in float32, its outer dimensions as rows."""
        stored = self._header.tensors[name]
        rows, columns = _row_count(stored), stored.info.shape[-1]
        if stored.info.packed:
            width = row_bytes(stored.info.format, columns)
            data = self._bytes(stored).view(-1, width)
            return BlockTensor(stored.info.format, (rows, columns), data).dequantize()
        return self._bytes(stored).view(DENSE_DTYPES[stored.info.format]).view(rows, -1).float()

    def _read_vector(
        self, entry: Mapped, stored: StoredTensor, first: int, last: int
    ) -> torch.Tensor:
        values = self._bytes(stored).view(DENSE_DTYPES[stored.info.format])
        values = _take_rows(values, entry, first, last)
        return values.float() - entry.added if entry.added else values

    def sample(self, name: str) -> bytes:
        entry = self._find(name)
        if entry.widened:
            each = SAMPLE_PIECES * SAMPLE_PIECE_BYTES // len(entry.widened)
            return b"".join(self._sample(name)[:each] for name in entry.widened)
        return self._sample(entry.stored, entry.first_row, entry.info.shape[0])

    def _sample(self, name: str, first_row: int = 0, rows: int | None = None) -> bytes:
        """A sample of some rows of a stored tensor, of all by default."""
        stored = self._header.tensors[name]
        whole = self._bytes(stored)
        count = _row_count(stored)
        size = whole.numel() * (count if rows is None else rows) // count
        start = whole.numel() * first_row // count
        pieces = [whole[start + a : start + b] for a, b in sample_places(size)]
        return b"".join(piece.numpy().tobytes() for piece in pieces)

    def read_raw(self, name: str) -> torch.Tensor:
        """A dense tensor under its GGUF name, as stored. ModelError if missing or packed."""
        stored = self._header.tensors.get(name)
        if stored is None or stored.info.packed:
            raise missing_tensor(name, f"{self._header.path} as a dense tensor")
        values = self._bytes(stored).view(DENSE_DTYPES[stored.info.format])
        return values.view(stored.info.shape)

    def close(self) -> None:
        self._data = None

    def _bytes(self, stored: StoredTensor) -> torch.Tensor:
        if self._data is None:
            raise source_closed(str(self._header.path))
        return self._data[stored.start : stored.start + stored.info.nbytes]

    def _find(self, name: str) -> Mapped:
        if name not in self._mapped:
            raise missing_tensor(name, str(self._header.path))
        return self._mapped[name]


def _row_count(stored: StoredTensor) -> int:
    """Rows of a tensor, all but the last dimension (experts are stacked rows); vectors: items."""
    shape = stored.info.shape
    rows = 1
    for size in shape[:-1] or shape:
        rows *= size
    return rows


def _take_rows(values: torch.Tensor, entry: Mapped, first: int, last: int) -> torch.Tensor:
    """Rows first to last in Hugging Face's order: a view, or a copy where heads are interleaved.

    The converter stores row 2 * j + s of a head where Hugging Face has row s * half + j, so that
    rotary pairs lie next to each other.
    """
    if not entry.interleaved:
        return values[first:last]
    half = entry.info.shape[0] // (2 * entry.interleaved)
    row = torch.arange(first, last)
    head, within = row // (2 * half), row % (2 * half)
    return values[head * 2 * half + 2 * (within % half) + within // half]


def _map_file(path: Path) -> torch.Tensor:
    """The whole file as one read-only uint8 tensor; pages are read when touched."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(
            code="no_weights", what=f"{path} cannot be mapped", why=str(error)
        ) from error
    with warnings.catch_warnings():
        # Torch warns that the buffer is read-only; so is what a source promises.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data, dtype=torch.uint8)
