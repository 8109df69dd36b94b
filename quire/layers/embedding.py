"""Token embedding and the output head, which may be one and the same weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quire.formats.layout import is_quantized
from quire.layers.build import Build
from quire.layers.linear import Linear, pack
from quire.layers.read import read_matrix
from quire.weights.source import TensorInfo, WeightSource


class Embedding:
    """Rows of a [V, H] table, times `scale` rounded to the table's dtype, as Hugging Face does.
    Replicated on every rank."""

    def __init__(self, build: Build, name: str, vocab_size: int, hidden: int, scale: float = 1.0):
        self.build, self.kernels = build, build.kernels
        self.name, self.shape, self.scale = f"{name}.weight", (vocab_size, hidden), scale
        self.packed: Any = None
        build.add_weight(self)

    def tensors(self) -> list[TensorInfo]:
        return [TensorInfo(self.name, self.shape, "bf16")]

    def nbytes(self, formats: Callable[[str], str]) -> int:
        return self.kernels.packed_nbytes(formats(self.name), *self.shape)

    def widened(self, formats: Callable[[str], str]) -> dict[str, str]:
        """The reason where the table is stored as codes: kernels read rows of dense ones."""
        format = formats(self.name)
        reason = f"embeddings are read in the model's dtype, not {format}"
        return {self.name: reason} if is_quantized(format) else {}

    def load(self, source: WeightSource) -> None:
        tensor = read_matrix(self.build, source, self.name, layer="")
        if isinstance(tensor, torch.Tensor):
            self.scale = float(torch.tensor(self.scale).to(tensor.dtype))
        self.packed = pack(self.kernels, tensor)

    def __call__(self, tokens_T: torch.Tensor) -> torch.Tensor:
        return self.kernels.embedding(tokens_T, self.packed, self.scale)


class TiedHead:
    """Logits from the embedding table: x [T, H] -> [T, V]."""

    def __init__(self, embedding: Embedding):
        self.embedding = embedding

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.embedding.kernels.linear(x_TH, self.embedding.packed)


class Head:
    """Logits from a weight of its own, its vocabulary shared over ranks where it divides."""

    def __init__(self, build: Build, name: str, vocab_size: int, hidden: int):
        self.group = build.group
        divides = vocab_size % self.group.size == 0
        self.linear = Linear(
            build, [name], hidden, [vocab_size], shard="outputs" if divides else None
        )

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        logits_TN = self.linear(x_TH)
        if self.linear.shard is None:
            return logits_TN
        return self.group.all_gather_columns(logits_TN)
