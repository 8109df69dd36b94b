"""The experts: chosen by a table of tokens or by a router, and one that all tokens go through."""

from __future__ import annotations

import torch

from quire.kernels.reference.moe.route_tokens import route_tokens
from quire.layers.build import Build
from quire.layers.experts import SeparateExperts
from quire.layers.linear import Linear
from quire.layers.moe import UniformLogits
from quire.layers.vector import Vector
from quire.models.deepseek_v4.config import Config, Layer
from quire.models.deepseek_v4.parts import IndexTable


class ClampedMLP:
    """w2(silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit)); the intermediate size is shared over
    ranks, whose results the caller sums."""

    def __init__(self, config: Config, build: Build, name: str):
        hidden, inner, self.limit = config.hidden, config.expert_intermediate, config.limit
        self.kernels = build.kernels
        self.gate_up = Linear(
            build, [f"{name}.w1", f"{name}.w3"], hidden, [inner, inner], shard="outputs"
        )
        self.down = Linear(build, [f"{name}.w2"], inner, [hidden], shard="inputs", reduce=False)
        build.add_width(self.gate_up.local_out * 5 // 2)

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x_TH).chunk(2, dim=1)
        gate.clamp_(max=self.limit)
        up.clamp_(-self.limit, self.limit)
        return self.down(self.kernels.gated_activation(torch.cat([gate, up], dim=1), "silu"))


class ClampedExperts(SeparateExperts):
    """Expert by expert."""

    def __init__(self, config: Config, build: Build, name: str):
        self.experts = [ClampedMLP(config, build, f"{name}.{e}") for e in range(config.experts)]


class MoE:
    """x [T, H] and tokens [T] -> [T, H]."""

    def __init__(self, config: Config, build: Build, name: str, layer: Layer):
        self.config, self.build = config, build
        self.router = Linear(build, [f"{name}.gate"], config.hidden, [config.experts])
        self.table: IndexTable | None = None
        self.bias: Vector | None = None
        if layer.hashed:
            sizes = config.vocab_size, config.experts_per_token, config.experts
            self.table = IndexTable(build, f"{name}.gate.tid2eid", *sizes)
        else:
            self.bias = Vector(build, f"{name}.gate.bias", config.experts)
        self.experts = ClampedExperts(config, build, f"{name}.experts")
        self.shared = ClampedMLP(config, build, f"{name}.shared_experts")
        self._uniform = UniformLogits(build, config.experts)
        # Each slot's result and its product with the weight; scores in several orders.
        build.add_width(2 * config.experts_per_token * config.hidden + 6 * config.experts)

    def __call__(self, x_TH: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
        weights_TK, ids_TK = self.route(x_TH, tokens_T)
        if self.build.on_experts is not None:
            self.build.on_experts(ids_TK)
        y_TH = self.experts(x_TH, weights_TK, ids_TK) + self.shared(x_TH)
        return self.build.group.all_reduce(y_TH)

    def route(
        self, x_TH: torch.Tensor, tokens_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights float32 [T, K] and expert ids [T, K]."""
        logits_TE, c = self.router(x_TH), self.config
        if self.build.moe_routing == "uniform":
            logits_TE = self._uniform(logits_TE)
            return route_tokens(logits_TE, None, None, c.experts_per_token, c.route_scale)
        return route_tokens(
            logits_TE,
            None if self.table is None else self.table.data[tokens_T],
            None if self.bias is None else self.bias.values,
            c.experts_per_token,
            c.route_scale,
        )
