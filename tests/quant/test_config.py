"""Quantisation configs as they are in the wild, and those that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from quant.stored import DEEPSEEK, FP4, GPTQ, MODELOPT, SCHEMES, compressed, float8, whole_numbers
from quire.errors import ModelError
from quire.quant.config import read_scheme
from quire.quant.names import Patterns
from quire.quant.scheme import Scheme

LAYER = "model.layers.3"
Q, GATE = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.gate_proj"
EXPERT, ROUTER = f"{LAYER}.mlp.experts.7.up_proj", f"{LAYER}.mlp.gate"
DENSE = ("lm_head", "model.embed_tokens", ROUTER)


def scheme(config: dict[str, Any]) -> Scheme:
    found = read_scheme({"quantization_config": config})
    assert found is not None
    return found


def format_of(found: Scheme, module: str) -> str | None:
    storage = found.find(module)
    return None if storage is None else storage.format


@pytest.mark.parametrize("name", SCHEMES)
def test_each_scheme_tells_the_format_of_linears_and_leaves_the_rest(name: str) -> None:
    config, _, expected = SCHEMES[name]
    found = scheme(config)
    assert {format_of(found, m) for m in (Q, GATE, EXPERT)} == {expected}
    assert [format_of(found, module) for module in DENSE] == [None] * len(DENSE)


def test_a_config_may_stand_inside_the_text_config_or_have_its_old_name_or_a_file() -> None:
    assert read_scheme({}) is None and read_scheme({}, {}) is None
    for hf in ({"text_config": {"quantization_config": GPTQ}}, {"compression_config": GPTQ}):
        found = read_scheme(hf)
        assert found is not None and format_of(found, Q) == "int4"
    in_file = {
        "producer": {"name": "modelopt"},
        "quantization": {
            "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
            "exclude_modules": ["lm_head", "model.layers.3.self_attn*"],
        },
    }  # fmt: skip
    found = read_scheme({}, in_file)
    assert found is not None and found.kv_cache == "fp8"
    assert format_of(found, EXPERT) == "nvfp4" and format_of(found, Q) is None


@pytest.mark.parametrize(
    ("algorithm", "format"),
    [
        ("fp8_pb_wo", "fp8_block"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "fp8"),
        ("FP8", "fp8"),
        ("NVFP4", "nvfp4"),
        ("W4A16_NVFP4", "nvfp4"),
    ],
)
def test_algorithms_of_modelopt(algorithm: str, format: str) -> None:
    found = scheme({**MODELOPT, "quant_algo": algorithm})
    assert format_of(found, Q) == format
    assert found.quantises_tokens(Q) == (algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"))


def test_mixed_precision_tells_each_layer() -> None:
    layers = {Q: {"quant_algo": "FP8"}, EXPERT: {"quant_algo": "NVFP4", "group_size": 16}}
    config = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    found = read_scheme({}, {"quantization": config})
    assert found is not None
    assert [format_of(found, m) for m in (Q, EXPERT, GATE)] == ["fp8", "nvfp4", None]


def test_groups_of_compressed_tensors_count_by_name_before_class() -> None:
    config = float8("channel")
    groups = config["config_groups"]
    groups["group_0"]["format"] = "float-quantized"
    weights = {**FP4, "strategy": "tensor_group", "group_size": 16}
    groups["group_1"] = {
        "targets": ["re:.*experts.*"], "weights": weights, "format": "nvfp4-pack-quantized",
    }  # fmt: skip
    found = scheme({**config, "format": "mixed-precision"})
    assert [format_of(found, m) for m in (EXPERT, Q)] == ["nvfp4", "fp8"]


def test_gpt_oss_quantises_experts_only() -> None:
    config = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    found = scheme(config)
    assert format_of(found, EXPERT) == "mxfp4"
    assert [format_of(found, m) for m in (Q, f"{LAYER}.mlp.router", "lm_head")] == [None] * 3


def test_deepseek_v4_has_blocks_of_fp8_and_experts_of_four_bits() -> None:
    found = scheme({**DEEPSEEK, "scale_fmt": "ue8m0", "expert_dtype": "fp4"})
    assert format_of(found, "layers.4.ffn.experts.11.w1") == "mxfp4"
    assert format_of(found, "layers.4.ffn.shared_experts.w1") == "fp8_block"
    assert format_of(found, "layers.4.attn.wq_a") == "fp8_block"
    nvidia = scheme({**DEEPSEEK, "expert_dtype": "fp4", "moe_quant_algo": "NVFP4"})
    assert format_of(nvidia, "layers.4.ffn.experts.11.w1") == "nvfp4"


def test_gptq_may_change_or_leave_out_modules() -> None:
    dynamic = {"-:.*self_attn.*": {}, "+:.*experts.*": {"bits": 8, "group_size": -1}}
    found = scheme({**GPTQ, "dynamic": dynamic})
    assert [format_of(found, m) for m in (Q, EXPERT, GATE)] == [None, "int8", "int4"]


@pytest.mark.parametrize(
    ("pattern", "meant", "not_meant"),
    [
        ("lm_head", ["lm_head"], ["lm_head2", "model.lm_heads"]),
        ("gate", [ROUTER], [GATE, f"{LAYER}.mlp.gates"]),
        (LAYER, [Q, LAYER], ["model.layers.30.self_attn.q_proj", "model.layers.33"]),
        ("self_attn", [Q], [EXPERT]),
        ("model.layers.*.self_attn", [Q], [GATE]),
        ("model.layers.3*", [Q, "model.layers.31.mlp.up_proj"], ["model.layers.4.mlp"]),
        ("*mlp.gate", [ROUTER], [GATE]),
        ("*.experts.*", [EXPERT], [Q]),
        ("*.layers.[0-3].*", [Q, EXPERT], ["model.layers.4.mlp", "model.layers.13.mlp"]),
        ("*.layers.?", [Q], ["model.layers.13", "model.layers"]),
        ("*.w1", ["experts.0.w1", "experts.1.w1"], ["experts.1.w2", "experts.1.w11"]),
        ("w1", ["experts.0.w1", "experts.1.w1"], ["experts.1.w2", "experts.1.w11"]),
        ("re:.*mlp[.]gate$", [ROUTER], [GATE]),
        ("re:model[.]layers[.][0-3][.]", [Q], ["model.layers.4.x", "a.model.layers.3.x"]),
    ],
)
def test_patterns_mean_modules_and_what_lies_in_them(
    pattern: str, meant: list[str], not_meant: list[str]
) -> None:
    patterns = Patterns(["another", pattern])
    assert [patterns.first(module) for module in meant] == [1] * len(meant)
    assert [patterns.first(module) for module in not_meant] == [None] * len(not_meant)


UNKNOWN: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes"},
    "3 bits": {**GPTQ, "bits": 3},
    "marlin": {**GPTQ, "checkpoint_format": "marlin"},
    "marlin format": {**GPTQ, "is_marlin_format": True},
    "gemv": {"quant_method": "awq", "bits": 4, "version": "gemv"},
    "e5m2": {"quant_method": "fp8", "fmt": "e5m2"},
    "blocks of": {**DEEPSEEK, "weight_block_size": [1, 128]},
    "activation_scheme": {"quant_method": "fp8", "activation_scheme": "block"},
    "fp6": {**DEEPSEEK, "expert_dtype": "fp6"},
    "W4A8_AWQ": {**MODELOPT, "quant_algo": "W4A8_AWQ"},
    "groups of 32": {**MODELOPT, "group_size": 32},
    "marlin-24": compressed("marlin-24", whole_numbers(4, 128)),
    "of 2 bits": compressed("pack-quantized", whole_numbers(2, 128)),
    "strategy": float8("token"),
    "sparsity": {**float8("channel"), "sparsity_config": {"format": "sparse-24-bitmask"}},
    "mxfp8": compressed("mxfp8-quantized", {"type": "float", "num_bits": 8, "strategy": "group"}),
}


@pytest.mark.parametrize("named", UNKNOWN)
def test_what_is_not_known_is_refused_by_name(named: str) -> None:
    with pytest.raises(ModelError, match=named) as caught:
        scheme(UNKNOWN[named])
    assert caught.value.code == "unknown_quantization" and "gptq" in caught.value.fix


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": 4},
        {"bits": 4},
        {**GPTQ, "group_size": 0},
        {**GPTQ, "group_size": "32"},
        {**GPTQ, "desc_act": "yes"},
        {**GPTQ, "dynamic": ["x"]},
        {"quant_method": "fp8", "modules_to_not_convert": "lm_head"},
        {"quant_method": "modelopt", "quant_algo": None},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "compressed-tensors", "config_groups": {"a": 1}},
        compressed("pack-quantized", whole_numbers(4.0, 128)),  # type: ignore[arg-type]
        compressed("float-quantized", {**FP4, "num_bits": 8.0, "strategy": "channel"}),
    ],
)
def test_what_makes_no_sense_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        scheme(config)
    assert caught.value.code == "bad_quantization"


@pytest.mark.parametrize("pattern", ["re:(", "re:" + "a" * 500, "re:a{99999999999}"])
def test_expressions_that_are_bad_are_refused(pattern: str) -> None:
    with pytest.raises(ModelError) as caught:
        scheme({"quant_method": "fp8", "modules_to_not_convert": [pattern]}).find(Q)
    assert caught.value.code == "bad_quantization"
