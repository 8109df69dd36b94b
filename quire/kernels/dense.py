"""Weights held on a GPU: dense in one number format, or as codes and scales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from quire.formats.gguf import dequantize
from quire.formats.layout import is_quantized
from quire.formats.quantized import QuantTensor
from quire.kernels import capabilities
from quire.kernels.reference.attention.fp8_cache import packed_width
from quire.kernels.reference.packed import (
    BLOCK,
    DENSE_TYPES,
    GgufWeight,
    PackedWeight,
    check_format,
)
from quire.kernels.reference.quantized.weights import QuantizedWeight
from quire.kernels.triton.quantized.pack import PackedQuantized, pack, quantized_nbytes

TOGETHER = 16  # experts whose codes are packed at a time


class DenseWeights:
    """Packing for kernels that want weights [N, K] on `device`: dense ones row-major in `dtype`,
    quantised ones as codes where capabilities.py says so. Caches are row-major, too."""

    dense = True
    compressed: Any = None  # what computes is in TritonKernels

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device

    def why_widened(self, name: str, columns: int, layer: str = "linear") -> str:
        """Why `pack` does not take a weight of this format as it is (capabilities.why_widened)."""
        dtype = str(self.dtype).removeprefix("torch.")
        return capabilities.why_widened("triton", layer, name, columns, dtype)

    def pack(
        self, weight: torch.Tensor | GgufWeight | QuantTensor
    ) -> PackedWeight | PackedQuantized:
        """A dense tensor or a block-quantised one, moved to the device and widened or rounded, or
        codes reordered for the kernels. Raises ValueError for codes that they do not have."""
        if isinstance(weight, QuantTensor):
            return pack_codes(weight.to(self.device))
        if isinstance(weight, torch.Tensor):
            data = weight.to(self.device, self.dtype).contiguous()
            return PackedWeight(data, str(self.dtype), *data.shape)
        format, data, n, k = weight
        check_format(format, n, k)
        moved = data.to(self.device)
        if format in DENSE_TYPES:
            return self.pack(moved.reshape(-1).view(DENSE_TYPES[format]).view(n, k))
        return self.pack(dequantize(format, moved, (n, k)))

    def pack_exact(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight whose products are wanted in float32, whatever the model's format."""
        return weight.to(self.device, torch.float32).contiguous()

    @staticmethod
    def exact_nbytes(n: int, k: int) -> int:
        """Bytes that `pack_exact` will hold."""
        return 4 * n * k

    def stack(
        self, count: int, parts: Iterable[PackedWeight | PackedQuantized]
    ) -> torch.Tensor | PackedQuantized:
        """`count` weights that `pack` gave as experts have them, [count, N, K], or some at a time:
        each is put in its place before the next is asked for."""
        stacked: torch.Tensor | PackedQuantized | None = None
        place = 0
        for part in parts:
            size = 1
            if isinstance(part, PackedQuantized):
                stacked = part.stack(count) if stacked is None else stacked
                assert isinstance(stacked, PackedQuantized)
                stacked.put(place, part)
                size = part.experts or 1
            else:
                if stacked is None:
                    stacked = part.data.new_empty(count, part.n, part.k)
                assert isinstance(stacked, torch.Tensor)
                stacked[place] = part.data
            place += size
        assert stacked is not None
        return stacked

    def pack_experts(
        self, count: int, matrices: Iterable[torch.Tensor | GgufWeight | QuantTensor]
    ) -> torch.Tensor | PackedQuantized:
        """`pack` and `stack` of `count` matrices. Codes are packed some at a time: to launch what
        packs one expert takes longer than the packing."""
        left = iter(matrices)
        return self.stack(count, self._packed(iter(lambda: list(islice(left, TOGETHER)), [])))

    def _packed(
        self, batches: Iterable[Sequence[torch.Tensor | GgufWeight | QuantTensor]]
    ) -> Iterator[PackedWeight | PackedQuantized]:
        for batch in batches:
            codes = [matrix for matrix in batch if isinstance(matrix, QuantTensor)]
            if len(codes) == len(batch) and len({_kind(matrix) for matrix in codes}) == 1:
                yield pack(_together(codes))
            else:
                yield from map(self.pack, batch)

    @staticmethod
    def cache_page(kv_heads: int, head_size: int, fp8: bool = False) -> tuple[tuple[int, ...], ...]:
        """One block of keys and of values: a head's 16 tokens lie together; `fp8`: in bytes, with
        scales."""
        shape = (kv_heads, BLOCK, packed_width(head_size) if fp8 else head_size)
        return shape, shape

    def packed_nbytes(self, format: str, n: int, k: int) -> int:
        """Bytes that `pack` will hold. Raises ValueError for a format it does not have."""
        if is_quantized(format):
            return quantized_nbytes(format, n, k)
        check_format(format, n, k)
        return n * k * self.dtype.itemsize


def _kind(matrix: QuantTensor) -> tuple[Any, ...]:
    """What matrices that are packed together have in common."""
    parts = (matrix.codes, matrix.scales, matrix.row_scales, matrix.zeros)
    return matrix.format, *(None if p is None else (p.dtype, p.shape) for p in parts)


def _together(matrices: Sequence[QuantTensor]) -> QuantizedWeight:
    """Of one kind, as one weight [E, N, K]."""

    def stack(name: str) -> Any:
        parts = [getattr(matrix, name) for matrix in matrices]
        if parts[0] is None:
            return None
        bytes_ = parts[0].dtype.itemsize == 1  # eight-bit floats go by these
        kind = torch.uint8 if bytes_ else parts[0].dtype
        return torch.stack([part.view(kind) for part in parts]).view(parts[0].dtype)

    names = ("codes", "scales", "row_scales", "zeros")
    return QuantizedWeight(matrices[0].format, *map(stack, names))


def pack_codes(weight: QuantTensor) -> PackedQuantized:
    """Codes for the kernels, and how activations are wanted that are multiplied with them."""
    packed = pack(
        QuantizedWeight(weight.format, weight.codes, weight.scales, weight.row_scales, weight.zeros)
    )
    return replace(packed, activation=weight.activation, input_scale=weight.input_scale)
