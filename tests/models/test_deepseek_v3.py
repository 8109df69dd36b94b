"""DeepSeek V2 and V3 against transformers: latents, YaRN, experts in groups, shared experts."""

from __future__ import annotations

from transformers import DeepseekV2Config, DeepseekV3Config

from models.harness import TINY, Family, FamilyTests

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
