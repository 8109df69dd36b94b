"""Quantisation while loading: weights of an unquantised checkpoint are encoded as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from quire.errors import UsageError
from quire.formats.blocks import BlockTensor
from quire.formats.layout import QUANT_FORMATS
from quire.formats.quantized import QuantTensor, concatenate_rows
from quire.formats.scaled import nvfp4_global_scale, quantize_fp8, quantize_nvfp4
from quire.quant.errors import bad_values, cut_group, group_mismatch
from quire.quant.names import Patterns, usually_dense
from quire.weights.source import TensorInfo, WeightSource, bounds

# Values that are encoded at a time.
ENCODED_AT_ONCE = 1 << 24
_EXPERTS = Patterns(["experts"])
# Latent attention multiplies with it in both directions, in the model's dtype.
_DENSE = "kv_b_proj"


@dataclass(frozen=True)
class Online:
    """What --quantization asks for: `method` "fp8" (a scale for each row, activations with one for
    each token), "nvfp4" or "nvfp4-experts". Embeddings, head and router stay as they are, and what
    latent attention multiplies with."""

    method: str

    @property
    def format(self) -> str:
        return self.method.removesuffix("-experts")

    def means(self, name: str) -> bool:
        """Whether the weight of this name, a matrix, is quantised."""
        module, _, last = name.rpartition(".")
        if last != "weight" or usually_dense(module) or module.endswith(f".{_DENSE}"):
            return False
        return not self.method.endswith("-experts") or _EXPERTS.first(module) is not None

    def formats(self, matrices: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, str]:
        """The format of each weight among (name, shape) that is quantised. Raises UsageError where
        there is none, ModelError where groups do not divide a width."""
        found = {}
        for name, shape in matrices:
            if self.means(name):
                self.check(name, shape)
                found[name] = self.format
        if not found:
            raise UsageError(
                "nothing_to_quantize",
                f"--quantization {self.method}: the model has no weights that this means",
                fix="leave it out, or use --quantization nvfp4",
                field="quantization",
            )
        return found

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        group = QUANT_FORMATS[self.format]
        if group and shape[1] % group:
            raise group_mismatch(
                name.rpartition(".")[0], f"groups of {group} do not divide {shape[1]} columns"
            )


class OnlineSource(WeightSource):
    """The weights that `online` means as QuantTensor, made from those of `source`, one at a time,
    where they are read or as make_on says; all others as they are. A part of a weight has the
    codes of the whole."""

    def __init__(self, source: WeightSource, online: Online):
        self._source, self._online = source, online
        self._device: torch.device | None = None

    def names(self) -> list[str]:
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        info = self._source.info(name)
        if len(info.shape) != 2 or not self._online.means(name):
            return info
        self._online.check(name, info.shape)
        return TensorInfo(name, info.shape, self._online.format)

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor | BlockTensor | QuantTensor:
        info = self.info(name)
        if info.format not in QUANT_FORMATS:
            return self._source.read(name, rows, columns)
        first, last = bounds(rows, info.shape[0])
        left, right = bounds(columns, info.shape[1])
        try:
            parts = list(self._encode(name, info, first, last))
        except ValueError as error:
            raise bad_values(name.rpartition(".")[0], str(error)) from None
        whole = concatenate_rows(parts)
        try:
            whole_width = (left, right) == (0, info.shape[1])
            return whole if whole_width else whole.columns(slice(left, right))
        except ValueError as error:
            raise cut_group(name, str(error)) from None

    def sample(self, name: str) -> bytes:
        return self._source.sample(name)

    def fingerprint(self) -> str:
        head = f"{self._source.fingerprint()} {self._online}"
        return hashlib.blake2b(head.encode(), digest_size=32).hexdigest()

    def close(self) -> None:
        self._source.close()

    def make_on(self, device: torch.device) -> None:
        self._source.make_on(device)
        self._device = device

    def _encode(self, name: str, info: TensorInfo, first: int, last: int) -> Iterator[QuantTensor]:
        if self._online.format == "fp8":
            for values in self._pieces(name, info, first, last):
                yield quantize_fp8(values)
            return
        # The one scale of an NVFP4 matrix is that of the whole, whatever part is asked for.
        largest = max(
            (float(v.abs().max()) for v in self._pieces(name, info, 0, info.shape[0])), default=0.0
        )
        for values in self._pieces(name, info, first, last):
            yield quantize_nvfp4(values, nvfp4_global_scale(largest))

    def _pieces(self, name: str, info: TensorInfo, first: int, last: int) -> Iterator[torch.Tensor]:
        """Some rows at a time; one piece of none where there are none."""
        step = max(1, ENCODED_AT_ONCE // max(1, info.shape[1]))
        for start in range(first, max(last, first + 1), step):
            values = self._source.read(name, slice(start, min(start + step, last)))
            assert isinstance(values, torch.Tensor)
            yield values.to(self._device or values.device).float()
