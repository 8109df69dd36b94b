"""Parts of quantised weights that are missing, do not fit or cannot be right are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers.source import Tensors

from quant.stored import SCHEMES, Parts, whole_numbers
from quire.errors import ModelError
from quire.quant.config import read_scheme
from quire.quant.integers import PackedIntegers
from quire.quant.source import QuantizedSource

NAME = "model.layers.0.mlp.up_proj"
CHANNEL = whole_numbers(4, None)
Change = Callable[[Parts], Any]


def refusal(scheme: str, change: Change, columns: int = 256, **config: Any) -> ModelError:
    """How a weight is refused whose parts `change` has spoilt, at opening or reading."""
    known, maker, _ = SCHEMES[scheme]
    parts, _ = maker(256, columns, torch.Generator().manual_seed(0))
    change(parts)
    parsed = read_scheme({"quantization_config": {**known, **config}})
    assert parsed is not None
    with pytest.raises(ModelError) as caught:
        source = QuantizedSource(Tensors({f"{NAME}.{p}": t for p, t in parts.items()}), parsed)
        source.read(f"{NAME}.weight")
    error = caught.value
    assert NAME in error.what and error.why and error.fix
    return error


NEEDED = {
    "fp8 tensor": ["weight_scale"],
    "fp8 static": ["weight_scale", "input_scale"],
    "fp8 blocks": ["weight_scale_inv"],
    "fp8 blocks ue8m0": ["scale"],
    "ct nvfp4": ["weight_scale", "weight_global_scale"],
    "modelopt nvfp4": ["weight_scale", "weight_scale_2"],
    "ct mxfp4": ["weight_scale"],
    "ct w4a16": ["weight_scale"],
    "ct w4a16 zeros": ["weight_zero_point"],
    "ct w4a16 ordered": ["weight_g_idx"],
    "ct w8a8": ["weight_scale"],
    "gptq": ["scales", "qzeros"],
    "gptq ordered": ["g_idx"],
    "awq": ["scales", "qzeros"],
}


@pytest.mark.parametrize(("scheme", "part"), [(s, p) for s, ps in NEEDED.items() for p in ps])
def test_a_missing_part_is_named(scheme: str, part: str) -> None:
    error = refusal(scheme, lambda parts: parts.pop(part))
    assert error.code == "quantized_part_missing" and part in error.why


@pytest.mark.parametrize(("scheme", "part"), [(s, p) for s, ps in NEEDED.items() for p in ps])
def test_a_part_of_another_shape_is_refused(scheme: str, part: str) -> None:
    def change(parts: Parts) -> None:
        kind = parts[part].dtype
        parts[part] = torch.zeros(3, 5).to(kind)

    error = refusal(scheme, change)
    assert error.code == "quantized_part_mismatch" and part in error.why


@pytest.mark.parametrize(("scheme", "part"), [(s, p) for s, ps in NEEDED.items() for p in ps])
def test_a_part_of_another_dtype_is_refused(scheme: str, part: str) -> None:
    error = refusal(scheme, lambda parts: parts.update({part: parts[part].double()}))
    assert error.code == "quantized_part_mismatch" and "f64" in error.why


@pytest.mark.parametrize(
    ("scheme", "columns"),
    [("ct nvfp4", 248), ("ct mxfp4", 240), ("ct w4a16", 240), ("gptq", 240), ("awq", 240)],
)
def test_groups_that_do_not_divide_the_columns_are_refused(scheme: str, columns: int) -> None:
    def cut(parts: Parts) -> None:
        if "qweight" in parts:
            parts["qweight"] = parts["qweight"][: columns if scheme == "awq" else columns // 8]
        else:
            name = "weight_packed"
            parts[name] = parts[name][:, : columns // (8 if scheme == "ct w4a16" else 2)]
        parts.pop("weight_shape", None)

    assert refusal(scheme, cut).code == "quantized_group"


def fill(part: str, value: float) -> Change:
    def change(parts: Parts) -> None:
        whole = parts[part].float()
        whole.view(-1)[0] = value
        parts[part] = whole.to(parts[part].dtype)

    return change


@pytest.mark.parametrize(
    ("scheme", "part", "value"),
    [
        *[(s, "weight_scale", v) for s in ("fp8 tensor", "ct fp8 channel") for v in (0.0, -1.0)],
        *[("fp8 blocks", "weight_scale_inv", v) for v in (0.0, -1.0, torch.inf, torch.nan)],
        *[("ct w4a16", "weight_scale", v) for v in (torch.inf, torch.nan)],
        *[("gptq", "scales", v) for v in (torch.inf, torch.nan)],
        *[("awq", "scales", v) for v in (torch.inf, torch.nan)],
        *[("modelopt nvfp4", "weight_scale_2", v) for v in (0.0, -1.0, torch.inf, torch.nan)],
        *[("ct nvfp4", "weight_global_scale", v) for v in (0.0, -1.0, torch.inf, torch.nan)],
        *[("ct nvfp4", "weight_scale", v) for v in (-1.0, torch.nan)],
        *[("fp8 static", "input_scale", v) for v in (0.0, -1.0, torch.inf, torch.nan)],
        ("ct nvfp4", "weight_global_scale", 1e-40),  # one over it is infinite
        ("fp8 tensor", "weight", torch.nan),
        ("gptq ordered", "g_idx", 8.0),
        ("gptq ordered", "g_idx", -1.0),
    ],
)
def test_values_that_cannot_be_right_are_refused(scheme: str, part: str, value: float) -> None:
    assert refusal(scheme, fill(part, value)).code == "quantized_values"


@pytest.mark.parametrize("scheme", ["ct w4a16", "awq"])
def test_four_bits_in_an_odd_number_of_columns_are_refused(scheme: str) -> None:
    def cut(parts: Parts) -> None:
        if scheme == "awq":
            parts["qweight"] = parts["qweight"][:33]
            parts.update({name: parts[name][:1] for name in ("scales", "qzeros")})
        else:
            parts["weight_packed"] = parts["weight_packed"][:, :5]
            parts["weight_scale"] = parts["weight_scale"][:, :1]
            parts["weight_shape"] = torch.tensor([256, 33])

    change: dict[str, Any] = {"group_size": -1}
    if scheme != "awq":
        change = {"config_groups": {"g": {"targets": ["Linear"], "weights": CHANNEL}}}
    error = refusal(scheme, cut, **change)
    assert error.code == "quantized_part_mismatch" and "33 columns" in error.why


def test_parts_that_do_not_fit_are_not_blamed_on_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError while a whole weight is read is about its parts; about a share, the share."""
    known, maker, _ = SCHEMES["ct w4a16"]
    parts, _ = maker(256, 256, torch.Generator().manual_seed(0))
    parsed = read_scheme({"quantization_config": known})
    assert parsed is not None
    source = QuantizedSource(Tensors({f"{NAME}.{p}": t for p, t in parts.items()}), parsed)

    def fails(*_: Any) -> None:
        raise ValueError("scales and codes contradict each other")

    monkeypatch.setattr(PackedIntegers, "read", fails)
    for part, code in ((None, "quantized_part_mismatch"), (slice(0, 8), "quantized_shard")):
        with pytest.raises(ModelError) as caught:
            source.read(f"{NAME}.weight", part)
        assert caught.value.code == code


def test_a_nan_among_powers_of_two_is_refused() -> None:
    def change(parts: Parts) -> None:
        parts["weight_scale"][3, 1] = 255

    assert refusal("ct mxfp4", change).code == "quantized_values"


@pytest.mark.parametrize(
    ("scheme", "part"), [("ct nvfp4", "weight_scale"), ("gptq", "scales"), ("awq", "scales")]
)
def test_zero_scales_that_come_of_rounding_are_zeros(scheme: str, part: str) -> None:
    known, maker, _ = SCHEMES[scheme]
    parts, _ = maker(256, 256, torch.Generator().manual_seed(0))
    fill(part, 0.0)(parts)
    parsed = read_scheme({"quantization_config": known})
    assert parsed is not None
    source = QuantizedSource(Tensors({f"{NAME}.{p}": t for p, t in parts.items()}), parsed)
    values = source.read(f"{NAME}.weight").dequantize()  # type: ignore[union-attr]
    assert not values[0, :16].any() and values.isfinite().all()


def test_a_zero_scale_over_zeros_is_nothing_wrong() -> None:
    known, maker, _ = SCHEMES["ct fp8 channel"]
    parts, _ = maker(256, 256, torch.Generator().manual_seed(0))
    codes = parts["weight"].float()
    codes[0] = 0
    parts["weight"] = codes.to(torch.float8_e4m3fn)
    fill("weight_scale", 0.0)(parts)
    parsed = read_scheme({"quantization_config": known})
    assert parsed is not None
    source = QuantizedSource(Tensors({f"{NAME}.{p}": t for p, t in parts.items()}), parsed)
    assert not source.read(f"{NAME}.weight", slice(0, 1)).dequantize().any()  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_that_contradicts_the_config_is_refused(scheme: str) -> None:
    def dense(parts: Parts) -> None:
        parts.clear()
        parts["weight"] = torch.ones(256, 256)

    error = refusal(scheme, dense)
    assert error.code == "quantization_contradiction" and SCHEMES[scheme][2] in error.why
    key = "ignore" if "ct" in scheme or "modelopt" in scheme else "modules_to_not_convert"
    error = refusal(scheme, lambda parts: None, **{key: ["mlp"]})
    assert error.code == "quantization_contradiction"


@pytest.mark.parametrize("scheme", ["ct fp8 channel", "ct w4a16", "ct w8a8"])
def test_zero_points_that_the_config_does_not_tell_are_refused_unless_zero(scheme: str) -> None:
    known, maker, _ = SCHEMES[scheme]
    parts, values = maker(256, 256, torch.Generator().manual_seed(0))
    parts["weight_zero_point"] = torch.zeros(256, 1, dtype=torch.int8)
    parsed = read_scheme({"quantization_config": known})
    assert parsed is not None
    source = QuantizedSource(Tensors({f"{NAME}.{p}": t for p, t in parts.items()}), parsed)
    found = source.read(f"{NAME}.weight").dequantize()  # type: ignore[union-attr]
    torch.testing.assert_close(found, values)

    def change(parts: Parts) -> None:
        parts["weight_zero_point"] = torch.ones(256, 1, dtype=torch.int8)

    assert refusal(scheme, change).code == "quantization_contradiction"


def test_columns_in_an_order_that_the_config_does_not_tell_are_refused() -> None:
    def change(parts: Parts) -> None:
        parts["g_idx"] = parts["g_idx"].flip(0)

    assert refusal("gptq", change).code == "quantization_contradiction"


def test_another_scheme_than_the_files_have_is_refused() -> None:
    """FP8 files with a config of GPTQ, and the other way round."""
    gptq, fp8 = SCHEMES["gptq"][0], SCHEMES["fp8 tensor"][0]
    for config, scheme in ((gptq, "fp8 tensor"), (fp8, "gptq")):
        parts, _ = SCHEMES[scheme][1](256, 256, torch.Generator())
        parsed = read_scheme({"quantization_config": config})
        assert parsed is not None
        with pytest.raises(ModelError) as caught:
            QuantizedSource(Tensors({f"{NAME}.{p}": t for p, t in parts.items()}), parsed)
        assert caught.value.code == "quantized_part_missing"
