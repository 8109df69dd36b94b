"""A quantised checkpoint as a source of weights under the names that models ask for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quire.formats.blocks import BlockTensor
from quire.formats.quantized import QuantTensor
from quire.quant.errors import bad_values, contradiction, cut_group, part_mismatch
from quire.quant.names import usually_dense
from quire.quant.parts import COMPANIONS, PRIMARY, Parts
from quire.quant.scheme import Scheme
from quire.quant.storage import Storage
from quire.weights.source import TensorInfo, WeightSource, bounds

# Ends of the names of KV-cache scales, which may be called those of a projection's output.
KV_SCALES = (
    ".k_scale", ".v_scale", ".kv_scale", ".k_proj.output_scale", ".v_proj.output_scale",
)  # fmt: skip
# Scales of what else attention and products give, which is not quantised here.
_OTHER_SCALES = (".q_scale", ".output_scale")
# Companions that may be left over beside an unquantised weight and say nothing of it.
_HARMLESS = (
    "input_scale", "activation_scale", "input_global_scale", "input_scale_ub", "input_zero_point",
    "weight_shape",
)  # fmt: skip


@dataclass(frozen=True)
class _Weight:
    """A quantised weight: `info` as models see it."""

    info: TensorInfo
    storage: Storage
    parts: Parts


class QuantizedSource(WeightSource):
    """`X.weight` in the formats of QuantTensor for what is stored as codes and scales, all other
    tensors as they are. Codes, scales and zero points do not appear under their own names.

    Made from headers alone. ModelError where parts are missing, do not fit together or are not
    what the scheme says; from `read`, where values cannot be right or a slice cuts a group.
    """

    def __init__(self, source: WeightSource, scheme: Scheme):
        self._source, self.scheme = source, scheme
        names = source.names()
        self._kv_scales = [name for name in names if name.endswith(KV_SCALES)]
        hidden = {*self._kv_scales, *(name for name in names if name.endswith(_OTHER_SCALES))}
        self._weights: dict[str, _Weight] = {}
        for parts in _modules(source, names):
            storage = self._storage(parts)
            if storage is None:
                hidden.update(f"{parts.module}.{p}" for p in parts.present if p in _HARMLESS)
                continue
            hidden.update(f"{parts.module}.{part}" for part in parts.present)
            name, shape = f"{parts.module}.weight", storage.open(parts)
            info = TensorInfo(name, shape, storage.layout, stored=parts.nbytes)
            self._weights[name] = _Weight(info, storage, parts)
        self._names = sorted({*(name for name in names if name not in hidden), *self._weights})

    def names(self) -> list[str]:
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        weight = self._weights.get(name)
        return self._source.info(name) if weight is None else weight.info

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor | BlockTensor | QuantTensor:
        weight = self._weights.get(name)
        if weight is None:
            return self._source.read(name, rows, columns)
        height, width = weight.info.shape
        first, last = bounds(rows, height)
        left, right = bounds(columns, width)
        try:
            tensor = weight.storage.read(weight.parts, slice(first, last))
            if (left, right) == (0, width):
                return tensor
            if isinstance(tensor, QuantTensor):
                return tensor.columns(slice(left, right))
            return tensor[:, left:right]
        except ValueError as error:
            if rows is None and columns is None:
                raise part_mismatch(weight.parts.module, str(error)) from None
            raise cut_group(name, str(error)) from None

    def sample(self, name: str) -> bytes:
        weight = self._weights.get(name)
        if weight is None:
            return self._source.sample(name)
        primary = next(part for part in PRIMARY if part in weight.parts.present)
        return self._source.sample(f"{weight.parts.module}.{primary}")

    def fingerprint(self) -> str:
        """Of the stored tensors, and of how they are read."""
        head = f"{self._source.fingerprint()} {self.scheme}"
        return hashlib.blake2b(head.encode(), digest_size=32).hexdigest()

    def kv_scales(self) -> dict[str, torch.Tensor]:
        """The scales for a quantised KV cache by their names, float32, one or one for each head.
        ModelError for one that is not a positive number."""
        found = {}
        for name in self._kv_scales:
            tensor = self._source.read(name)
            assert isinstance(tensor, torch.Tensor)
            values = tensor.float()
            if not ((values > 0) & values.isfinite()).all():
                raise bad_values(name.rpartition(".")[0], f"{name} is {tensor.tolist()}")
            found[name] = values
        return found

    def close(self) -> None:
        self._source.close()

    def make_on(self, device: torch.device) -> None:
        self._source.make_on(device)

    def _storage(self, parts: Parts) -> Storage | None:
        """How a module's weight is stored, by the scheme and by what is there."""
        expected = self.scheme.find(parts.module)
        if _is_quantized(parts):
            if expected is None and not self.scheme.ignored(parts.module):
                expected = self.scheme.storage_of(parts.module)
            if expected is None:
                raise contradiction(
                    parts.module, "it is quantised, and the config says that it is not"
                )
            return expected
        if expected is None or usually_dense(parts.module) or not _is_matrix(parts):
            return None
        raise contradiction(
            parts.module,
            f"the config says {expected.format}, and it is {parts.info('weight').format}"
            if "weight" in parts.present
            else "its weight is missing",
        )


def _modules(source: WeightSource, names: list[str]) -> Iterator[Parts]:
    """The modules that have a weight, or a part of a quantised one."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name in names:
        module, _, last = name.rpartition(".")
        if module and last in (*PRIMARY, *COMPANIONS):
            found.setdefault(module, {})[last] = source.info(name)
    for module, present in found.items():
        if not present.keys().isdisjoint(PRIMARY):
            yield Parts(source, module, present)


def _is_quantized(parts: Parts) -> bool:
    if parts.present.keys() - {"weight", *_HARMLESS}:
        return True
    return "weight" in parts.present and parts.info("weight").format.startswith(("f8_", "u8", "i8"))


def _is_matrix(parts: Parts) -> bool:
    return "weight" not in parts.present or len(parts.info("weight").shape) == 2
