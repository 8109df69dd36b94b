"""Experts that a checkpoint keeps in one tensor, under the names of single experts (gpt-oss)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from quire.formats.blocks import BlockTensor
from quire.formats.quantized import QuantTensor
from quire.weights.source import TensorInfo, WeightSource, bounds

EXPERTS = ".experts."


@dataclass(frozen=True)
class _Stored:
    """A kind of fused tensor: `last` part of the single expert's name, `dimensions` of the fused
    one. `transposed`: it is [E, in, out]; else rows are the second dimension."""

    last: str
    dimensions: int
    transposed: bool = False


# By the end of the fused name after gate_up_proj or down_proj. Blocks are 16 bytes of 32 values.
KINDS = {
    "": _Stored("weight", 3, transposed=True),
    "_bias": _Stored("bias", 2),
    "_blocks": _Stored("weight_packed", 4),
    "_scales": _Stored("weight_scale", 3),
}


@dataclass(frozen=True)
class _View:
    """One expert's part of the tensor `stored`. `first` and `step`: its rows among the fused ones,
    where gate and up alternate."""

    info: TensorInfo
    stored: str
    kind: _Stored
    expert: int
    first: int
    step: int

    def take(self, fused: torch.Tensor) -> torch.Tensor:
        """From the expert's fused tensor (without the dimension of experts) to this part."""
        rows = fused.T if self.kind.transposed else fused
        return rows[self.first :: self.step].reshape(self.info.shape)


class FusedExperts(WeightSource):
    """`X.experts.gate_up_proj` and `X.experts.down_proj` of gpt-oss as `X.experts.E.gate_proj`,
    `up_proj` and `down_proj`, each with weight and bias, or in MXFP4 with codes and scales. Rows of
    gate and up alternate in the fused tensors. Only tensors of the modules `X.experts` in
    `modules`, and of as many experts as `experts`, are taken apart: a file's header, which may
    claim any number, does not decide what that takes. All others stay as they are."""

    def __init__(self, source: WeightSource, modules: Collection[str], experts: int):
        self._source = source
        self._views: dict[str, _View] = {}
        kept = []
        for name in source.names():
            info = source.info(name)
            known = name.rpartition(".")[0] in modules and info.shape[:1] == (experts,)
            views = _split(info) if known else []
            self._views |= {view.info.name: view for view in views}
            kept += [] if views else [name]
        self._names = sorted([*kept, *self._views])

    def names(self) -> list[str]:
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        view = self._views.get(name)
        return self._source.info(name) if view is None else view.info

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor | BlockTensor | QuantTensor:
        view = self._views.get(name)
        if view is None:
            return self._source.read(name, rows, columns)
        fused = self._source.read(view.stored, slice(view.expert, view.expert + 1))
        assert isinstance(fused, torch.Tensor)
        part = view.take(fused[0])[slice(*bounds(rows, view.info.shape[0]))]
        if columns is not None:
            part = part[:, slice(*bounds(columns, view.info.shape[-1]))]
        return part

    def sample(self, name: str) -> bytes:
        view = self._views.get(name)
        return self._source.sample(name if view is None else view.stored)

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def close(self) -> None:
        self._source.close()

    def make_on(self, device: torch.device) -> None:
        self._source.make_on(device)


def _split(info: TensorInfo) -> list[_View]:
    """The views of a fused tensor; none of another."""
    head, found, tail = info.name.rpartition(EXPERTS)
    for projection in ("gate_up_proj", "down_proj"):
        kind = KINDS.get(tail.removeprefix(projection)) if tail.startswith(projection) else None
        if found and kind is not None and len(info.shape) == kind.dimensions:
            parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
            if _rows(info.shape, kind) % len(parts):
                return []
            return [
                _view(info, kind, f"{head}{EXPERTS}{expert}.{part}", expert, first, len(parts))
                for expert in range(info.shape[0])
                for first, part in enumerate(parts)
            ]
    return []


def _rows(shape: tuple[int, ...], kind: _Stored) -> int:
    return shape[2] if kind.transposed else shape[1]


def _view(
    info: TensorInfo, kind: _Stored, module: str, expert: int, first: int, step: int
) -> _View:
    rows = _rows(info.shape, kind) // step
    rest = info.shape[1:2] if kind.transposed else info.shape[2:]
    width = 1
    for size in rest:
        width *= size
    shape = (rows, width) if rest else (rows,)
    single = TensorInfo(f"{module}.{kind.last}", shape, info.format)
    return _View(single, info.name, kind, expert, first, step)
