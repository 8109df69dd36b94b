"""Gemma 3 against transformers: sliding and global layers, each with its own rotary base."""

from pathlib import Path

import pytest
from transformers import Gemma3TextConfig

from models.harness import TINY, Family, FamilyTests, Loaded

LOCAL = {"rope_type": "default", "rope_theta": 5000.0}
LINEAR = {"rope_type": "linear", "factor": 8.0}
# What stands for rope_parameters and layer_types in older files.
OLDER = {
    "rope_theta": 500000.0,
    "rope_local_base_freq": 5000.0,
    "rope_scaling": None,
    "sliding_window_pattern": 2,
}

GEMMA3 = Family(
    config=Gemma3TextConfig,
    base={
        **TINY,
        "num_hidden_layers": 4,
        "head_dim": 24,  # not hidden size / heads
        "query_pre_attn_scalar": 40,  # not the head size
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
            "sliding_attention": LOCAL,
        },
    },
    cases={
        "plain": {},
        "linear": {
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 500000.0},
                "sliding_attention": LOCAL,
            }
        },
        "softcap": {"final_logit_softcapping": 3.0},
        "untied": {"tie_word_embeddings": False},
        "uneven": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
        "biases": {"attention_bias": True},
    },
    older={"plain": OLDER, "linear": {**OLDER, "rope_scaling": LINEAR}},
    greedy=["plain", "uneven", "softcap"],
)


class TestGemma3(FamilyTests):
    family = GEMMA3


@pytest.mark.parametrize(("case", "pools"), [("plain", {0}), ("uneven", {0, 1})])
def test_sliding_and_global_layers_share_a_pool_where_they_are_as_many(
    case: str, pools: set[int], tmp_path: Path
) -> None:
    path, _ = GEMMA3.make(tmp_path, case)
    groups = Loaded(path, "reference").groups
    assert {g.window for g in groups} == {None, 20}
    assert {g.pool for g in groups} == pools
