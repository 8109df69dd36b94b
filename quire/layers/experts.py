"""The experts of one layer: as separate feed-forward layers, or stacked for grouped products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, cast

import torch

from quire.formats.layout import FP8_BLOCK, INTEGER_FORMATS, is_quantized
from quire.formats.quantized import QuantTensor
from quire.layers.build import Build, DenseKernels
from quire.layers.linear import merge
from quire.layers.mlp import PARTS, GatedMLP
from quire.layers.norm import ResidualStream, RMSNorm
from quire.layers.read import read_matrix, read_vector
from quire.quant.errors import part_mismatch
from quire.weights.source import TensorInfo, WeightSource

# QuantTensor's `activation` and `input_scale`.
Activation = tuple[str, torch.Tensor | None]


class Experts(Protocol):
    """x [T, H] through each token's experts: weights float32 [T, K], ids [T, K] -> [T, H].

    A token's results are summed in the order of its K slots, and every expert's products are
    independent of how many tokens it gets, so a token's bits do not depend on the others. Where
    experts are shared over ranks, the result is this rank's part of the sum.
    """

    def __call__(
        self, x_TH: Any, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor: ...

    def normed(
        self, norm: RMSNorm, stream: ResidualStream, slots: int
    ) -> tuple[torch.Tensor, Any] | None:
        """The norm [T, H] of a stream, and the same in the form in which these experts take it
        fastest with `slots` of them for each token; None, and the stream is not read, where they
        take the norm as it is."""
        ...


class SeparateExperts:
    """Expert by expert, each with its own weights in any format; `parts` and `limit` as in
    GatedMLP."""

    def __init__(
        self,
        build: Build,
        name: str,
        hidden: int,
        intermediate: int,
        experts: int,
        activation: str,
        bias: bool = False,
        parts: tuple[str, str, str] = PARTS,
        limit: float = 0.0,
    ):
        sizes = hidden, intermediate, activation, bias
        self.experts: Sequence[Callable[[torch.Tensor], torch.Tensor]] = [
            GatedMLP(build, f"{name}.{e}", *sizes, reduce=False, parts=parts, limit=limit)
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

    def normed(self, norm: RMSNorm, stream: ResidualStream, slots: int) -> None:
        return None

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
    """All experts in two weights, [E, 2 I, H] with gate before up, and [E, H, I], dense or as
    codes; the intermediate size I is shared over ranks. `bias`: each projection adds one. `parts`
    and `limit` as in GatedMLP."""

    def __init__(
        self,
        build: Build,
        name: str,
        hidden: int,
        intermediate: int,
        experts: int,
        activation: str,
        bias: bool = False,
        parts: tuple[str, str, str] = PARTS,
        limit: float = 0.0,
    ):
        self.build, self.activation, self.bias = build, activation, bias
        self.parts, self.limit = parts, limit
        self.kernels = cast(DenseKernels, build.kernels)
        self.names = [f"{name}.{e}" for e in range(experts)]
        self.hidden, self.intermediate = hidden, intermediate
        self._share = build.group.shard(intermediate, f"intermediate size of {name}")
        self.gate_up_EIH: Any = None
        self.down_EHI: Any = None
        self.gate_up_bias_EI: torch.Tensor | None = None
        self.down_bias_EH: torch.Tensor | None = None
        build.add_weight(self)

    def tensors(self) -> list[TensorInfo]:
        return list(self._tensors)

    @cached_property
    def _tensors(self) -> list[TensorInfo]:
        wide, narrow = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        infos = []
        for name in self.names:
            for part in self.parts:
                shape = narrow if part == self.parts[2] else wide
                infos.append(TensorInfo(f"{name}.{part}.weight", shape, "bf16"))
                if self.bias:
                    infos.append(TensorInfo(f"{name}.{part}.bias", shape[:1], "bf16"))
        return infos

    def nbytes(self, formats: Callable[[str], str]) -> int:
        share = self._share.stop - self._share.start
        total = 4 * (2 * share + self.hidden) * len(self.names) if self.bias else 0
        end = f".{self.parts[2]}.weight"
        kinds = Counter((formats(i.name), i.name.endswith(end)) for i in self._matrices)
        for (format, down), count in kinds.items():
            shape = (self.hidden, share) if down else (share, self.hidden)
            total += count * self.build.kernels.packed_nbytes(format, *shape)
        return total

    def widened(self, formats: Callable[[str], str]) -> dict[str, str]:
        """All matrices with the reason, where the kernels do not take their codes as they are."""
        found = {formats(info.name) for info in self._matrices}
        share = self._share.stop - self._share.start
        reason = next(filter(None, (self._why_widened(name, share) for name in sorted(found))), "")
        if len(found) > 1 and any(map(is_quantized, found)):
            reason = reason or f"experts of one layer are {' and '.join(sorted(found))}"
        if not reason:
            return {}
        return {i.name: reason for i in self._matrices if is_quantized(formats(i.name))}

    def load(self, source: WeightSource) -> None:
        experts = range(len(self.names))
        gate_name, up_name, down_name = self.parts
        # Of gate and up, and of down.
        activations: tuple[list[Activation], list[Activation]] = ([], [])
        layer = "" if self.widened(lambda name: source.info(name).format) else "experts"

        def read(expert: int, part: str) -> Any:
            rows, columns = (None, self._share) if part == down_name else (self._share, None)
            name = f"{self.names[expert]}.{part}.weight"
            tensor = read_matrix(self.build, source, name, rows, columns, layer)
            if not isinstance(tensor, QuantTensor):
                return tensor
            activations[part == down_name].append((tensor.activation, tensor.input_scale))
            return _alike(tensor)

        def gate_up(expert: int) -> Any:
            merged = merge([read(expert, gate_name), read(expert, up_name)])
            if len(merged) > 1:
                raise ValueError(f"gate and up of {self.names[expert]} are stored differently")
            return merged[0][0]

        def down(expert: int) -> Any:
            return read(expert, down_name)

        try:
            gate_ups = self.kernels.pack_experts(len(experts), map(gate_up, experts))
            self.gate_up_EIH = _with_activation(gate_ups, activations[False])
            downs = self.kernels.pack_experts(len(experts), map(down, experts))
            self.down_EHI = _with_activation(downs, activations[True])
        except ValueError as error:
            raise part_mismatch(self.names[0], str(error)) from None
        if self.bias:
            self._load_biases(source)

    def normed(
        self, norm: RMSNorm, stream: ResidualStream, slots: int
    ) -> tuple[torch.Tensor, Any] | None:
        found = self.kernels.norm_for_experts(
            stream.pending, stream.value, norm.weight, norm.eps, self.gate_up_EIH, self.down_EHI,
            slots,
        )  # fmt: skip
        if found is not None:
            stream.pending = None
        return found

    def __call__(self, x_TH: Any, weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        return self.kernels.experts(
            x_TH, weights_TK, ids_TK, self.gate_up_EIH, self.down_EHI, self.activation,
            self.gate_up_bias_EI, self.down_bias_EH, limit=self.limit,
        )  # fmt: skip

    @cached_property
    def _matrices(self) -> list[TensorInfo]:
        return [info for info in self._tensors if len(info.shape) == 2]

    def _why_widened(self, format: str, share: int) -> str:
        """Of the down projection, whose columns are shared, and then of gate and up."""
        why = self.build.kernels.why_widened
        reason = why(format, share, "experts") or why(format, self.hidden, "experts")
        if not reason and format == "fp8_block" and share % FP8_BLOCK:
            return f"{share} rows of gate and up are not whole blocks of {FP8_BLOCK}"
        return str(reason)

    def _load_biases(self, source: WeightSource) -> None:
        def read(part: str, rows: slice | None = None) -> torch.Tensor:
            names = [f"{name}.{part}.bias" for name in self.names]
            return torch.stack([read_vector(self.build, source, name, rows) for name in names])

        gate_name, up_name, down_name = self.parts
        gate, up = read(gate_name, self._share), read(up_name, self._share)
        self.gate_up_bias_EI = torch.cat([gate, up], dim=1)
        self.down_bias_EH = read(down_name)
        if self.build.group.rank > 0:  # ranks' results are summed
            self.down_bias_EH.zero_()


def _alike(tensor: QuantTensor) -> QuantTensor:
    """What experts of a layer may differ in is taken out: scales of activations, which come back
    for all in _with_activation, and zero points that some write although they are in the middle."""
    zeros = tensor.zeros
    if zeros is None and tensor.format in INTEGER_FORMATS:
        middle = 8 if tensor.format == "int4" else 128
        zeros = torch.full(tensor.scales.shape, middle, dtype=torch.uint8, device=tensor.device)
    if tensor.activation == "none" and zeros is tensor.zeros:
        return tensor
    return replace(tensor, activation="none", input_scale=None, zeros=zeros)


def _with_activation(stacked: Any, found: list[Activation]) -> Any:
    """The stack with how its matrices want activations, "none" where they differ. Tokens are
    quantised once for all experts: of static scales they get the largest, whose range has all."""
    kinds = {kind for kind, _ in found}
    if len(kinds) != 1:
        return stacked
    scales = [scale for _, scale in found if scale is not None]
    largest = torch.stack(scales).amax() if scales else None
    return replace(stacked, activation=kinds.pop(), input_scale=largest)
