"""Stored codes and scales read as the values they stand for, whole and in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers.source import Tensors

from quant.stored import SCHEMES
from quire.errors import ModelError
from quire.formats.layout import ungrouped
from quire.formats.quantized import QuantTensor
from quire.quant.config import read_scheme
from quire.quant.online import Online, OnlineSource
from quire.quant.source import QuantizedSource
from quire.weights.dummy import DummySource
from quire.weights.source import TensorInfo

NAME = "model.layers.0.self_attn.q_proj"


def make(
    scheme: str, rows: int = 272, columns: int = 288
) -> tuple[QuantizedSource, dict[str, torch.Tensor], torch.Tensor]:
    config, maker, _ = SCHEMES[scheme]
    parts, values = maker(rows, columns, torch.Generator().manual_seed(5))
    tensors: dict[str, Any] = {f"{NAME}.{part}": tensor for part, tensor in parts.items()}
    tensors["lm_head.weight"] = torch.ones(3, 4)
    tensors["model.norm.weight"] = torch.ones(4)
    return opened(config, tensors), tensors, values


def opened(config: dict[str, Any], tensors: dict[str, Any]) -> QuantizedSource:
    scheme = read_scheme({"quantization_config": config})
    assert scheme is not None
    return QuantizedSource(Tensors(tensors), scheme)


def values_of(tensor: Any) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, QuantTensor) else tensor


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_those_that_were_stored(scheme: str) -> None:
    source, tensors, values = make(scheme)
    assert source.names() == ["lm_head.weight", f"{NAME}.weight", "model.norm.weight"]
    info, tensor = source.info(f"{NAME}.weight"), source.read(f"{NAME}.weight")
    assert info.shape == tuple(values.shape) and ungrouped(info.format) == SCHEMES[scheme][2]
    assert info.nbytes == sum(t.nbytes for n, t in tensors.items() if n.startswith(NAME))
    if isinstance(tensor, QuantTensor):
        assert tensor.format == ungrouped(info.format)
    torch.testing.assert_close(values_of(tensor), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_are_the_same_values(scheme: str) -> None:
    source, _, values = make(scheme)
    for rows in (slice(0, 128), slice(128, 272), slice(0, 0)):
        found = values_of(source.read(f"{NAME}.weight", rows=rows))
        torch.testing.assert_close(found, values[rows], rtol=1e-6, atol=0)
    for columns in (slice(0, 128), slice(128, 288)):
        found = values_of(source.read(f"{NAME}.weight", slice(128, 256), columns))
        torch.testing.assert_close(found, values[128:256, columns], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", ["fp8 blocks", "ct fp8 blocks"])
def test_rows_that_cut_a_block_are_refused(scheme: str) -> None:
    source, _, _ = make(scheme)
    for rows in (slice(0, 64), slice(64, 272)):
        with pytest.raises(ModelError) as caught:
            source.read(f"{NAME}.weight", rows=rows)
        assert caught.value.code == "quantized_shard"


@pytest.mark.parametrize("scheme", ["fp8 blocks", "ct nvfp4", "ct mxfp4", "awq", "gptq"])
def test_columns_that_cut_a_group_are_refused(scheme: str) -> None:
    with pytest.raises(ModelError) as caught:
        make(scheme)[0].read(f"{NAME}.weight", columns=slice(8, 136))
    assert caught.value.code == "quantized_shard"


@pytest.mark.parametrize(
    ("scheme", "activation", "input_scale"),
    [
        ("fp8 tensor", "token", None),
        ("fp8 static", "tensor", 0.5),
        ("ct fp8 static", "tensor", 0.5),
        ("modelopt fp8", "tensor", 0.5),
        ("fp8 blocks", "token", None),
        ("modelopt nvfp4", "none", None),
        ("ct w4a16", "none", None),
    ],
)
def test_the_way_of_activations_comes_with_the_weight(
    scheme: str, activation: str, input_scale: float | None
) -> None:
    tensor = make(scheme)[0].read(f"{NAME}.weight")
    assert isinstance(tensor, QuantTensor) and tensor.activation == activation
    assert (tensor.input_scale is None) == (input_scale is None)
    assert input_scale is None or float(tensor.input_scale) == input_scale  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dummy_weights_of_a_scheme_are_small_and_the_same_in_parts(scheme: str) -> None:
    parsed = read_scheme({"quantization_config": SCHEMES[scheme][0]})
    assert parsed is not None
    storage = parsed.find(NAME)
    assert storage is not None and storage.format == SCHEMES[scheme][2]
    dummies = storage.dummies(256, 256)
    infos = [
        TensorInfo(f"{NAME}.{part}", shape, kind) for part, (shape, kind, _) in dummies.items()
    ]
    values = {f"{NAME}.{part}": value for part, (_, _, value) in dummies.items()}
    source = QuantizedSource(DummySource(infos, 3, values=values), parsed)
    whole = values_of(source.read(f"{NAME}.weight"))
    assert whole.shape == (256, 256)
    assert 0.01 < float(whole.std()) < 0.04 and float(whole.mean().abs()) < 0.01
    assert torch.equal(values_of(source.read(f"{NAME}.weight", slice(128, 256))), whole[128:])


def test_what_is_made_is_made_where_it_is_asked_for() -> None:
    parsed = read_scheme({"quantization_config": next(iter(SCHEMES.values()))[0]})
    assert parsed is not None
    dummies = DummySource([TensorInfo("norm.weight", (32,), "bf16")])
    for source in (dummies, QuantizedSource(dummies, parsed), OnlineSource(dummies, Online("fp8"))):
        source.make_on(torch.device("cpu"))
        before = source.read("norm.weight")
        source.make_on(torch.device("meta"))
        assert before.device.type == "cpu" and source.read("norm.weight").device.type == "meta"


def test_the_fingerprint_follows_the_stored_tensors_and_the_way_they_are_read() -> None:
    source, tensors, _ = make("gptq zeros")
    same = opened(SCHEMES["gptq zeros"][0], tensors)
    other = opened({**SCHEMES["gptq zeros"][0], "checkpoint_format": "gptq_v2"}, tensors)
    assert source.fingerprint() == same.fingerprint() != other.fingerprint()


def test_scales_of_queries_and_of_other_products_say_nothing_of_the_cache() -> None:
    _, tensors, _ = make("ct fp8 channel")
    attention = "model.layers.0.self_attn"
    scales = {
        f"{attention}.q_scale": torch.tensor(1.0),
        f"{attention}.q_proj.output_scale": torch.tensor(0.0),
        f"{attention}.o_proj.output_scale": torch.tensor(2.0),
        "model.layers.0.mlp.down_proj.output_scale": torch.tensor(2.0),
    }
    source = opened(SCHEMES["ct fp8 channel"][0], {**tensors, **scales})
    assert not source.kv_scales() and not set(source.names()) & set(scales)
    one = {**scales, f"{attention}.k_proj.output_scale": torch.tensor(0.5)}
    source = opened(SCHEMES["ct fp8 channel"][0], {**tensors, **one})
    assert list(source.kv_scales()) == [f"{attention}.k_proj.output_scale"]


def test_kv_scales_are_read_and_do_not_reach_the_model() -> None:
    _, tensors, _ = make("ct fp8 channel")
    attention = "model.layers.0.self_attn"
    scales = {
        f"{attention}.k_scale": torch.tensor([0.5]),
        f"{attention}.v_proj.v_scale": torch.tensor(2.0),
    }
    source = opened(SCHEMES["ct fp8 channel"][0], {**tensors, **scales})
    assert not any("_scale" in name for name in source.names())
    found = {name: scale.tolist() for name, scale in source.kv_scales().items()}
    assert found == {f"{attention}.k_scale": [0.5], f"{attention}.v_proj.v_scale": 2.0}
    for wrong in (torch.zeros(1), torch.tensor([1.0, torch.nan]), torch.tensor([-1.0])):
        bad = opened(SCHEMES["ct fp8 channel"][0], {**tensors, f"{attention}.k_scale": wrong})
        with pytest.raises(ModelError) as caught:
            bad.kv_scales()
        assert caught.value.code == "quantized_values"


def test_a_quantised_head_is_read_although_tools_usually_leave_it() -> None:
    config, maker, _ = SCHEMES["gptq"]
    parts, values = maker(32, 64, torch.Generator().manual_seed(0))
    source = opened(config, {f"lm_head.{part}": tensor for part, tensor in parts.items()})
    torch.testing.assert_close(values_of(source.read("lm_head.weight")), values)
