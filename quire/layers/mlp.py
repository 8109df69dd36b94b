"""Gated feed-forward layer: down(act(gate(x)) * up(x))."""

from __future__ import annotations

import torch

from quire.layers.build import Build
from quire.layers.linear import Linear
from quire.layers.norm import ResidualStream, RMSNorm


class GatedMLP:
    """`activation` is "silu", "gelu_tanh" or "swiglu_oai". The intermediate size is shared over
    ranks, whose results are summed unless `reduce` is False."""

    def __init__(
        self,
        build: Build,
        name: str,
        hidden: int,
        intermediate: int,
        activation: str = "silu",
        bias: bool = False,
        reduce: bool = True,
    ):
        self.activation = activation
        self.gate_up = Linear(
            build,
            [f"{name}.gate_proj", f"{name}.up_proj"],
            hidden,
            [intermediate, intermediate],
            bias=bias,
            shard="outputs",
        )
        self.down = Linear(
            build,
            [f"{name}.down_proj"],
            intermediate,
            [hidden],
            bias=bias,
            shard="inputs",
            reduce=reduce,
        )
        build.add_width(self.gate_up.local_out * 3 // 2)

    def after(self, norm: RMSNorm, stream: ResidualStream) -> torch.Tensor:
        """The layer applied to the norm of a stream."""
        return self.down(self.gate_up.after(norm, stream, self.activation, self.down))

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate_up.gated(x_TH, self.activation, self.down))
