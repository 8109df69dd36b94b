"""Weights of DeepSeek V4 that are neither plain linear layers nor norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, cast

import torch

from quire.errors import ModelError
from quire.formats.layout import FP8_BLOCK
from quire.formats.quantized import QuantTensor
from quire.layers.build import Build, DenseKernels
from quire.layers.linear import pack
from quire.layers.read import read_matrix, to_dense
from quire.weights.source import TensorInfo, WeightSource


class FloatTable:
    """float32 [rows, columns], added to what products give."""

    def __init__(self, build: Build, name: str, rows: int, columns: int):
        self.build, self.name, self.shape = build, name, (rows, columns)
        self.data = torch.empty(0)
        build.add_weight(self)

    def tensors(self) -> list[TensorInfo]:
        return [TensorInfo(self.name, self.shape, "f32")]

    def nbytes(self, formats: Callable[[str], str]) -> int:
        return 4 * prod(self.shape)

    def load(self, source: WeightSource) -> None:
        tensor = source.read(self.name).to(self.build.device)
        self.data = to_dense(tensor, torch.float32, self.name).contiguous()


class IndexTable:
    """int64 [rows, columns] of indices below `limit`. Raises ModelError for any other value."""

    def __init__(self, build: Build, name: str, rows: int, columns: int, limit: int):
        self.build, self.name, self.shape, self.limit = build, name, (rows, columns), limit
        self.data = torch.empty(0, dtype=torch.int64)
        build.add_weight(self)

    def tensors(self) -> list[TensorInfo]:
        return [TensorInfo(self.name, self.shape, "i64")]

    def nbytes(self, formats: Callable[[str], str]) -> int:
        return 8 * prod(self.shape)

    def load(self, source: WeightSource) -> None:
        table = to_dense(source.read(self.name), torch.int64, self.name).contiguous()
        low, high = table.aminmax()
        if not 0 <= int(low) <= int(high) < self.limit:
            raise ModelError(
                "corrupt_tensor",
                f"tensor {self.name!r} has indices from {int(low)} to {int(high)}",
                why=f"they name one of {self.limit}",
                fix="download the model again",
            )
        self.data = table.to(self.build.device)


class ExactMatrix:
    """A matrix [N, K] whose product is computed in float32, whatever the model's dtype."""

    def __init__(self, build: Build, name: str, rows: int, columns: int):
        self.build, self.name, self.shape = build, name, (rows, columns)
        self.packed: Any = None
        build.add_weight(self)

    def tensors(self) -> list[TensorInfo]:
        return [TensorInfo(self.name, self.shape, "f32")]

    def nbytes(self, formats: Callable[[str], str]) -> int:
        return int(self.build.kernels.exact_nbytes(*self.shape))

    def load(self, source: WeightSource) -> None:
        tensor = source.read(self.name).to(self.build.device)
        dense = to_dense(tensor, torch.float32, self.name).contiguous()
        self.packed = self.build.kernels.pack_exact(dense)


class GroupedLinear:
    """A linear layer of each group of the inputs by itself: x [T, G * K] -> [T, G * N]; one weight
    [G * N, K] holds the groups' rows one after another. Groups are shared over ranks. Dense kernels
    have the groups' weights in one stack [G, N, K]."""

    def __init__(self, build: Build, name: str, groups: int, inputs: int, outputs: int):
        self.build, self.name = build, f"{name}.weight"
        self.groups, self.inputs, self.outputs = groups, inputs, outputs
        self._share = build.group.shard(groups, f"groups of {name}")
        self.packed: list[Any] = []
        self.stacked: Any = None
        build.add_weight(self)

    def tensors(self) -> list[TensorInfo]:
        return [TensorInfo(self.name, (self.groups * self.outputs, self.inputs), "bf16")]

    def nbytes(self, formats: Callable[[str], str]) -> int:
        format = formats(self.name)
        each = self.build.kernels.packed_nbytes(format, self.outputs, self.inputs)
        return int(self._share.stop - self._share.start) * int(each)

    def widened(self, formats: Callable[[str], str]) -> dict[str, str]:
        """The reason where the kernels do not take the weight's codes as they are."""
        format = formats(self.name)
        reason = self.build.kernels.why_widened(format, self.inputs)
        if not reason and format == "fp8_block" and self.outputs % FP8_BLOCK:
            reason = f"{self.outputs} rows of a group are not whole blocks of {FP8_BLOCK}"
        return {self.name: reason} if reason else {}

    def load(self, source: WeightSource) -> None:
        layer = "" if self.widened(lambda name: source.info(name).format) else "linear"
        whole = read_matrix(self.build, source, self.name, layer=layer)
        rows = [
            slice(group * self.outputs, (group + 1) * self.outputs)
            for group in range(self._share.start, self._share.stop)
        ]
        parts: list[Any] = [
            whole[part] if isinstance(whole, torch.Tensor) else whole.rows(part) for part in rows
        ]
        if self.build.kernels.dense:
            self.stacked = self._stack(parts)
        else:
            self.packed = [pack(self.build.kernels, part) for part in parts]

    def _stack(self, parts: list[Any]) -> Any:
        kernels = cast(DenseKernels, self.build.kernels)
        stacked = kernels.stack(len(parts), (pack(self.build.kernels, part) for part in parts))
        first = parts[0]
        if isinstance(first, QuantTensor):  # how activations are wanted does not come with a stack
            return replace(stacked, activation=first.activation, input_scale=first.input_scale)
        return stacked

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        if self.stacked is not None:
            return cast(DenseKernels, self.build.kernels).grouped_linear(x_TI, self.stacked)
        linear, inputs = self.build.kernels.linear, self.inputs
        return torch.cat(
            [
                linear(x_TI[:, g * inputs : (g + 1) * inputs], packed)
                for g, packed in enumerate(self.packed)
            ],
            dim=1,
        )
