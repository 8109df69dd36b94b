"""Weights held dense, in one number format, on one device."""

from __future__ import annotations

import torch

from quire.formats.gguf import dequantize
from quire.kernels.capabilities import held_as_codes
from quire.kernels.reference.packed import (
    DENSE_TYPES,
    GgufWeight,
    PackedWeight,
    check_format,
)


class DenseWeights:
    """Packing for kernels that want every weight [N, K] row-major in `dtype` on `device`."""

    dense = True
    quantized = held_as_codes("triton", "linear")
    quantized_experts = held_as_codes("triton", "experts")

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device

    def pack(self, weight: torch.Tensor | GgufWeight) -> PackedWeight:
        """A dense tensor or a block-quantised one, moved to the device and widened or rounded."""
        if isinstance(weight, torch.Tensor):
            data = weight.to(self.device, self.dtype).contiguous()
            return PackedWeight(data, str(self.dtype), *data.shape)
        format, data, n, k = weight
        check_format(format, n, k)
        moved = data.to(self.device)
        if format in DENSE_TYPES:
            return self.pack(moved.reshape(-1).view(DENSE_TYPES[format]).view(n, k))
        return self.pack(dequantize(format, moved, (n, k)))

    def packed_nbytes(self, format: str, n: int, k: int) -> int:
        """Bytes that `pack` will hold. Raises ValueError for a format it does not have."""
        check_format(format, n, k)
        return n * k * self.dtype.itemsize
