"""Safetensors files: what a good one gives, and that no bad one gets past the header check."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quire.errors import ModelError
from quire.weights.safetensors import SafetensorsSource
from quire.weights.source import TensorInfo

TENSORS = {
    "a.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "b.bias": torch.arange(5).to(torch.bfloat16),
    "c.stack": torch.arange(24, dtype=torch.int64).reshape(2, 3, 4),
    "d.scale": torch.ones(3, 4).to(torch.float8_e4m3fn),
    "e.scalar": torch.tensor(7.0, dtype=torch.float16),
}


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    shards = {"x-1.safetensors": ["a.weight"], "x-2.safetensors": ["b.bias", "c.stack"]}
    for file, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    write_index(tmp_path, weight_map)
    return tmp_path


def write_index(path: Path, weight_map: Any) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_reads_every_tensor_with_its_shape_and_format(model: Path) -> None:
    with SafetensorsSource(model) as source:
        assert source.names() == sorted(TENSORS)
        assert source.info("d.scale") == TensorInfo("d.scale", (3, 4), "f8_e4m3")
        assert source.nbytes == sum(t.numel() * t.itemsize for t in TENSORS.values())
        for name, expected in TENSORS.items():
            read = source.read(name)
            assert isinstance(read, torch.Tensor)
            assert read.dtype == expected.dtype
            assert torch.equal(read.float(), expected.float())


def test_slices_of_rows_and_columns_equal_slices_of_the_whole(model: Path) -> None:
    source = SafetensorsSource(model)
    rows, columns = slice(1, 3), slice(2, 6)
    assert torch.equal(source.read("a.weight", rows), TENSORS["a.weight"][1:3])
    assert torch.equal(source.read("a.weight", rows, columns), TENSORS["a.weight"][1:3, 2:6])
    assert torch.equal(source.read("a.weight", columns=columns), TENSORS["a.weight"][:, 2:])
    assert torch.equal(source.read("b.bias", rows), TENSORS["b.bias"][1:3])
    stack = source.read("c.stack", slice(1, 2), slice(0, 2))
    assert torch.equal(stack, TENSORS["c.stack"][1:2, :, :2])
    assert source.read("a.weight", slice(2, 2)).shape == (0, 6)
    for bad in (slice(0, 5), slice(-1, 2), slice(0, 4, 2)):
        with pytest.raises(ValueError):
            source.read("a.weight", bad)
    with pytest.raises(ValueError):
        source.read("b.bias", None, slice(0, 1))


def test_missing_tensors_and_closed_sources_are_named(model: Path) -> None:
    source = SafetensorsSource(model)
    kept = source.read("a.weight")
    with pytest.raises(ModelError, match=r"no\.such"):
        source.read("no.such")
    source.close()
    with pytest.raises(ModelError, match="closed"):
        source.read("a.weight")
    assert torch.equal(kept, TENSORS["a.weight"])


def test_fingerprint_is_of_the_tensors_and_not_of_the_files(model: Path, tmp_path: Path) -> None:
    whole = SafetensorsSource(model).fingerprint()
    split = tmp_path / "split"
    split.mkdir()
    for place, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, split / f"part{place}.safetensors")
    assert SafetensorsSource(split).fingerprint() == whole
    changed = dict(TENSORS, **{"a.weight": TENSORS["a.weight"] + 1})
    save_file(changed, model / "model.safetensors")
    assert SafetensorsSource(model).fingerprint() != whole
    assert len(whole) == 64


def test_shards_are_read_through_the_index(sharded: Path) -> None:
    source = SafetensorsSource(sharded)
    assert source.names() == ["a.weight", "b.bias", "c.stack"]
    assert torch.equal(source.read("c.stack"), TENSORS["c.stack"])


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "x-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 of 2 weight files") as caught:
        SafetensorsSource(sharded)
    assert "x-2.safetensors" in caught.value.why


def test_a_tensor_that_the_index_promises_must_be_there(sharded: Path) -> None:
    write_index(sharded, {"a.weight": "x-1.safetensors", "lost": "x-2.safetensors"})
    with pytest.raises(ModelError, match="lost"):
        SafetensorsSource(sharded)


@pytest.mark.parametrize(
    "file", ["../x-1.safetensors", "/etc/passwd", "a/../../b", "..\\b", "", "a\0b", 7, None]
)
def test_an_index_cannot_name_files_outside_the_model(sharded: Path, file: Any) -> None:
    write_index(sharded, {"a.weight": file})
    with pytest.raises(ModelError):
        SafetensorsSource(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "{", '{"weight_map": {}}'])
def test_a_bad_index_is_a_model_error(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError):
        SafetensorsSource(sharded)


def test_one_name_in_two_files_without_an_index_is_refused(tmp_path: Path) -> None:
    for file in ("one", "two"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(ModelError, match="valid") as caught:
        SafetensorsSource(tmp_path)
    assert "also in" in caught.value.why


def test_an_empty_directory_has_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no safetensors files"):
        SafetensorsSource(tmp_path)


BAD_HEADERS: dict[str, tuple[Any, bytes]] = {
    "not an object": ([], b""),
    "not json": (b"{...", b""),
    "not utf-8": (b'{"\xff": 1}', b""),
    "deep nesting": (b"[" * 100_000, b""),
    "huge number": (b'{"a": ' + b"9" * 10_000 + b"}", b""),
    "entry not an object": ({"a": 3}, b""),
    "missing dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "unknown dtype": ({"a": entry("F12")}, bytes(8)),
    "dtype not text": ({"a": entry(dtype=["F32"])}, bytes(8)),  # type: ignore[arg-type]
    "extra key": ({"a": {**entry(), "pickle": "x"}}, bytes(8)),
    "negative size": ({"a": entry(shape=(-2,))}, bytes(8)),
    "boolean size": ({"a": entry(shape=(True, 2))}, bytes(8)),
    "fractional size": ({"a": entry(shape=(2.0,))}, bytes(8)),
    "overflowing shape": ({"a": entry(shape=(1 << 62, 1 << 62))}, bytes(8)),
    "wraps to fit": ({"a": entry(shape=(1 << 32, 1 << 32), offsets=(0, 0))}, b""),
    "wrong byte count": ({"a": entry(shape=(3,))}, bytes(8)),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, bytes(8)),
    "reversed offsets": ({"a": entry(offsets=(8, 0))}, bytes(8)),
    "outside the file": ({"a": entry(offsets=(8, 16))}, bytes(8)),
    "gap": ({"a": entry(offsets=(4, 12))}, bytes(12)),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "rest": ({"a": entry()}, bytes(9)),
    "cut off": ({"a": entry()}, bytes(7)),
    "twice": (b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "metadata not text": ({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_bad_headers_are_model_errors(tmp_path: Path, fault: str) -> None:
    header, data = BAD_HEADERS[fault]
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelError):
        SafetensorsSource(path)


@pytest.mark.parametrize("length", [0, 1, 1 << 31, 1 << 63, (1 << 64) - 1])
def test_header_lengths_are_checked_against_the_file(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"a": entry()}, bytes(8), length)
    with pytest.raises(ModelError):
        SafetensorsSource(path)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\0" * 8])
def test_files_shorter_than_a_header_are_model_errors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError):
        SafetensorsSource(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_changed_bytes_give_tensors_or_a_model_error(model: Path, data: st.DataObject) -> None:
    good = (model / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(bad)))
    path = model / "fuzzed.bin"
    path.write_bytes(bad[:cut])
    try:
        source = SafetensorsSource(path)
        for name in source.names():
            read = source.read(name)
            assert isinstance(read, torch.Tensor)
            assert tuple(read.shape) == source.info(name).shape
    except ModelError:
        pass
