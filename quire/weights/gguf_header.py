"""The header of a GGUF file: metadata and where each tensor lies.

Format: docs/gguf.md of ggml-org/ggml, versions 2 and 3 (little-endian). Every count, length and
offset is checked against the size of the file before it is used.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from quire.errors import ModelError
from quire.weights.tensor_info import TensorInfo

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {  # value type -> struct code
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
TENSOR_TYPES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 12: "q4_k",
    13: "q5_k", 14: "q6_k", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 30: "bf16",
}  # fmt: skip
# Only to name them in the error; type numbers of ggml.h.
_UNREADABLE_TYPES = {
    10: "q2_k", 11: "q3_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 20: "iq4_nl",
    21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 29: "iq1_m", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4",
    40: "nvfp4", 41: "q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor under its GGUF name; `start` is a byte offset from the beginning of the file."""

    info: TensorInfo
    start: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its data. Typed reads of metadata raise ModelError."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise corrupt(self.path, f"{key} is not a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; also out of a list that repeats it (one entry per layer)."""
        value = self._value(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not int:
            raise corrupt(self.path, f"{key} is not one whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float):
            raise corrupt(self.path, f"{key} is not a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise corrupt(self.path, f"{key} is not true or false")
        return value

    def items(self, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        """A list whose items are all of one type."""
        value = self._value(key, default)
        if not isinstance(value, list) or not set(map(type, value)) <= {kind}:
            raise corrupt(self.path, f"{key} is not a list of {kind.__name__}")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise corrupt(self.path, f"{key} is missing")
        return value


def corrupt(path: Path, why: str) -> ModelError:
    return ModelError(
        code="gguf_corrupt",
        what=f"{path} is not a valid GGUF file",
        why=why,
        fix="download the file again",
    )


def unsupported(path: Path, why: str, fix: str = "") -> ModelError:
    return ModelError(code="gguf_unsupported", what=f"{path} cannot be read here", why=why, fix=fix)


def read_header(path: Path | str) -> GgufHeader:
    """Parses and checks a file's header. ModelError if it is corrupt or of an unknown kind."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise corrupt(path, "it is shorter than a header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).header()
    except OSError as error:
        raise corrupt(path, str(error)) from error


class _Parser:
    """Reads forward through the mapped file; `_need` guards every step."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 0

    def header(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            raise corrupt(self.path, "it does not begin with GGUF")
        version = self._scalar("I")
        if version not in (2, 3):
            big_endian = version >> 24 in (2, 3) and version & 0xFFFFFF == 0
            why = "it is big-endian" if big_endian else f"it has version {version}"
            raise unsupported(self.path, why, "versions 2 and 3, little-endian, can be read")
        tensor_count, item_count = self._scalar("Q"), self._scalar("Q")
        self._need(tensor_count * 24 + item_count * 13)  # the least that each can take
        metadata = self._metadata(item_count)
        if metadata.get("split.count", 0) not in (0, 1):
            fix = "join the parts with llama-gguf-split --merge"
            raise unsupported(self.path, "it is one part of a split model", fix)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise corrupt(self.path, f"an alignment of {alignment!r}")
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        data_start = -(-self.at // alignment) * alignment
        tensors = self._place(entries, data_start, alignment)
        return GgufHeader(self.path, version, metadata, tensors)

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            if key in metadata:
                raise corrupt(self.path, f"key {key!r} appears twice")
            metadata[key] = self._value(self._scalar("I"))
        return metadata

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(self._code(kind))
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind == _ARRAY:
            raise unsupported(self.path, "its metadata has lists in lists")
        if kind == _STRING:
            return self._strings(count)
        code = self._code(kind)
        size = struct.calcsize(f"<{code}") * count
        self._need(size)
        return list(struct.unpack(f"<{count}{code}", self._take(size)))

    def _strings(self, count: int) -> list[str]:
        """`count` strings in one loop: vocabularies have hundreds of thousands."""
        self._need(count * 8)
        strings: list[str] = []
        data, size, at, length_at = self.data, self.size, self.at, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                start = at + 8
                if start > size:
                    raise corrupt(self.path, f"it is cut off in a list of text at byte {at}")
                at = start + length_at(data, at)[0]
                if at > size:
                    raise corrupt(self.path, f"text at byte {start} is longer than the file")
                strings.append(data[start:at].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise corrupt(self.path, f"text before byte {at}: {error}") from error
        self.at = at
        return strings

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise corrupt(self.path, f"value type {kind}")
        return _SCALARS[kind]

    def _tensor_entry(self) -> tuple[TensorInfo, int]:
        name = self._string()
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise corrupt(self.path, f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(dimensions)]))
        if not 0 < prod(shape) < 1 << 63:
            raise corrupt(self.path, f"tensor {name!r} has the shape {shape}")
        kind = self._scalar("I")
        if kind not in TENSOR_TYPES:
            known = _UNREADABLE_TYPES.get(kind, f"number {kind}")
            fix = f"readable: {', '.join(sorted(TENSOR_TYPES.values()))}"
            raise unsupported(self.path, f"tensor {name!r} has the type {known}", fix)
        return TensorInfo(name, shape, TENSOR_TYPES[kind]), self._scalar("Q")

    def _place(
        self, entries: list[tuple[TensorInfo, int]], data_start: int, alignment: int
    ) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        for info, offset in entries:
            if info.name in tensors:
                raise corrupt(self.path, f"tensor {info.name!r} appears twice")
            try:
                end = data_start + offset + info.nbytes
            except ValueError as error:
                raise corrupt(self.path, f"tensor {info.name!r}: {error}") from error
            if offset % alignment or end > self.size:
                why = f"tensor {info.name!r} at {offset} of {info.nbytes} bytes leaves the file"
                raise corrupt(self.path, why)
            tensors[info.name] = StoredTensor(info, data_start + offset)
        in_order = sorted(tensors.values(), key=lambda tensor: tensor.start)
        for before, after in pairwise(in_order):
            if before.start + before.info.nbytes > after.start:
                why = f"tensors {before.info.name!r} and {after.info.name!r} overlap"
                raise corrupt(self.path, why)
        return tensors

    def _string(self) -> str:
        try:
            return self._take(self._scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise corrupt(self.path, f"text at byte {self.at}: {error}") from error

    def _scalar(self, code: str) -> Any:
        layout = struct.Struct(f"<{code}")
        return layout.unpack(self._take(layout.size))[0]

    def _take(self, count: int) -> bytes:
        self._need(count)
        self.at += count
        return self.data[self.at - count : self.at]

    def _need(self, count: int) -> None:
        if count > self.size - self.at:
            why = f"{count} bytes needed at {self.at} of {self.size}: it is cut off or corrupt"
            raise corrupt(self.path, why)
