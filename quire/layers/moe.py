"""Mixture of experts: each token goes through its top-k experts and their results are summed."""

from __future__ import annotations

import torch

from quire.layers.build import Build
from quire.layers.linear import Linear
from quire.layers.mlp import GatedMLP


class MoE:
    """Softmax router and gated experts, each expert's intermediate size shared over ranks.

    A token's results are summed in the order of its top-k slots, and every expert's products are
    independent of how many tokens it gets, so a token's bits do not depend on the others.
    `normalize`: the chosen experts' weights are scaled to sum to 1.
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
    ):
        self.experts_per_token, self.normalize = experts_per_token, normalize
        self.group = build.group
        self.router = Linear(build, [f"{name}.gate"], hidden, [experts])
        self.experts = [
            GatedMLP(build, f"{name}.experts.{e}", hidden, intermediate, activation, reduce=False)
            for e in range(experts)
        ]
        # Each slot's result and its product with the weight; router logits, probabilities in two
        # orders, ids; one expert may get all tokens.
        build.add_width(2 * experts_per_token * hidden + 5 * experts + 3 * intermediate)

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        weights_TK, experts_TK = self.route(x_TH)
        y_TKH = self._one(x_TH, experts_TK) if len(x_TH) == 1 else self._many(x_TH, experts_TK)
        y_TKH *= weights_TK[:, :, None]
        out_TH = y_TKH[:, 0].clone()
        for k in range(1, self.experts_per_token):
            out_TH += y_TKH[:, k]
        return self.group.all_reduce(out_TH)

    def route(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights float32 [T, K] and expert ids int64 [T, K], the most probable first."""
        probabilities_TE = torch.softmax(self.router(x_TH), dim=-1)
        # A stable sort gives ties to the lower expert, whatever else is in the batch.
        ordered, ids = probabilities_TE.sort(dim=-1, descending=True, stable=True)
        weights_TK = ordered[:, : self.experts_per_token]
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK.contiguous(), ids[:, : self.experts_per_token].contiguous()

    def _one(self, x_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """The experts' results [1, K, H], without the gathering that many tokens need."""
        return torch.stack([self.experts[e](x_TH) for e in experts_TK[0].tolist()], dim=1)

    def _many(self, x_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """The experts' results [T, K, H], expert by expert."""
        chosen = experts_TK.flatten()
        order, counts = chosen.argsort(stable=True), chosen.bincount().tolist()
        y = torch.empty(len(chosen), x_TH.shape[1])
        start = 0
        for expert, count in enumerate(counts):
            if count:
                rows = order[start : start + count]
                y[rows] = self.experts[expert](x_TH[rows // self.experts_per_token])
                start += count
        return y.view(*experts_TK.shape, -1)
