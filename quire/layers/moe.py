"""Mixture of experts: each token goes through its top-k experts and their results are summed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quire.layers.at_once import at_once
from quire.layers.build import Build
from quire.layers.experts import Experts, SeparateExperts, StackedExperts
from quire.layers.linear import Linear
from quire.layers.mlp import GatedMLP
from quire.layers.norm import ResidualStream, RMSNorm
from quire.layers.vector import Vector

# Rows of router logits that "uniform" routing draws from, by a token's place in the step.
UNIFORM_ROWS = 4096


@dataclass(frozen=True)
class Grouped:
    """Experts are chosen within the best `chosen` of `groups` groups, by their softmax or, with
    `corrected`, by their sigmoid and a learnt correction of each; weights are times `scale`."""

    groups: int
    chosen: int
    corrected: bool
    scale: float


class UniformLogits:
    """Logits that choose experts evenly at random, a router's own having been computed."""

    def __init__(self, build: Build, experts: int):
        self.experts, self._seed = experts, len(build.weights)
        self._table_TE: torch.Tensor | None = None

    def __call__(self, logits_TE: torch.Tensor) -> torch.Tensor:
        if self._table_TE is None:
            generator = torch.Generator().manual_seed(self._seed)
            table = torch.randn(UNIFORM_ROWS, self.experts, generator=generator)
            self._table_TE = table.to(logits_TE.device, logits_TE.dtype)
        rows = len(logits_TE)
        if rows <= UNIFORM_ROWS:
            return self._table_TE[:rows]
        return self._table_TE.repeat(-(-rows // UNIFORM_ROWS), 1)[:rows]


class MoE:
    """Router and gated experts, each expert's intermediate size shared over ranks.

    `normalize`: the chosen experts' weights are scaled to sum to 1. `router`: its name. `bias`:
    router and experts add biases. `grouped`: how experts are chosen where it is not by softmax
    among all. `shared`: intermediate size of an expert that every token goes through besides, with
    biases where `shared_bias`.
    """

    def __init__(
        self,
        build: Build,
        name: str,
        *,
        hidden: int,
        intermediate: int,
        experts: int,
        experts_per_token: int,
        normalize: bool,
        activation: str = "silu",
        router: str = "gate",
        bias: bool = False,
        grouped: Grouped | None = None,
        shared: int = 0,
        shared_bias: bool = False,
    ):
        self.build, self.experts_per_token, self.normalize = build, experts_per_token, normalize
        self.num_experts = experts
        self.router = Linear(build, [f"{name}.{router}"], hidden, [experts], bias=bias)
        sizes = f"{name}.experts", hidden, intermediate, experts, activation
        stacked = build.kernels.dense
        make = StackedExperts if stacked else SeparateExperts
        self.experts: Experts = make(build, *sizes, bias)
        self.grouped, self.correction = grouped, None
        if grouped is not None and grouped.corrected:
            self.correction = Vector(build, f"{name}.{router}.e_score_correction_bias", experts)
        self.shared: GatedMLP | None = None
        if shared:
            of_shared = f"{name}.shared_experts", hidden, shared, activation, shared_bias
            self.shared = GatedMLP(build, *of_shared, reduce=False)
        self._uniform = UniformLogits(build, experts)
        # Each slot's result and its product with the weight; router logits, probabilities in two
        # orders, ids; one expert may get all tokens, stacked ones keep inner values of all slots.
        inner = max(3, experts_per_token if stacked else 0) * intermediate
        build.add_width(2 * experts_per_token * hidden + 5 * experts + inner)

    def after(self, norm: RMSNorm, stream: ResidualStream) -> torch.Tensor:
        """The layer applied to the norm of a stream."""
        normed = self.experts.normed(norm, stream, self.experts_per_token)
        if normed is None:
            logits_TE, x_TH = self.router.beside(norm, stream)
            return self._of(x_TH, logits_TE, x_TH)
        x_TH, tokens = normed
        return self._of(x_TH, self.router(x_TH), tokens)

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self._of(x_TH, self.router(x_TH), x_TH)

    def _of(self, x_TH: torch.Tensor, logits_TE: torch.Tensor, tokens: Any) -> torch.Tensor:
        """`tokens`: x as the experts take it (Experts.normed)."""
        if (shared := self.shared) is None:
            y_TH = self._routed(logits_TE, tokens)
        else:
            shared_TH, y_TH = at_once(
                x_TH, lambda: shared(x_TH), lambda: self._routed(logits_TE, tokens)
            )
            y_TH += shared_TH
        return self.build.group.all_reduce(y_TH)

    def _routed(self, logits_TE: torch.Tensor, tokens: Any) -> torch.Tensor:
        weights_TK, ids_TK = self.choose(logits_TE)
        if self.build.on_experts is not None:
            self.build.on_experts(ids_TK)
        return self.experts(tokens, weights_TK, ids_TK)

    def choose(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights float32 [T, K] and expert ids [T, K], the most probable first."""
        if self.build.moe_routing == "uniform":
            logits_TE = self._uniform(logits_TE)
        kernels, per_token, how = self.build.kernels, self.experts_per_token, self.grouped
        if how is None:
            return kernels.route(logits_TE, per_token, self.normalize)
        correction = None if self.correction is None else self.correction.values
        return kernels.route_groups(
            logits_TE, correction, per_token, how.groups, how.chosen, how.corrected,
            self.normalize, how.scale,
        )  # fmt: skip
