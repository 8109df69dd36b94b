"""Linear layers: y = x W^T + b, several checkpoint tensors merged into one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from quire.formats import quantized
from quire.formats.blocks import BlockTensor, concatenate_rows
from quire.formats.quantized import QuantTensor
from quire.kernels.reference.packed import PackedWeight
from quire.layers.build import Build, DenseKernels, Kernels
from quire.layers.norm import ResidualStream, RMSNorm
from quire.layers.read import read_matrix, read_vector
from quire.weights.source import TensorInfo, WeightSource

Matrix = torch.Tensor | BlockTensor | QuantTensor


def pack(kernels: Kernels, tensor: Matrix) -> Any:
    """The kernels' own form of a weight [N, K]."""
    if isinstance(tensor, BlockTensor):
        return kernels.pack((tensor.format, tensor.data, *tensor.shape))
    return kernels.pack(tensor)


class Linear:
    """Rows of one or more weights [N_i, in] applied together: x [T, in] -> [T, sum N_i].

    `shard` "outputs": each rank holds a share of every N_i and gives its columns; "inputs": each
    holds a share of the input features and the results are summed over ranks, unless `reduce` is
    False and the caller does it; None: replicated. Parts that share a format are packed into one
    weight; others follow each other.
    """

    def __init__(
        self,
        build: Build,
        names: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        bias: bool = False,
        shard: str | None = None,
        reduce: bool = True,
    ):
        self.build, self.kernels, self.group = build, build.kernels, build.group
        self.reduce = reduce and shard == "inputs"
        self.names, self.bias_wanted, self.shard = tuple(names), bias, shard
        self.in_features, self.out_features = in_features, tuple(out_features)
        self._whole = slice(0, in_features)
        self._columns = self.group.shard(in_features, names[0]) if shard == "inputs" else None
        self._rows = [
            self.group.shard(n, name) if shard == "outputs" else slice(0, n)
            for name, n in zip(names, out_features, strict=True)
        ]
        self.local_out = sum(r.stop - r.start for r in self._rows)
        self._parts: list[tuple[Any, int]] = []
        self._bias: torch.Tensor | None = None
        build.add_weight(self)

    def tensors(self) -> list[TensorInfo]:
        infos = []
        for name, n in zip(self.names, self.out_features, strict=True):
            infos.append(TensorInfo(f"{name}.weight", (n, self.in_features), "bf16"))
            if self.bias_wanted:
                infos.append(TensorInfo(f"{name}.bias", (n,), "bf16"))
        return infos

    def nbytes(self, formats: Callable[[str], str]) -> int:
        columns = self._columns or self._whole
        total = 0
        for name, rows in zip(self.names, self._rows, strict=True):
            n = rows.stop - rows.start
            total += self.kernels.packed_nbytes(
                formats(f"{name}.weight"), n, columns.stop - columns.start
            )
            total += 4 * n if self.bias_wanted else 0
        return total

    def widened(self, formats: Callable[[str], str]) -> dict[str, str]:
        """The weights whose codes the kernels do not take as they are, with the reason."""
        columns = self._columns or self._whole
        width = columns.stop - columns.start
        names = [f"{name}.weight" for name in self.names]
        reasons = {name: self.kernels.why_widened(formats(name), width) for name in names}
        return {name: reason for name, reason in reasons.items() if reason}

    def values(self) -> int:
        """Values of this rank's share."""
        columns = self._columns or self._whole
        return int(self.local_out * (columns.stop - columns.start))

    def load(self, source: WeightSource) -> None:
        tensors = [
            read_matrix(self.build, source, f"{name}.weight", rows, self._columns)
            for name, rows in zip(self.names, self._rows, strict=True)
        ]
        self._parts = [(pack(self.kernels, t), n) for t, n in merge(tensors)]
        if self.bias_wanted:
            biases = [
                read_vector(self.build, source, f"{name}.bias", rows)
                for name, rows in zip(self.names, self._rows, strict=True)
            ]
            self._bias = torch.cat(biases)
            if self.shard == "inputs" and self.group.rank > 0:
                self._bias.zero_()

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        if len(self._parts) == 1:
            y_TN = self.kernels.linear(x_TH, self._parts[0][0], self._bias)
        else:
            y_TN = x_TH.new_empty(x_TH.shape[0], self.local_out)
            self._multiply(x_TH, y_TN)
        return self.group.all_reduce(y_TN) if self.reduce else y_TN

    def exact(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The product in float32, whatever the model's dtype: sums are not rounded to it."""
        if not self.kernels.dense:  # the CPU's results are float32
            return self(x_TH)
        y_TN = x_TH.new_empty((x_TH.shape[0], self.local_out), dtype=torch.float32)
        self._multiply(x_TH, y_TN)
        return self.group.all_reduce(y_TN) if self.reduce else y_TN

    def _multiply(self, x_TH: torch.Tensor, y_TN: torch.Tensor) -> None:
        """The product, part by part."""
        start = 0
        for packed, n in self._parts:
            bias = None if self._bias is None else self._bias[start : start + n]
            self.kernels.linear(x_TH, packed, bias, out=y_TN[:, start : start + n])
            start += n

    def after(
        self,
        norm: RMSNorm,
        stream: ResidualStream,
        activation: str = "",
        then: Linear | None = None,
        limit: float = 0.0,
    ) -> torch.Tensor:
        """The product with the norm of a stream, gated where an `activation` is named; what is
        gated is for the layer `then`, as in `gated`."""
        if self.kernels.dense and len(self._parts) == 1:
            only = None if then is None else then.only
            return self._add_norm(norm, stream, activation, only, limit=limit)
        x_TH = norm.read(stream)
        return self.gated(x_TH, activation, then, limit) if activation else self(x_TH)

    def gated(
        self,
        x_TH: torch.Tensor,
        activation: str,
        then: Linear | None = None,
        limit: float = 0.0,
    ) -> torch.Tensor:
        """activation(first half of the outputs) * second half; with a `limit` above 0 the first is
        clamped from above and the second from both sides before. Dense kernels may give it in the
        form in which the layer `then` takes it fastest, as nothing else can."""
        if len(self._parts) > 1:
            return self.kernels.gated_activation(self(x_TH), activation, limit=limit)
        given = x_TH, self._parts[0][0], self._bias, activation
        if self.kernels.dense and then is not None:
            kernels = cast(DenseKernels, self.kernels)
            return cast(torch.Tensor, kernels.gated_linear(*given, then.only, limit=limit))
        return self.kernels.gated_linear(*given, limit=limit)

    def beside(self, norm: RMSNorm, stream: ResidualStream) -> tuple[torch.Tensor, torch.Tensor]:
        """(the product with the norm of a stream, the norm itself), in one kernel where that can
        be."""
        if not (self.kernels.dense and isinstance(self.only, PackedWeight)):
            x_TH = norm.read(stream)
            return self(x_TH), x_TH
        normed_TH = torch.empty_like(stream.value)
        return self._add_norm(norm, stream, "", None, normed_TH), normed_TH

    def _add_norm(
        self, norm: RMSNorm, stream: ResidualStream, *more: Any, limit: float = 0.0
    ) -> torch.Tensor:
        """Read a stream through the one weight: the dense kernels' add_norm_linear."""
        y_TN, stream.value = cast(DenseKernels, self.kernels).add_norm_linear(
            stream.pending, stream.value, norm.weight, norm.eps, self.only, self._bias, *more,
            limit=limit,
        )  # fmt: skip
        stream.pending = None
        return cast(torch.Tensor, y_TN)

    @property
    def only(self) -> Any:
        """The packed weight where it is one."""
        return self._parts[0][0] if len(self._parts) == 1 else None


def merge(tensors: list[Matrix]) -> list[tuple[Matrix, int]]:
    """Neighbours of one format concatenated along rows, each with its number of rows."""
    merged: list[tuple[Matrix, int]] = []
    for item in tensors:
        rows = int(item.shape[0])
        last, n = merged[-1] if merged else (None, 0)
        joined = None if last is None else _join(last, item)
        if joined is None:
            merged.append((item, rows))
        else:
            merged[-1] = (joined, n + rows)
    return merged


def _join(first: Matrix, second: Matrix) -> Matrix | None:
    """Rows of both, None where they cannot be one matrix."""
    if isinstance(first, QuantTensor) and isinstance(second, QuantTensor):
        try:
            return quantized.concatenate_rows([first, second])
        except ValueError:  # other formats, groups or activation scales, or a cut block
            return None
    if isinstance(first, BlockTensor) and isinstance(second, BlockTensor):
        return concatenate_rows([first, second]) if first.format == second.format else None
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.cat([first, second]) if first.dtype == second.dtype else None
    return None
