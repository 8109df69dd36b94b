"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.layers.build import Build
from quire.layers.read import read_vector
from quire.weights.source import TensorInfo, WeightSource


class ResidualStream:
    """The sum [T, H] that layers read through a norm and add to.

    What was added last stays apart as `pending` until the stream is read, so that the addition,
    the norm and what follows it can be one kernel.
    """

    def __init__(self, value_TH: torch.Tensor):
        self.value = value_TH
        self.pending: torch.Tensor | None = None

    def add(self, x_TH: torch.Tensor) -> None:
        """Add; the stream must be read before the next addition."""
        assert self.pending is None
        self.pending = x_TH


class RMSNorm:
    """x / rms(x) * (weight + offset); Gemma stores weight - 1, so its offset is 1."""

    def __init__(self, build: Build, name: str, size: int, eps: float, offset: float = 0.0):
        self.build, self.kernels = build, build.kernels
        self.name, self.size, self.eps, self.offset = f"{name}.weight", size, eps, offset
        self.weight = torch.empty(0)
        build.add_weight(self)

    def tensors(self) -> list[TensorInfo]:
        return [TensorInfo(self.name, (self.size,), "bf16")]

    def nbytes(self, formats: Callable[[str], str]) -> int:
        return 4 * self.size

    def load(self, source: WeightSource) -> None:
        self.weight = read_vector(self.build, source, self.name) + self.offset

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.kernels.rms_norm(x_TH, self.weight, self.eps)

    def read(self, stream: ResidualStream) -> torch.Tensor:
        """The norm of a stream's sum."""
        x_TH, stream.pending = stream.pending, None
        if x_TH is None:
            return self(stream.value)
        return self.kernels.add_rms_norm(x_TH, stream.value, self.weight, self.eps)
