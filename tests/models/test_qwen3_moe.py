"""Qwen3-MoE against transformers: routing, normalised or not, and layers without experts."""

from pathlib import Path

import pytest
from transformers import Qwen3MoeConfig

from models.harness import TINY, Family, FamilyTests, Loaded
from quire.layers.moe import MoE

QWEN3_MOE = Family(
    config=Qwen3MoeConfig,
    base={
        **TINY,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    cases={
        "normalised": {},
        "not normalised": {"norm_topk_prob": False},
        "one expert": {"num_experts_per_tok": 1, "norm_topk_prob": False},
        "all experts": {"num_experts_per_tok": 6},
        "dense layer": {"mlp_only_layers": [1]},
        "every second": {"decoder_sparse_step": 2},
        "window": {"use_sliding_window": True, "sliding_window": 20, "attention_bias": True},
    },
    older={"normalised": {}},
    greedy=["normalised", "dense layer"],
)


class TestQwen3Moe(FamilyTests):
    family = QWEN3_MOE


@pytest.mark.parametrize(
    ("case", "sparse"),
    [
        ("normalised", [True, True, True]),
        ("dense layer", [True, False, True]),
        ("every second", [False, True, False]),
    ],
)
def test_the_right_layers_have_experts(case: str, sparse: list[bool], tmp_path: Path) -> None:
    path, _ = QWEN3_MOE.make(tmp_path, case)
    layers = Loaded(path, "reference").model.layers  # type: ignore[attr-defined]
    assert [isinstance(layer.mlp, MoE) for layer in layers] == sparse
