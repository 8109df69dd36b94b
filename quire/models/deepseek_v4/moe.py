"""The experts: chosen by a table of tokens or by a router, and one that all tokens go through."""

from __future__ import annotations

import torch

from quire.layers.at_once import at_once
from quire.layers.build import Build
from quire.layers.experts import Experts, SeparateExperts, StackedExperts
from quire.layers.linear import Linear
from quire.layers.mlp import GatedMLP
from quire.layers.moe import UniformLogits
from quire.layers.vector import Vector
from quire.models.deepseek_v4.config import Config, Layer
from quire.models.deepseek_v4.parts import IndexTable

# What the checkpoint calls gate, up and down.
PARTS = ("w1", "w3", "w2")


class MoE:
    """x [T, H] and tokens [T] -> [T, H]. All experts clamp the inputs of their activation: the
    intermediate size of each is shared over ranks."""

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
        stacked, inner = build.kernels.dense, config.expert_intermediate
        make = StackedExperts if stacked else SeparateExperts
        self.experts: Experts = make(
            build, f"{name}.experts", config.hidden, inner, config.experts, "silu",
            parts=PARTS, limit=config.limit,
        )  # fmt: skip
        self.shared = GatedMLP(
            build, f"{name}.shared_experts", config.hidden, inner, "silu",
            reduce=False, parts=PARTS, limit=config.limit,
        )  # fmt: skip
        self._uniform = UniformLogits(build, config.experts)
        # Each slot's result and its product with the weight; scores in several orders; stacked
        # experts keep the inner values of all slots.
        slots = config.experts_per_token
        kept = slots * inner if stacked else 0
        build.add_width(2 * slots * config.hidden + 6 * config.experts + kept)

    def __call__(self, x_TH: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
        shared_TH, y_TH = at_once(
            x_TH, lambda: self.shared(x_TH), lambda: self._routed(x_TH, tokens_T)
        )
        return self.build.group.all_reduce(y_TH + shared_TH)

    def _routed(self, x_TH: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
        weights_TK, ids_TK = self.route(x_TH, tokens_T)
        if self.build.on_experts is not None:
            self.build.on_experts(ids_TK)
        return self.experts(x_TH, weights_TK, ids_TK)

    def route(
        self, x_TH: torch.Tensor, tokens_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights float32 [T, K] and expert ids int32 [T, K]."""
        logits_TE, c = self.router.exact(x_TH), self.config
        table_VK = None if self.table is None else self.table.data
        bias_E = None if self.bias is None else self.bias.values
        if self.build.moe_routing == "uniform":
            logits_TE, table_VK, bias_E = self._uniform(logits_TE), None, None
        return self.build.kernels.route_tokens(
            logits_TE, tokens_T, table_VK, bias_E, c.experts_per_token, c.route_scale
        )
