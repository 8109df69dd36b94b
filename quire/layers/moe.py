"""Mixture of experts: each token goes through its top-k experts and their results are summed."""

from __future__ import annotations

import torch

from quire.layers.build import Build
from quire.layers.linear import Linear
from quire.layers.mlp import GatedMLP


class MoE:
    """Softmax router and gated experts.

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
    ):
        self.experts_per_token, self.normalize = experts_per_token, normalize
        self.router = Linear(build, [f"{name}.gate"], hidden, [experts])
        self.experts = [
            GatedMLP(build, f"{name}.experts.{e}", hidden, intermediate) for e in range(experts)
        ]

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        weights_TK, experts_TK = self.route(x_TH)
        y_TKH = torch.empty(*experts_TK.shape, x_TH.shape[1])
        for e in experts_TK.unique().tolist():
            t, k = (experts_TK == e).nonzero(as_tuple=True)
            y_TKH[t, k] = self.experts[e](x_TH[t])
        out_TH = y_TKH[:, 0] * weights_TK[:, :1]
        for k in range(1, self.experts_per_token):
            out_TH += y_TKH[:, k] * weights_TK[:, k : k + 1]
        return out_TH

    def route(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights float32 [T, K] and expert ids int64 [T, K], the most probable first."""
        probabilities_TE = torch.softmax(self.router(x_TH), dim=-1)
        # A stable sort gives ties to the lower expert, whatever else is in the batch.
        ordered, ids = probabilities_TE.sort(dim=-1, descending=True, stable=True)
        weights_TK = ordered[:, : self.experts_per_token]
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK.contiguous(), ids[:, : self.experts_per_token]
