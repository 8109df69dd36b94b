"""Weights quantised while loading: which, to what, in parts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers.source import Tensors

from quire.errors import ModelError, UsageError
from quire.formats.quantized import QuantTensor
from quire.formats.scaled import quantize_fp8, quantize_nvfp4
from quire.quant import online as module
from quire.quant.online import Online, OnlineSource

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.3.up_proj.weight"
KEPT = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight"]
KEPT += ["model.layers.0.self_attn.kv_b_proj.weight"]
NORM = "model.layers.0.input_layernorm.weight"


def source(method: str, dtype: torch.dtype = torch.bfloat16, **more: Any) -> OnlineSource:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Any] = {
        name: torch.randn(40, 64, generator=generator).to(dtype) for name in (Q, UP, *KEPT)
    }
    tensors[NORM] = torch.ones(64)
    return OnlineSource(Tensors({**tensors, **more}), Online(method))


@pytest.mark.parametrize(
    ("method", "format", "meant"),
    [("fp8", "fp8", [Q, UP]), ("nvfp4", "nvfp4", [Q, UP]), ("nvfp4-experts", "nvfp4", [UP])],
)
def test_linears_or_experts_are_quantised_and_nothing_else(
    method: str, format: str, meant: list[str]
) -> None:
    found = source(method)
    for name in (Q, UP, *KEPT, NORM):
        tensor, info = found.read(name), found.info(name)
        if name in meant:
            assert isinstance(tensor, QuantTensor) and tensor.format == info.format == format
            assert info.nbytes == tensor.nbytes
        else:
            assert isinstance(tensor, torch.Tensor) and info.format in ("bf16", "f32")
    plain = [(name, found.info(name).shape) for name in (Q, UP, *KEPT)]
    assert found._online.formats(plain) == dict.fromkeys(meant, format)


@pytest.mark.parametrize("pieces", [1 << 24, 64 * 7])
def test_codes_are_those_of_the_encoders_whatever_is_encoded_at_a_time(
    pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ENCODED_AT_ONCE", pieces)
    for method, encode in (("fp8", quantize_fp8), ("nvfp4", quantize_nvfp4)):
        found = source(method)
        values = found._source.read(Q)
        assert isinstance(values, torch.Tensor)
        tensor, expected = found.read(Q), encode(values.float())
        assert isinstance(tensor, QuantTensor)
        assert torch.equal(tensor.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(tensor.dequantize(), expected.dequantize())
        assert tensor.activation == ("token" if method == "fp8" else "none")


@pytest.mark.parametrize("method", ["fp8", "nvfp4"])
def test_a_part_has_the_codes_of_the_whole(method: str) -> None:
    found = source(method)
    whole = found.read(Q).dequantize()  # type: ignore[union-attr]
    for rows, columns in ((slice(8, 24), None), (None, slice(16, 48)), (slice(3, 3), slice(0, 16))):
        part = found.read(Q, rows, columns).dequantize()  # type: ignore[union-attr]
        assert torch.equal(part, whole[rows or slice(None), columns or slice(None)])
    if method == "nvfp4":
        with pytest.raises(ModelError) as caught:
            found.read(Q, columns=slice(8, 24))
        assert caught.value.code == "quantized_shard"


def test_values_that_are_not_finite_and_widths_that_groups_do_not_divide_are_refused() -> None:
    bad = torch.zeros(2, 64)
    bad[1, 1] = torch.inf
    for method in ("fp8", "nvfp4"):
        with pytest.raises(ModelError) as caught:
            source(method, **{Q: bad}).read(Q)
        assert caught.value.code == "quantized_values"
    with pytest.raises(ModelError) as caught:
        source("nvfp4", **{Q: torch.zeros(2, 40)}).info(Q)
    assert caught.value.code == "quantized_group"


def test_a_model_without_experts_has_nothing_for_them() -> None:
    with pytest.raises(UsageError) as caught:
        Online("nvfp4-experts").formats([(Q, (40, 64))])
    assert caught.value.code == "nothing_to_quantize"


def test_the_fingerprint_tells_the_method() -> None:
    assert len({source(m).fingerprint() for m in ("fp8", "nvfp4", "nvfp4-experts")}) == 3
