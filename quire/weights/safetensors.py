"""Weights in safetensors files, one or sharded.

The header of every file is checked here, strictly, before the safetensors library sees the file
(format: https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open

from quire.errors import ModelError
from quire.formats.blocks import BlockTensor
from quire.weights.source import (
    DENSE_DTYPES,
    TensorInfo,
    WeightSource,
    bounds,
    missing_tensor,
    sample_places,
    source_closed,
)

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
MAX_INDEX_BYTES = 256 << 20
_FORMATS = {name.upper(): name for name in DENSE_DTYPES}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `start` is a byte offset from the beginning of the file `path`."""

    info: TensorInfo
    path: Path
    start: int


class SafetensorsSource(WeightSource):
    """The tensors of a directory's safetensors files, or of one such file.

    ModelError if a file is missing, corrupt or of a kind that cannot be read.
    """

    def __init__(self, path: Path | str):
        self._path = Path(path)
        self._stored = _locate(self._path)
        self._names = sorted(self._stored)
        self._files: dict[Path, Any] | None = {
            file: _open(file) for file in sorted({stored.path for stored in self._stored.values()})
        }

    def names(self) -> list[str]:
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        return self._find(name).info

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor | BlockTensor:
        stored = self._find(name)
        if self._files is None:
            raise source_closed(str(self._path))
        file = self._files[stored.path]
        shape = stored.info.shape
        if rows is None and columns is None:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor
        if not shape or (columns is not None and len(shape) < 2):
            raise ValueError(f"{name} of shape {shape} has no such dimension to slice")
        index = [slice(0, size) for size in shape]
        index[0] = slice(*bounds(rows, shape[0]))
        if len(shape) > 1:
            index[-1] = slice(*bounds(columns, shape[-1]))
        if any(part.start == part.stop for part in index):
            return torch.empty(
                [part.stop - part.start for part in index], dtype=DENSE_DTYPES[stored.info.format]
            )
        part: torch.Tensor = file.get_slice(name)[tuple(index)]
        return part

    def sample(self, name: str) -> bytes:
        stored = self._find(name)
        with stored.path.open("rb") as file:
            pieces = [
                os.pread(file.fileno(), stop - start, stored.start + start)
                for start, stop in sample_places(stored.info.nbytes)
            ]
        return b"".join(pieces)

    def close(self) -> None:
        self._files = None

    def _find(self, name: str) -> Stored:
        if name not in self._stored:
            raise missing_tensor(name, str(self._path))
        return self._stored[name]


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except Exception as error:  # the library raises its own type and OSError
        raise corrupt(path, str(error)) from error


def corrupt(path: Path, why: str) -> ModelError:
    return ModelError(
        code="safetensors_corrupt",
        what=f"{path} is not a valid safetensors file",
        why=why,
        fix="download the file again",
    )


def _locate(path: Path) -> dict[str, Stored]:
    """Every tensor of a file or directory by name."""
    if path.is_file():
        return read_header(path)
    index = path / INDEX_NAME
    if (path / "model.safetensors").is_file() and not index.is_file():
        return read_header(path / "model.safetensors")
    weight_map = read_index(index) if index.is_file() else None
    if weight_map is None:
        files = sorted(
            f for f in path.glob("*.safetensors") if not f.name.startswith("consolidated")
        )
    else:
        files = sorted({path / file for file in weight_map.values()})
        missing = [str(file.relative_to(path)) for file in files if not file.is_file()]
        if missing:
            raise ModelError(
                code="no_weights",
                what=f"{len(missing)} of {len(files)} weight files are missing in {path}",
                why=f"{INDEX_NAME} names {', '.join(missing[:5])}",
                fix="finish the download",
            )
    if not files:
        raise ModelError(code="no_weights", what=f"there are no safetensors files in {path}")
    return _merge(path, files, weight_map)


def _merge(path: Path, files: list[Path], weight_map: dict[str, str] | None) -> dict[str, Stored]:
    """One table out of several files; the index decides where a name is in more than one."""
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file).items():
            chosen = weight_map.get(name) if weight_map is not None else None
            if chosen is not None and path / chosen != file:
                continue
            if name in found:
                raise corrupt(file, f"tensor {name!r} is also in {found[name].path.name}")
            found[name] = stored
    for name in weight_map or {}:
        if name not in found:
            raise missing_tensor(name, f"{weight_map[name] if weight_map else path}")
    return found


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name, from an index file. ModelError if it is not what it should be."""
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise corrupt(path, f"the index is larger than {MAX_INDEX_BYTES} bytes")
    parsed = _parse_object(path, path.read_bytes())
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise corrupt(path, "it has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise corrupt(path, f"the file of {name!r} is not a string")
        parts = PurePosixPath(file).parts
        # By its words alone: in the hub's cache the files are links to another directory.
        if not parts or file.startswith("/") or ".." in parts or "\\" in file or "\0" in file:
            raise corrupt(path, f"the file of {name!r} is outside the model: {file!r}")
    return weight_map


def read_header(path: Path) -> dict[str, Stored]:
    """Checks the whole header of one file. ModelError if anything in it is wrong."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise corrupt(path, f"a header of {length} bytes in a file of {size}")
            header = _parse_object(path, file.read(length))
    except OSError as error:
        raise corrupt(path, str(error)) from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise corrupt(path, "__metadata__ is not a table of strings")
    data_start = 8 + length
    spans: list[tuple[int, int, str]] = []
    table: dict[str, Stored] = {}
    for name, entry in header.items():
        info, begin, end = _check_entry(path, name, entry)
        spans.append((begin, end, name))
        table[name] = Stored(info, path, data_start + begin)
    _check_spans(path, sorted(spans), size - data_start)
    return table


def _parse_object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"bad JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise corrupt(path, "the JSON is not an object")
    return parsed


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return table


def _check_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """The tensor's info and its (begin, end) in the data section."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt(path, f"the entry of {name!r} is not dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise corrupt(path, f"shape or data_offsets of {name!r} are not lists of sizes")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _FORMATS:
        raise ModelError(
            code="tensor_format_unknown",
            what=f"tensor {name!r} in {path} has the unknown dtype {entry['dtype']!r}",
            fix=f"known: {', '.join(sorted(_FORMATS))}",
        )
    begin, end = offsets
    info = TensorInfo(name, tuple(shape), _FORMATS[entry["dtype"]])
    if prod(shape) >= 1 << 63 or info.nbytes != end - begin:
        raise corrupt(path, f"{name!r} of shape {shape} does not fill its bytes {offsets}")
    return info, begin, end


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )


def _check_spans(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """Tensors must cover the data section without gap or overlap."""
    position = 0
    for begin, end, name in spans:
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a gap"
            raise corrupt(path, f"{name!r} at byte {begin} {fault} (expected {position})")
        position = end
    if position != size:
        raise corrupt(path, f"tensors take {position} bytes, the file has {size}")
