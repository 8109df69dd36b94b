"""DeepSeek V2 and V3 against transformers: latents, YaRN, experts in groups, shared experts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from quant.checkpoints import DEEPSEEK, of_scheme
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV3Config

from models.harness import TINY, Family, FamilyTests, Loaded, text
from quire.errors import ModelError
from quire.models.deepseek_v3 import Config

# Sizes that are no multiples of each other, so that none can stand in for another.
BASE = {
    **TINY,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
YARN = {
    "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
V3 = Family(
    config=DeepseekV3Config,
    base={**BASE, "rope_parameters": YARN},
    cases={
        "as published": {},
        "plain rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "mscales differ": {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5}},
        "halves rotate": {"rope_interleave": False},
        "queries without a latent": {"q_lora_rank": None},
        "one group": {"n_group": 1, "topk_group": 1},
        "weights not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
        "dense": {"first_k_dense_replace": 3},
        "biases": {"attention_bias": True},
    },
    older={"as published": {}},
    greedy=["as published"],
)
V2 = Family(
    config=DeepseekV2Config,
    base={
        **BASE,
        "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
    cases={
        "as published": {},
        "lite": {
            "q_lora_rank": None,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
        },
        "biases": {"attention_bias": True, "mlp_bias": True, "first_k_dense_replace": 2},
    },
    older={"lite": {}},
    greedy=["lite"],
)


class TestDeepseekV3(FamilyTests):
    family = V3


class TestDeepseekV2(FamilyTests):
    family = V2


# What DeepSeek-V3's config.json says (its tests' arithmetic below is by hand).
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "num_nextn_predict_layers": 1,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "rope_scaling": {
        "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    }, "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}  # fmt: skip


def test_the_published_config_is_read() -> None:
    config = Config.from_hf(PUBLISHED)
    # 0.1 ln 40 + 1 = 1.368888: its square scales logits of heads of 192, cosines stay as they are.
    assert config.scale == pytest.approx(1.3688879**2 / math.sqrt(192), rel=1e-6)
    assert config.sparse == (False,) * 3 + (True,) * 59  # the last is the MTP layer
    assert config.shared_intermediate == 2048 and config.mtp_layers == 1
    assert (config.grouped.groups, config.grouped.chosen, config.grouped.scale) == (8, 4, 2.5)
    # V2: 0.0707 ln 40 + 1 = 1.260804.
    v2 = {**PUBLISHED, "architectures": ["DeepseekV2ForCausalLM"], "topk_method": "greedy"}
    v2 |= {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0}
    v2["rope_scaling"] = {**PUBLISHED["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707}
    assert Config.from_hf(v2).scale == pytest.approx(1.2608037**2 / math.sqrt(192), rel=1e-6)
    assert Config.from_hf(v2).grouped.groups == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"topk_method": "best"}, "topk_method 'best'"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"topk_group": 9}, "9 of 8 groups"),
        ({"n_group": 7}, "from 4 of 7 groups"),
        ({"num_experts_per_tok": 129}, "129 of 256 experts"),
        ({"n_routed_experts": None}, "n_routed_experts is None"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
        ({"topk_method": "greedy", "scoring_func": "softmax"}, "norm_topk_prob with"),
    ],
)
def test_a_bad_config_is_an_error_that_names_the_key(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError) as caught:
        Config.from_hf({**PUBLISHED, **changes})
    assert says in str(caught.value)


def test_layers_that_predict_further_tokens_are_known_and_left_out(tmp_path: Path) -> None:
    """As V3 has them: quantised like the others, but for what stands at their ends."""
    path, _ = of_scheme(tmp_path, "fp8 blocks", DEEPSEEK)
    plain = Loaded(path, "reference").logits(text(9))
    tensors = load_file(path / "model.safetensors")
    last = [(name, value) for name, value in tensors.items() if name.startswith("model.layers.1.")]
    extra = {name.replace("layers.1.", "layers.2."): value.clone() for name, value in last}
    for name in (
        "enorm",
        "hnorm",
        "eh_proj",
        "embed_tokens",
        "shared_head.norm",
        "shared_head.head",
    ):
        size = (160,) if "norm" in name else (160, 160)
        extra[f"model.layers.2.{name}.weight"] = torch.ones(size)
    save_file({**tensors, **extra}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    assert torch.equal(Loaded(path, "reference").logits(text(9)), plain)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="would ignore"):
        Loaded(path, "reference")
