"""A source whose tensors go by other names, some of them left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from quire.errors import ModelError
from quire.formats.blocks import BlockTensor
from quire.formats.quantized import QuantTensor
from quire.weights.source import TensorInfo, WeightSource, missing_tensor


class RenamedSource(WeightSource):
    """The tensors of `source` under the names that `rename` gives for theirs; None leaves one out.

    Raises ModelError where two would have the same name.
    """

    def __init__(self, source: WeightSource, rename: Callable[[str], str | None]):
        self._source = source
        self._stored: dict[str, str] = {}
        for stored in source.names():
            name = rename(stored)
            if name is None:
                continue
            if name in self._stored:
                raise ModelError(
                    "tensor_twice",
                    f"the checkpoint has {name!r} twice",
                    why=f"as {self._stored[name]!r} and as {stored!r}",
                    fix="download the model again",
                )
            self._stored[name] = stored

    def names(self) -> list[str]:
        return sorted(self._stored)

    def info(self, name: str) -> TensorInfo:
        return replace(self._source.info(self._find(name)), name=name)

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor | BlockTensor | QuantTensor:
        return self._source.read(self._find(name), rows, columns)

    def sample(self, name: str) -> bytes:
        return self._source.sample(self._find(name))

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def close(self) -> None:
        self._source.close()

    def make_on(self, device: torch.device) -> None:
        self._source.make_on(device)

    def _find(self, name: str) -> str:
        if name not in self._stored:
            raise missing_tensor(name, "the checkpoint")
        return self._stored[name]
