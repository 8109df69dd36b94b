"""Gated feed-forward layer: down(act(gate(x)) * up(x))."""

from __future__ import annotations

import torch

from quire.layers.build import Build
from quire.layers.linear import Linear
from quire.layers.norm import ResidualStream, RMSNorm

# What checkpoints call the projections for gate, up and down.
PARTS = ("gate_proj", "up_proj", "down_proj")


class GatedMLP:
    """`activation` is "silu", "gelu_tanh" or "swiglu_oai". The intermediate size is shared over
    ranks, whose results are summed unless `reduce` is False. `parts`: names of the projections for
    gate, up and down. `limit`: what the gate is clamped at from above, and up from both sides,
    before the activation; 0 where it is not."""

    def __init__(
        self,
        build: Build,
        name: str,
        hidden: int,
        intermediate: int,
        activation: str = "silu",
        bias: bool = False,
        reduce: bool = True,
        parts: tuple[str, str, str] = PARTS,
        limit: float = 0.0,
    ):
        self.activation, self.limit = activation, limit
        gate, up, down = parts
        self.gate_up = Linear(
            build,
            [f"{name}.{gate}", f"{name}.{up}"],
            hidden,
            [intermediate, intermediate],
            bias=bias,
            shard="outputs",
        )
        self.down = Linear(
            build,
            [f"{name}.{down}"],
            intermediate,
            [hidden],
            bias=bias,
            shard="inputs",
            reduce=reduce,
        )
        # Gate and up, clamped in a copy on a CPU, and what comes of them.
        build.add_width(self.gate_up.local_out * (5 if limit else 3) // 2)

    def after(self, norm: RMSNorm, stream: ResidualStream) -> torch.Tensor:
        """The layer applied to the norm of a stream."""
        return self.down(self.gate_up.after(norm, stream, self.activation, self.down, self.limit))

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate_up.gated(x_TH, self.activation, self.down, self.limit))
