"""Reading weights onto the device in the form that kernels want."""

from __future__ import annotations

import torch

from quire.formats.blocks import BlockTensor
from quire.formats.layout import FP8_BLOCK
from quire.formats.quantized import QuantTensor
from quire.layers.build import Build
from quire.weights.source import WeightSource

# Values that are widened at a time: their float32 form is all that is needed beside the result.
WIDENED_AT_ONCE = 1 << 24


def to_dense(
    tensor: torch.Tensor | BlockTensor | QuantTensor, dtype: torch.dtype | None
) -> torch.Tensor:
    """A dense tensor in `dtype`; None keeps a dense tensor's own."""
    if isinstance(tensor, QuantTensor):
        return widen(tensor, dtype or torch.float32)
    if isinstance(tensor, BlockTensor):
        tensor = tensor.dequantize()
    return tensor.to(dtype) if dtype is not None else tensor


def widen(tensor: QuantTensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of a quantised matrix in `dtype`, rounded to nearest."""
    rows, columns = tensor.shape
    values = torch.empty(rows, columns, dtype=dtype, device=tensor.device)
    step = max(1, WIDENED_AT_ONCE // max(1, columns) // FP8_BLOCK) * FP8_BLOCK
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        values[part] = tensor.rows(part).dequantize()
    return values


def read_matrix(
    build: Build,
    source: WeightSource,
    name: str,
    rows: slice | None = None,
    columns: slice | None = None,
    layer: str = "linear",
) -> torch.Tensor | BlockTensor | QuantTensor:
    """A weight or a part of it on the build's device, dense where its kernels want that.

    `layer`: whose kernels say which formats stay codes; "" for those that have none.
    """
    tensor = source.read(name, rows=rows, columns=columns).to(build.device)
    if isinstance(tensor, QuantTensor):
        if layer and not build.kernels.why_widened(tensor.layout, tensor.shape[1], layer):
            return tensor
        return widen(tensor, build.dtype or build.widened)
    if isinstance(tensor, BlockTensor) and not build.kernels.dense:
        return tensor
    return to_dense(tensor, build.dtype)


def read_vector(
    build: Build, source: WeightSource, name: str, rows: slice | None = None
) -> torch.Tensor:
    """A 1-D tensor in float32, on the build's device."""
    return to_dense(source.read(name, rows=rows).to(build.device), torch.float32).contiguous()
