"""Seeded random weights without files, for plans, tests and benchmarks.

All matrices of a format are cut out of one pool of values per seed: row r of a tensor is a run of
the pool that begins at a place decided by (seed, name, r). That costs a copy instead of a random
number per value, and any slice of a tensor gives the same numbers as the whole, in any order and
on any number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TypeVar

import torch

from quire.formats.blocks import BlockTensor
from quire.formats.gguf import quantize
from quire.formats.layout import BLOCK_FORMATS, row_bytes
from quire.weights.source import (
    DENSE_DTYPES,
    TensorInfo,
    WeightSource,
    bounds,
    missing_tensor,
    source_closed,
)

T = TypeVar("T")

DEVIATION = 0.02
POOL_VALUES = 1 << 22
# Rows begin this many pool units apart: a prime, so that rows of one tensor rarely line up.
ROW_STEP = 1021
_SCALES = ("scale", "scale_inv", "scales", "scale_2")


class DummySource(WeightSource):
    """Tensors of the given kinds: matrices normal(0, 0.02), norm vectors one, biases zero.

    Scales of quantised weights (names ending in scale, scale_inv, scale_2) are one, raw codes
    (u8, i8) random bytes, other integers zero, which is a valid index everywhere. `constants`
    fixes the value of floating-point tensors by the end of their name. `index_limits` makes index
    tables by the end of their name: distinct values of 0 to limit - 1 in each row, different from
    row to row. `values` decides for whole names, before all else: a constant, or None for random
    values, random bytes where they are integers. ValueError for two tensors of one name or a row
    of more indices than the limit. Values are the same on all devices.
    """

    made = True

    def __init__(
        self,
        infos: Sequence[TensorInfo],
        seed: int = 0,
        constants: Mapping[str, float] | None = None,
        index_limits: Mapping[str, int] | None = None,
        values: Mapping[str, float | None] | None = None,
    ):
        self._infos = {info.name: info for info in sorted(infos, key=lambda info: info.name)}
        if len(self._infos) != len(infos):
            raise ValueError("two dummy tensors have the same name")
        self._seed, self._device = seed, torch.device("cpu")
        self._constants = dict(constants or {})
        self._index_limits = dict(index_limits or {})
        self._values = dict(values or {})
        self._pools: dict[tuple[str, int], torch.Tensor] = {}
        self._closed = False

    def names(self) -> list[str]:
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise missing_tensor(name, "the list of dummy tensors")
        return self._infos[name]

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor | BlockTensor:
        info = self.info(name)
        if self._closed:
            raise source_closed("the dummy source")
        shape = info.shape
        if (rows is not None and not shape) or (columns is not None and len(shape) < 2):
            raise ValueError(f"{name} of shape {shape} has no such dimension to slice")
        first, last = bounds(rows, shape[0] if shape else 1)
        left, right = bounds(columns, shape[-1] if len(shape) > 1 else 1)
        part = list(shape)
        if part:
            part[0] = last - first
        if len(part) > 1:
            part[-1] = right - left
        limit = _by_suffix(self._index_limits, name)
        if limit is not None:
            return self._index_table(info, limit)[first:last, ..., left:right].contiguous()
        value = self._constant(info)
        if value is not None:
            dtype = DENSE_DTYPES[info.format]
            if dtype.itemsize > 1:
                return torch.full(part, value, dtype=dtype, device=self._device)
            byte = _as_byte(value, dtype)
            return torch.full(part, byte, dtype=torch.uint8, device=self._device).view(dtype)
        if len(shape) < 2:
            values = self._rows(info, 0, 1, 0, shape[0] if shape else 1)[0, first:last]
            return values.reshape(part)
        between = 1
        for size in shape[1:-1]:
            between *= size
        matrix = self._rows(info, first * between, last * between, left, right)
        if info.packed:
            return BlockTensor(info.format, (matrix.shape[0], right - left), matrix)
        return matrix.reshape(part)

    def sample(self, name: str) -> bytes:
        return b""  # the seed says all, see fingerprint

    def fingerprint(self) -> str:
        """Digest of the tensor list, the seed and the tables: nothing needs to be generated."""
        rules = sorted(self._constants.items()), sorted(self._index_limits.items())
        if self._values:
            rules = (*rules, sorted(self._values.items()))  # type: ignore[assignment]
        head = f"dummy {self._seed} {rules} {super().fingerprint()}"
        return hashlib.blake2b(head.encode(), digest_size=32).hexdigest()

    def close(self) -> None:
        self._closed = True
        self._pools.clear()

    def make_on(self, device: torch.device) -> None:
        self._device = device
        self._pools.clear()

    def _constant(self, info: TensorInfo) -> float | None:
        """The one value of the tensor, or None where it is random."""
        if info.name in self._values:
            return self._values[info.name]
        dtype = DENSE_DTYPES.get(info.format)
        if dtype is None:
            return None
        if not dtype.is_floating_point:
            return None if info.format in ("u8", "i8") else 0.0
        fixed = _by_suffix(self._constants, info.name)
        if fixed is not None:
            return fixed
        last = info.name.rpartition(".")[2]
        if last.endswith(_SCALES):
            return 1.0
        if len(info.shape) == 1 and last.endswith("bias"):
            return 0.0
        if len(info.shape) == 1 and "norm" in info.name and last == "weight":
            return 1.0
        return None

    def _rows(self, info: TensorInfo, first: int, last: int, left: int, right: int) -> torch.Tensor:
        """Rows of the tensor seen as a matrix: its dtype [rows, columns], or packed uint8."""
        columns = info.shape[-1] if info.shape else 1
        block = BLOCK_FORMATS[info.format].values_per_block if info.packed else 1
        # ValueError where a slice or row cuts a block.
        width = row_bytes(info.format, right) - row_bytes(info.format, left) if info.packed else 0
        pool = self._pool(info.format, columns)
        left, units = left // block, right // block - left // block
        places = pool.shape[0] - columns // block + 1
        base = int.from_bytes(self._hash(info.name)[:8], "little")
        shape = (last - first, units, *pool.shape[1:])
        out = torch.empty(shape, dtype=pool.dtype, device=self._device)
        row = first
        while row < last and units:
            start = (base + row * ROW_STEP) % places
            run = min(last - row, (places - 1 - start) // ROW_STEP + 1)
            stride = pool.stride(0)
            window = pool.as_strided(
                (run, units, *pool.shape[1:]),
                (ROW_STEP * stride, stride, *pool.stride()[1:]),
                (start + left) * stride,
            )
            out[row - first : row - first + run] = window
            row += run
        return out.reshape(last - first, width) if info.packed else out

    def _pool(self, format: str, columns: int) -> torch.Tensor:
        """Values [N], or blocks as uint8 [N, bytes]; N grows with very wide rows."""
        size = POOL_VALUES
        while size < 4 * columns:
            size *= 2
        if (format, size) not in self._pools:
            self._pools[format, size] = self._make_pool(format, size).to(self._device)
        return self._pools[format, size]

    def _make_pool(self, format: str, size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(
            int.from_bytes(self._hash("pool")[:8], "little") >> 1
        )
        dtype = DENSE_DTYPES.get(format, torch.float32)
        if not dtype.is_floating_point:
            total = size * dtype.itemsize
            codes = torch.randint(0, 256, (total,), dtype=torch.uint8, generator=generator)
            return codes.view(dtype)
        values = torch.randn(size, generator=generator) * DEVIATION
        if format in DENSE_DTYPES:
            return values.to(DENSE_DTYPES[format])
        return quantize(format, values[None]).data.reshape(
            -1, BLOCK_FORMATS[format].bytes_per_block
        )

    def _index_table(self, info: TensorInfo, limit: int) -> torch.Tensor:
        """Row r holds consecutive values mod limit, from a start that moves with r."""
        columns = info.shape[-1] if len(info.shape) > 1 else 1
        if len(info.shape) not in (1, 2) or columns > limit:
            raise ValueError(f"no index table {info.shape} of {limit} values for {info.name}")
        base = int.from_bytes(self._hash(info.name)[:4], "little")
        rows = torch.arange(info.shape[0])[:, None]
        table = (base + rows * 7 + rows // limit + torch.arange(columns)) % limit
        return table.reshape(info.shape).to(DENSE_DTYPES[info.format])

    def _hash(self, name: str) -> bytes:
        return hashlib.blake2b(f"{self._seed}\0{name}".encode()).digest()


@cache
def _as_byte(value: float, dtype: torch.dtype) -> int:
    return int(torch.tensor(value).to(dtype).view(torch.uint8))


def _by_suffix(table: Mapping[str, T], name: str) -> T | None:
    return next((value for end, value in table.items() if name.endswith(end)), None)
