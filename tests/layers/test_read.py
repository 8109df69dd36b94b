"""Quantised weights reach the kernels as codes where they take them, else widened."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layers.source import Tensors, load
from quire.errors import ModelError
from quire.formats.quantized import QuantTensor
from quire.formats.scaled import (
    quantize_fp8,
    quantize_fp8_block,
    quantize_integer,
    quantize_mxfp4,
    quantize_nvfp4,
)
from quire.kernels.dense import DenseWeights
from quire.kernels.reference import ops
from quire.layers import read
from quire.layers.build import Build
from quire.layers.linear import Linear, merge
from quire.layers.moe import MoE
from quire.layers.read import read_matrix, widen


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


ENCODERS: list[Any] = [
    quantize_fp8,
    quantize_fp8_block,
    quantize_nvfp4,
    quantize_mxfp4,
    lambda x: quantize_integer(x, 4, 32),
    lambda x: quantize_integer(x, 8, 64, symmetric=False),
]


@pytest.mark.parametrize("encode", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_widened_values_are_the_decoded_ones_rounded_once(
    encode: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "WIDENED_AT_ONCE", 128 * 64)  # several pieces
    for rows in (0, 1, 300):
        tensor = encode(matrix(rows, 64))
        assert torch.equal(widen(tensor, dtype), tensor.dequantize().to(dtype))


def test_values_that_widen_to_infinity_are_refused_by_the_tensors_name() -> None:
    """Codes and scales that are numbers, with products that are none: 6 x 2^127, 448 x 1e37; 1e5 is
    a number in bfloat16, and none in float16."""
    mxfp4 = quantize_mxfp4(matrix(200, 64))
    huge = torch.where(torch.arange(200)[:, None] == 150, 254, mxfp4.scales.int())
    mxfp4 = replace(mxfp4, scales=huge.to(torch.uint8))
    fp8 = quantize_fp8(matrix(8, 64))
    for tensor in (mxfp4, replace(fp8, scales=torch.full((8,), 1e37))):
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(ModelError, match=r"m\.up_proj") as caught:
                widen(tensor, dtype, "m.up_proj.weight")
            assert caught.value.code == "quantized_values"
    large = replace(fp8, scales=torch.full((8,), 1e5 / 448))
    assert widen(large, torch.bfloat16, "w").isfinite().all()
    with pytest.raises(ModelError) as caught:
        widen(large, torch.float16, "w")
    assert "float16" in caught.value.why


def test_kernels_get_codes_of_the_formats_that_they_take() -> None:
    tensor = quantize_fp8(matrix(8, 64))
    source = Tensors({"w": tensor})
    asked = []

    def why_widened(*given: Any) -> str:
        asked.append(given)
        return "" if len(asked) == 1 else "there are none"

    kernels: Any = SimpleNamespace(dense=False, why_widened=why_widened)
    assert isinstance(read_matrix(Build(kernels), source, "w"), QuantTensor)
    assert asked == [("fp8", 64, "linear")]
    for dtype, expected in ((None, torch.float16), (torch.float32, torch.float32)):
        found = read_matrix(Build(kernels, dtype=dtype, widened=torch.float16), source, "w")
        assert isinstance(found, torch.Tensor) and found.dtype == expected


def test_codes_of_one_kind_are_merged_and_others_follow_each_other() -> None:
    first, second = quantize_fp8(matrix(8, 64)), quantize_fp8(matrix(4, 64, 1))
    [(both, rows)] = merge([first, second])
    assert rows == 12 and isinstance(both, QuantTensor)
    assert torch.equal(both.dequantize(), torch.cat([first.dequantize(), second.dequantize()]))
    ragged = quantize_fp8_block(matrix(100, 64))
    for others in ([first, quantize_mxfp4(matrix(4, 64))], [first, matrix(4, 64)], [ragged] * 2):
        assert [n for _, n in merge(list(others))] == [int(t.shape[0]) for t in others]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_dense_weights_of_gpu_kernels_hold_the_values(dtype: torch.dtype) -> None:
    kernels: Any = DenseWeights(dtype, torch.device("cpu"))
    build = Build(kernels, dtype=dtype)
    linear = Linear(build, ["q", "k"], 64, [8, 4])
    tensors: dict[str, Any] = {
        "q.weight": quantize_nvfp4(matrix(8, 64)),
        "k.weight": quantize_integer(matrix(4, 64), 4, 32),
    }
    load(build, tensors)
    [(packed, _)] = linear._parts
    expected = torch.cat([tensor.dequantize() for tensor in tensors.values()])
    assert torch.equal(packed.data, expected.to(dtype))


def test_stacked_experts_hold_the_values() -> None:
    kernels: Any = DenseWeights(torch.float32, torch.device("cpu"))
    build = Build(kernels, dtype=torch.float32)
    sizes = {"hidden": 32, "intermediate": 64, "experts": 2, "experts_per_token": 1}
    layer = MoE(build, "m", normalize=True, **sizes)
    tensors: dict[str, Any] = {"m.gate.weight": matrix(2, 32)}
    for e in range(2):
        for part, shape in (("gate", (64, 32)), ("up", (64, 32)), ("down", (32, 64))):
            name = f"m.experts.{e}.{part}_proj.weight"
            tensors[name] = quantize_mxfp4(matrix(*shape, seed=len(tensors)))
    load(build, tensors)
    stacked: Any = layer.experts
    for e in range(2):
        gate, up, down = (
            tensors[f"m.experts.{e}.{part}_proj.weight"].dequantize()
            for part in ("gate", "up", "down")
        )
        assert torch.equal(stacked.gate_up_EIH[e], torch.cat([gate, up]))
        assert torch.equal(stacked.down_EHI[e], down)


def test_an_embedding_of_codes_gives_the_rows_of_its_values() -> None:
    from quire.layers.embedding import Embedding

    build = Build(ops, dtype=torch.float32)
    embedding = Embedding(build, "e", 8, 64)
    tensor = quantize_fp8(matrix(8, 64))
    load(build, {"e.weight": tensor})
    ids = torch.tensor([3, 0, 7])
    assert torch.equal(embedding(ids), tensor.dequantize()[ids])
