"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.layers.build import Build
from quire.layers.linear import read_vector
from quire.weights.source import TensorInfo, WeightSource


class RMSNorm:
    """x / rms(x) * (weight + offset); Gemma stores weight - 1, so its offset is 1."""

    def __init__(self, build: Build, name: str, size: int, eps: float, offset: float = 0.0):
        self.kernels = build.kernels
        self.name, self.size, self.eps, self.offset = f"{name}.weight", size, eps, offset
        self.weight = torch.empty(0)
        build.add_weight(self)

    def tensors(self) -> list[TensorInfo]:
        return [TensorInfo(self.name, (self.size,), "bf16")]

    def nbytes(self, formats: Callable[[str], str]) -> int:
        return 4 * self.size

    def load(self, source: WeightSource) -> None:
        self.weight = read_vector(source, self.name) + self.offset

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.kernels.rms_norm(x_TH, self.weight, self.eps)

    def add(self, x_TH: torch.Tensor | None, residual_TH: torch.Tensor) -> torch.Tensor:
        """Adds x (None: nothing) to the residual in place, and returns the norm of the sum."""
        if x_TH is None:
            return self(residual_TH)
        return self.kernels.add_rms_norm(x_TH, residual_TH, self.weight, self.eps)
