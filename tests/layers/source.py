"""Tensors by name as a WeightSource, for one layer at a time."""

from __future__ import annotations

import torch

from quire.errors import ModelError
from quire.formats.blocks import BlockTensor
from quire.formats.quantized import QuantTensor
from quire.layers.build import Build
from quire.weights.source import DENSE_DTYPES, TensorInfo, WeightSource

Matrix = torch.Tensor | BlockTensor | QuantTensor
FORMATS = {dtype: name for name, dtype in DENSE_DTYPES.items()}


class Tensors(WeightSource):
    def __init__(self, tensors: dict[str, Matrix]):
        self.tensors = tensors

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        if isinstance(tensor, QuantTensor):
            kind = tensor.layout
        else:
            kind = tensor.format if isinstance(tensor, BlockTensor) else FORMATS[tensor.dtype]
        return TensorInfo(name, tuple(tensor.shape), kind)

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Matrix:
        if name not in self.tensors:
            raise ModelError("missing_tensor", name)
        tensor = self.tensors[name]
        if isinstance(tensor, BlockTensor | QuantTensor):
            tensor = tensor if rows is None else tensor.rows(rows)
            return tensor if columns is None else tensor.columns(columns)
        tensor = tensor if rows is None else tensor[rows]
        return tensor if columns is None else tensor[:, columns]

    def sample(self, name: str) -> bytes:
        return b""

    def close(self) -> None:
        pass


def load(build: Build, tensors: dict[str, Matrix]) -> None:
    """Loads every weight of the build, and checks that what they declare is what is there."""
    source = Tensors(tensors)
    declared = {t.name: tuple(t.shape) for w in build.weights for t in w.tensors()}
    assert declared == {name: tuple(t.shape) for name, t in tensors.items()}
    for weight in build.weights:
        weight.load(source)
