"""The published configs are read; later architectures and contradictions are refused."""

from __future__ import annotations

from typing import Any

import pytest

from models.deepseek_v4.published import FLASH, PRO
from quire.errors import ModelError
from quire.kernels.reference import ops
from quire.layers.build import Build
from quire.layers.rotary import inverse_frequencies
from quire.models.deepseek_v4.config import Config
from quire.models.registry import build_model, read_config


def test_flash_has_two_layers_of_windows_alone_and_alternating_ones() -> None:
    config = Config.from_hf(FLASH)
    ratios = [layer.ratio for layer in config.layers]
    assert ratios == [0, 0, *[4, 128] * 20, 4]
    assert [layer.sparse for layer in config.layers] == [ratio == 4 for ratio in ratios]
    assert [layer.hashed for layer in config.layers] == [True] * 3 + [False] * 40
    assert (config.block_tokens, config.overlap, config.mtp_layers) == (128, 4, 1)
    assert (config.experts, config.experts_per_token, config.route_scale) == (256, 6, 1.5)


def test_pro_begins_with_two_heavily_compressed_layers() -> None:
    ratios = [layer.ratio for layer in Config.from_hf(PRO).layers]
    assert len(ratios) == 61 and ratios == [128, 128, *[4, 128] * 29, 4]


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_yarn_changes_compressed_layers_alone(key: str) -> None:
    scaling = {k: v for k, v in FLASH["rope_scaling"].items() if k != "type"}
    config = Config.from_hf({**FLASH, "rope_scaling": {**scaling, key: "yarn"}})
    plain = inverse_frequencies(64, config.rope)
    scaled = inverse_frequencies(64, config.compressed_rope)
    # 10000 ** (-2 j / 64); with YaRN pairs below 15 stay and those from 25 on turn 16 times slower.
    assert [round(float(x), 6) for x in (plain[0], plain[16])] == [1.0, 0.01]
    base = [160000.0 ** (-2 * j / 64) for j in range(32)]
    ratio = [float(x) / b for x, b in zip(scaled, base, strict=True)]
    assert all(abs(r - 1) < 1e-5 for r in ratio[:16])
    assert all(abs(r - 1 / 16) < 1e-5 for r in ratio[25:])
    assert abs(ratio[20] - (0.5 + 0.5 / 16)) < 1e-5


def test_the_tensors_of_flash_are_those_of_the_published_files() -> None:
    build = Build(ops)
    build_model({**FLASH, "n_routed_experts": 2, "num_experts_per_tok": 1}, build)
    found = {info.name: info.shape for weight in build.weights for info in weight.tensors()}
    # Shapes as headers of the published files have them.
    for name, shape in {
        "embed.weight": (129280, 4096),
        "head.weight": (129280, 4096),
        "norm.weight": (4096,),
        "hc_head_fn": (4, 16384),
        "hc_head_base": (4,),
        "hc_head_scale": (1,),
        "layers.7.attn_norm.weight": (4096,),
        "layers.7.hc_attn_fn": (24, 16384),
        "layers.7.hc_ffn_base": (24,),
        "layers.7.hc_ffn_scale": (3,),
        "layers.7.attn.wq_a.weight": (1024, 4096),
        "layers.7.attn.wkv.weight": (512, 4096),
        "layers.7.attn.q_norm.weight": (1024,),
        "layers.7.attn.kv_norm.weight": (512,),
        "layers.7.attn.wq_b.weight": (32768, 1024),
        "layers.7.attn.wo_a.weight": (8192, 4096),
        "layers.7.attn.wo_b.weight": (4096, 8192),
        "layers.7.attn.attn_sink": (64,),
        "layers.7.attn.compressor.wkv.weight": (512, 4096),
        "layers.7.attn.compressor.ape": (128, 512),
        "layers.8.attn.compressor.wgate.weight": (1024, 4096),
        "layers.8.attn.compressor.ape": (4, 1024),
        "layers.8.attn.compressor.norm.weight": (512,),
        "layers.8.attn.indexer.wq_b.weight": (8192, 1024),
        "layers.8.attn.indexer.weights_proj.weight": (64, 4096),
        "layers.8.attn.indexer.compressor.wkv.weight": (256, 4096),
        "layers.8.attn.indexer.compressor.ape": (4, 256),
        "layers.8.attn.indexer.compressor.norm.weight": (128,),
        "layers.2.ffn.gate.tid2eid": (129280, 1),
        "layers.3.ffn.gate.bias": (2,),
        "layers.3.ffn.gate.weight": (2, 4096),
        "layers.3.ffn.shared_experts.w2.weight": (4096, 2048),
        "layers.3.ffn.experts.1.w1.weight": (2048, 4096),
        "layers.3.ffn.experts.1.w2.weight": (4096, 2048),
        "layers.3.ffn.experts.1.w3.weight": (2048, 4096),
    }.items():
        assert found[name] == shape, name
    assert not {name for name in found if name.startswith("layers.0.attn.compressor")}
    assert not {name for name in found if name.startswith("layers.7.attn.indexer")}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "deepseek_v41"}, "later architecture"),
        ({"architectures": ["DeepseekV41ForCausalLM"]}, "later architecture"),
        ({"engram_layers": [1]}, "later architecture"),
        ({"dspark_block_size": 5}, "DSpark"),
        ({"num_nextn_predict_layers": 3}, "DSpark"),
        (
            {
                "num_nextn_predict_layers": 3,
                "compress_ratios": [*FLASH["compress_ratios"], 0, 0],
            },
            "DSpark",
        ),
    ],
)
def test_later_checkpoints_are_recognised_and_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        read_config({**FLASH, **change})
    assert caught.value.code == "unsupported_model"
    assert next(iter(change)) in caught.value.why and "DeepSeek-V4-Flash" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"compress_ratios": FLASH["compress_ratios"][:-1]}, "43 entries for 43 layers and 1 MTP"),
        ({"compress_ratios": [*FLASH["compress_ratios"][:-1], 4]}, "MTP modules are"),
        ({"compress_ratios": [*[2] * 43, 0]}, "has 2"),
        ({"compress_ratios": [*[[4]] * 43, 0]}, "has "),
        ({"compress_ratios": None}, "how layers compress is missing"),
        ({"compress_ratios": None, "layer_types": ["x"] * 43, "compress_rates": {}}, "has 'x'"),
        ({"num_nextn_predict_layers": 0}, "44 entries for 43 layers and 0 MTP"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"attention_bias": True}, "attention_bias"),
        ({"o_groups": 7}, "does not fit together"),
        ({"num_experts_per_tok": 257}, "does not fit together"),
        ({"index_head_dim": 32}, "does not fit together"),
        ({"max_position_embeddings": 64}, "does not fit together"),
        ({"swiglu_limit": 0}, "does not fit together"),
        ({"hc_mult": 1000}, "does not fit together"),
        ({"hc_sinkhorn_iters": 100000}, "does not fit together"),
        ({"qk_rope_head_dim": 63}, "63 of 512"),
        ({"mlp_layer_types": ["moe"]}, "mlp_layer_types"),
        ({"mlp_layer_types": [["moe"]] * 43}, "mlp_layer_types"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"rope_scaling": {"type": "dynamic"}}, "not known"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        build_model({**FLASH, "n_routed_experts": 6, **change}, Build(ops))
