"""Hyper-connections: how layers read a token's streams, and how the head does."""

from __future__ import annotations

import torch

from quire.kernels.compressed import Mix, StreamWeights
from quire.layers.build import Build
from quire.layers.norm import RMSNorm
from quire.layers.vector import Vector
from quire.models.deepseek_v4.config import Config
from quire.models.deepseek_v4.parts import ExactMatrix

# A layer's result, and how the streams get it.
Written = tuple[torch.Tensor, Mix]


class _Weights:
    """What a mix is computed with: `count` logits."""

    def __init__(self, config: Config, build: Build, name: str, count: int, scales: int):
        self.config = config
        self.matrix = ExactMatrix(build, f"{name}_fn", count, config.streams * config.hidden)
        self.base = Vector(build, f"{name}_base", count)
        self.scale = Vector(build, f"{name}_scale", scales)

    def __call__(self) -> StreamWeights:
        c = self.config
        return StreamWeights(
            self.matrix.packed, self.base.values, self.scale.values,
            c.streams, c.eps, c.stream_eps, c.sinkhorn_steps,
        )  # fmt: skip


class HyperConnection:
    """What stands between the streams and one layer, the layer's norm included."""

    def __init__(self, config: Config, build: Build, name: str, norm: str):
        n, self.kernels = config.streams, build.kernels.compressed
        self.weights = _Weights(config, build, name, n * (n + 2), 3)
        self.norm = RMSNorm(build, norm, config.hidden, config.eps)

    def __call__(
        self, streams_TND: torch.Tensor, written: Written | None
    ) -> tuple[torch.Tensor, torch.Tensor, Mix]:
        """The streams once they have what the layer before gave, this layer's input [T, D], and how
        its result is written."""
        return self.kernels.mix_streams(
            streams_TND, written, self.weights(), self.norm.weight, self.norm.eps
        )


class HyperHead:
    """The sum of the streams that the head reads: [T, n, D] -> [T, D]."""

    def __init__(self, config: Config, build: Build, prefix: str = ""):
        self.kernels = build.kernels.compressed
        self.weights = _Weights(config, build, f"{prefix}hc_head", config.streams, 1)

    def __call__(self, streams_TND: torch.Tensor) -> torch.Tensor:
        return self.kernels.collapse_streams(streams_TND, self.weights())
