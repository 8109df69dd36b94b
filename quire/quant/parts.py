"""The stored tensors that together are one quantised weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quire.quant.errors import part_mismatch, part_missing
from quire.weights.source import TensorInfo, WeightSource

# What stands for the weight itself, and what comes with it, by the last part of tensor names.
PRIMARY = ("weight", "weight_packed", "qweight")
COMPANIONS = (
    "weight_scale", "weight_scale_inv", "scale", "weight_scale_2", "weight_global_scale",
    "weight_zero_point", "weight_shape", "weight_g_idx", "scales", "qzeros", "g_idx",
    "input_scale", "activation_scale", "input_global_scale", "input_scale_ub", "input_zero_point",
)  # fmt: skip
FLOATS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Parts:
    """The tensors of `module` in a source: `present` are those by the last part of their names."""

    source: WeightSource
    module: str
    present: Mapping[str, TensorInfo]

    def info(self, part: str) -> TensorInfo:
        return self.present[part]

    def first(self, *names: str) -> str | None:
        """The first of these parts that is there."""
        for name in names:
            if name in self.present:
                return name
        return None

    def need(self, *names: str, formats: tuple[str, ...], dimensions: int | None = None) -> str:
        """The first of these parts that is there. Raises ModelError where there is none, or where
        it has another format or number of dimensions."""
        name = self.first(*names)
        if name is None:
            raise part_missing(self.module, names)
        info = self.info(name)
        if info.format not in formats:
            raise part_mismatch(
                self.module, f"{name} is {info.format}, {' or '.join(formats)} is needed"
            )
        if dimensions is not None and len(info.shape) != dimensions:
            raise part_mismatch(
                self.module, f"{name} has shape {list(info.shape)}, of {dimensions} dimensions"
            )
        return name

    def expect(self, name: str, *shapes: tuple[int, ...]) -> None:
        """Raises ModelError unless a part has one of these shapes."""
        found = self.info(name).shape
        if found not in shapes:
            raise part_mismatch(
                self.module,
                f"{name} has shape {list(found)}, {' or '.join(map(str, map(list, shapes)))} "
                "is needed",
            )

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        tensor = self.source.read(f"{self.module}.{name}", rows, columns)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def read_scalar(self, name: str) -> torch.Tensor:
        """A part of one value, float32 of no dimension."""
        return self.read(name).float().reshape(())

    @property
    def doubtful(self) -> bool:
        """Whether values can be wrong; to look at those that a device makes is to wait for it."""
        return not self.source.made

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.present.values())
