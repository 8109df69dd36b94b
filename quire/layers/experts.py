"""The experts of one layer: as separate feed-forward layers, or stacked for grouped products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch

from quire.layers.build import Build, DenseKernels
from quire.layers.mlp import GatedMLP
from quire.layers.read import read_matrix
from quire.weights.source import TensorInfo, WeightSource


class Experts(Protocol):
    """x [T, H] through each token's experts: weights float32 [T, K], ids [T, K] -> [T, H].

    A token's results are summed in the order of its K slots, and every expert's products are
    independent of how many tokens it gets, so a token's bits do not depend on the others. Where
    experts are shared over ranks, the result is this rank's part of the sum.
    """

    def __call__(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor: ...


class SeparateExperts:
    """Expert by expert, each with its own weights in any format."""

    def __init__(
        self,
        build: Build,
        name: str,
        hidden: int,
        intermediate: int,
        experts: int,
        activation: str,
        bias: bool = False,
    ):
        self.experts = [
            GatedMLP(build, f"{name}.{e}", hidden, intermediate, activation, bias, reduce=False)
            for e in range(experts)
        ]

    def __call__(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        y_TKH = self._one(x_TH, ids_TK) if len(x_TH) == 1 else self._many(x_TH, ids_TK)
        y_TKH *= weights_TK[:, :, None]
        out_TH = y_TKH[:, 0].clone()
        for k in range(1, ids_TK.shape[1]):
            out_TH += y_TKH[:, k]
        return out_TH

    def _one(self, x_TH: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        """The experts' results [1, K, H], without the gathering that many tokens need."""
        return torch.stack([self.experts[e](x_TH) for e in ids_TK[0].tolist()], dim=1)

    def _many(self, x_TH: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        """The experts' results [T, K, H], expert by expert."""
        chosen = ids_TK.flatten()
        order, counts = chosen.argsort(stable=True), chosen.bincount().tolist()
        y = torch.empty(len(chosen), x_TH.shape[1])
        start = 0
        for expert, count in enumerate(counts):
            if count:
                rows = order[start : start + count]
                y[rows] = self.experts[expert](x_TH[rows // ids_TK.shape[1]])
                start += count
        return y.view(*ids_TK.shape, -1)


class StackedExperts:
    """All experts in two tensors, [E, 2 I, H] with gate before up, and [E, H, I]; the
    intermediate size I is shared over ranks."""

    def __init__(
        self,
        build: Build,
        name: str,
        hidden: int,
        intermediate: int,
        experts: int,
        activation: str,
    ):
        self.build, self.activation = build, activation
        self.kernels = cast(DenseKernels, build.kernels)
        self.names = [f"{name}.{e}" for e in range(experts)]
        self.hidden, self.intermediate = hidden, intermediate
        self._share = build.group.shard(intermediate, f"intermediate size of {name}")
        self.gate_up_EIH = self.down_EHI = torch.empty(0)
        build.add_weight(self)

    def tensors(self) -> list[TensorInfo]:
        wide, narrow = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        return [
            TensorInfo(f"{name}.{part}_proj.weight", narrow if part == "down" else wide, "bf16")
            for name in self.names
            for part in ("gate", "up", "down")
        ]

    def nbytes(self, formats: Callable[[str], str]) -> int:
        share = self._share.stop - self._share.start
        return sum(
            self.build.kernels.packed_nbytes(formats(info.name), share, self.hidden)
            for info in self.tensors()
        )

    def load(self, source: WeightSource) -> None:
        experts, share = len(self.names), self._share.stop - self._share.start
        kept = self.kernels.quantized_experts
        for e, name in enumerate(self.names):
            gate, up, down = (
                read_matrix(self.build, source, f"{name}.{part}_proj.weight", rows, columns, kept)
                for part, rows, columns in (
                    ("gate", self._share, None),
                    ("up", self._share, None),
                    ("down", None, self._share),
                )
            )
            assert isinstance(gate, torch.Tensor) and isinstance(down, torch.Tensor)
            assert isinstance(up, torch.Tensor)
            if e == 0:
                self.gate_up_EIH = gate.new_empty(experts, 2 * share, self.hidden)
                self.down_EHI = gate.new_empty(experts, self.hidden, share)
            self.gate_up_EIH[e, :share] = gate
            self.gate_up_EIH[e, share:] = up
            self.down_EHI[e] = down

    def __call__(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        return self.kernels.experts(
            x_TH, weights_TK, ids_TK, self.gate_up_EIH, self.down_EHI, self.activation
        )
