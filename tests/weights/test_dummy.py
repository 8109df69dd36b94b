"""Dummy weights: seeded, plausible, and the same whatever part is asked for first."""

import pytest
import torch

from quire.errors import ModelError
from quire.formats.blocks import BlockTensor
from quire.weights.dummy import DummySource
from quire.weights.source import TensorInfo, WeightSource

INFOS = [
    TensorInfo("m.q_proj.weight", (64, 512), "bf16"),
    TensorInfo("m.k_proj.weight", (64, 512), "bf16"),
    TensorInfo("m.packed.weight", (48, 512), "q4_k"),
    TensorInfo("m.fp8.weight", (32, 256), "f8_e4m3"),
    TensorInfo("m.fp8.weight_scale_inv", (2, 2), "f32"),
    TensorInfo("m.codes", (16, 64), "u8"),
    TensorInfo("m.experts", (4, 8, 32), "f32"),
    TensorInfo("m.input_layernorm.weight", (64,), "f32"),
    TensorInfo("m.q_proj.bias", (64,), "f32"),
    TensorInfo("m.table", (100, 6), "i64"),
    TensorInfo("m.sinks", (8,), "f32"),
]


def source(**options: object) -> DummySource:
    return DummySource(INFOS, **{"seed": 3, **options})  # type: ignore[arg-type]


def values(weights: WeightSource, name: str, *part: slice | None) -> torch.Tensor:
    read = weights.read(name, *part)
    return read.dequantize() if isinstance(read, BlockTensor) else read


@pytest.mark.parametrize("name", ["m.q_proj.weight", "m.packed.weight", "m.fp8.weight"])
def test_matrices_are_normal_with_deviation_two_hundredths(name: str) -> None:
    read = values(source(), name).float()
    assert abs(read.mean()) < 0.002
    assert 0.018 < read.std() < 0.022
    assert torch.linalg.matrix_rank(read) == read.shape[0]


def test_norms_are_one_and_biases_zero_and_scales_one() -> None:
    weights = source()
    assert values(weights, "m.input_layernorm.weight").eq(1).all()
    assert values(weights, "m.q_proj.bias").eq(0).all()
    assert values(weights, "m.fp8.weight_scale_inv").eq(1).all()
    assert values(weights, "m.sinks").std() > 0
    assert values(weights, "m.codes").unique().numel() > 100


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_any_part_read_alone_equals_the_part_of_the_whole(info: TensorInfo) -> None:
    whole = values(source(), info.name)
    assert tuple(whole.shape) == info.shape
    half = info.shape[0] // 2
    for rows in (slice(0, half), slice(half, info.shape[0]), slice(half, half)):
        assert torch.equal(values(source(), info.name, rows).float(), whole[rows].float())
    if len(info.shape) > 1:
        columns = slice(info.shape[-1] // 2, info.shape[-1])
        part = values(source(), info.name, slice(1, 2), columns)
        assert torch.equal(part.float(), whole[1:2, ..., columns].float())


def test_numbers_depend_on_seed_and_name_only() -> None:
    few = DummySource(INFOS[1:2], seed=3)
    name = INFOS[1].name
    assert torch.equal(values(few, name), values(source(), name))
    assert not torch.equal(values(source(seed=4), name), values(source(), name))
    assert not torch.equal(values(source(), name), values(source(), INFOS[0].name))


def test_index_tables_hold_distinct_valid_indices() -> None:
    table = values(source(index_limits={"table": 16}), "m.table")
    assert table.dtype == torch.int64
    assert table.min() >= 0
    assert table.max() < 16
    assert all(row.unique().numel() == 6 for row in table)
    assert table.unique(dim=0).shape[0] > 10
    assert values(source(), "m.table").eq(0).all()


def test_constants_fix_values_by_the_end_of_the_name() -> None:
    fixed = source(constants={"weight_scale_inv": 0.5})
    assert values(fixed, "m.fp8.weight_scale_inv").eq(0.5).all()


def test_very_wide_and_empty_rows_can_be_made() -> None:
    wide = DummySource([TensorInfo("w", (2, 5 << 20), "bf16"), TensorInfo("e", (0, 8), "f32")])
    assert wide.read("w", slice(1, 2), slice((5 << 20) - 4, 5 << 20)).shape == (1, 4)
    assert wide.read("e").shape == (0, 8)


def test_fingerprint_is_of_the_list_and_the_seed() -> None:
    assert source().fingerprint() == source().fingerprint()
    assert source().fingerprint() != source(seed=4).fingerprint()
    assert source().fingerprint() != DummySource(INFOS[1:], seed=3).fingerprint()


def test_misuse_is_refused() -> None:
    weights = source()
    with pytest.raises(ModelError, match="nothing"):
        weights.read("nothing")
    with pytest.raises(ValueError, match="whole number"):
        weights.read("m.packed.weight", None, slice(0, 100))
    with pytest.raises(ValueError, match="same name"):
        DummySource([INFOS[0], INFOS[0]])
    weights.close()
    with pytest.raises(ModelError, match="closed"):
        weights.read("m.codes")
