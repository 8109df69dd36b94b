"""A vector that kernels read in float32: sinks of heads, corrections of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.layers.build import Build
from quire.layers.read import read_vector
from quire.weights.source import TensorInfo, WeightSource


class Vector:
    """One tensor [size] as `values`, float32; `shared`: each rank has its share of it."""

    def __init__(self, build: Build, name: str, size: int, shared: bool = False):
        self.build, self.name, self.size = build, name, size
        self._share = build.group.shard(size, name) if shared else slice(0, size)
        self.values = torch.empty(0)
        build.add_weight(self)

    def tensors(self) -> list[TensorInfo]:
        return [TensorInfo(self.name, (self.size,), "bf16")]

    def nbytes(self, formats: Callable[[str], str]) -> int:
        share: int = self._share.stop - self._share.start
        return 4 * share

    def load(self, source: WeightSource) -> None:
        self.values = read_vector(self.build, source, self.name, self._share)
