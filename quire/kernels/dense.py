"""Weights held on a GPU: dense in one number format, or as codes and scales."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
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
        """`count` weights that `pack` gave as experts have them, [count, N, K]: each is put in its
        place before the next is asked for."""
        stacked: torch.Tensor | PackedQuantized | None = None
        for place, part in enumerate(parts):
            if isinstance(part, PackedQuantized):
                stacked = part.stack(count) if stacked is None else stacked
                assert isinstance(stacked, PackedQuantized)
                stacked.put(place, part)
            else:
                if stacked is None:
                    stacked = part.data.new_empty(count, part.n, part.k)
                assert isinstance(stacked, torch.Tensor)
                stacked[place] = part.data
        assert stacked is not None
        return stacked

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


def pack_codes(weight: QuantTensor) -> PackedQuantized:
    """Codes for the kernels, and how activations are wanted that are multiplied with them."""
    packed = pack(
        QuantizedWeight(weight.format, weight.codes, weight.scales, weight.row_scales, weight.zeros)
    )
    return replace(packed, activation=weight.activation, input_scale=weight.input_scale)
