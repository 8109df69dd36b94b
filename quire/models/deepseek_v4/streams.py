"""Hyper-connections: how layers read a token's streams, and how the head does."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.kernels.reference.streams.mixing import collapse, mixing, sigmoid, spread
from quire.layers.build import Build
from quire.layers.vector import Vector
from quire.models.deepseek_v4.config import Config
from quire.models.deepseek_v4.parts import ExactMatrix


@dataclass
class Mix:
    """How a layer's result goes back: see mixing."""

    writes_TN: torch.Tensor
    matrix_TNN: torch.Tensor


class _Logits:
    """Logits of a mix: a product with all streams of a token, over their root mean square."""

    def __init__(self, config: Config, build: Build, name: str, count: int):
        self.matrix = ExactMatrix(build, f"{name}_fn", count, config.streams * config.hidden)
        self.base = Vector(build, f"{name}_base", count)
        self.eps = config.eps

    def __call__(self, streams_TND: torch.Tensor) -> torch.Tensor:
        flat = streams_TND.flatten(1)
        return self.matrix(flat) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.eps)


class HyperConnection:
    """What stands between the streams and one layer."""

    def __init__(self, config: Config, build: Build, name: str):
        n, self.config = config.streams, config
        self.logits = _Logits(config, build, name, n * (n + 2))
        self.scale = Vector(build, f"{name}_scale", 3)

    def read(self, streams_TND: torch.Tensor) -> tuple[torch.Tensor, Mix]:
        """The layer's input [T, D], and how its result is written."""
        c = self.config
        reads, writes, matrix = mixing(
            self.logits(streams_TND), self.logits.base.values, self.scale.values,
            c.streams, c.stream_eps, c.sinkhorn_steps,
        )  # fmt: skip
        return collapse(streams_TND, reads), Mix(writes, matrix)

    def write(self, y_TD: torch.Tensor, streams_TND: torch.Tensor, mix: Mix) -> torch.Tensor:
        """The streams after the layer."""
        return spread(y_TD, streams_TND, mix.writes_TN, mix.matrix_TNN)


class HyperHead:
    """The sum of the streams that the head reads: [T, n, D] -> [T, D]."""

    def __init__(self, config: Config, build: Build, prefix: str = ""):
        self.logits = _Logits(config, build, f"{prefix}hc_head", config.streams)
        self.scale = Vector(build, f"{prefix}hc_head_scale", 1)
        self.eps = config.stream_eps

    def __call__(self, streams_TND: torch.Tensor) -> torch.Tensor:
        logits = self.logits(streams_TND) * self.scale.values + self.logits.base.values
        return collapse(streams_TND, sigmoid(logits) + self.eps)
