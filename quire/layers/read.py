"""Reading weights onto the device in the form that kernels want."""

from __future__ import annotations

import torch

from quire.formats.blocks import BlockTensor
from quire.layers.build import Build
from quire.weights.source import WeightSource


def to_dense(tensor: torch.Tensor | BlockTensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A dense tensor in `dtype`; None keeps a dense tensor's own."""
    if isinstance(tensor, BlockTensor):
        tensor = tensor.dequantize()
    return tensor.to(dtype) if dtype is not None else tensor


def read_matrix(
    build: Build,
    source: WeightSource,
    name: str,
    rows: slice | None = None,
    columns: slice | None = None,
) -> torch.Tensor | BlockTensor:
    """A weight or a part of it on the build's device, dense where its kernels want that."""
    tensor = source.read(name, rows=rows, columns=columns).to(build.device)
    if isinstance(tensor, BlockTensor) and not build.kernels.dense:
        return tensor
    return to_dense(tensor, build.dtype)


def read_vector(
    build: Build, source: WeightSource, name: str, rows: slice | None = None
) -> torch.Tensor:
    """A 1-D tensor in float32, on the build's device."""
    return to_dense(source.read(name, rows=rows).to(build.device), torch.float32).contiguous()
