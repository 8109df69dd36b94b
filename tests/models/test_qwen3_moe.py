"""Qwen3-MoE against transformers: routing, normalised or not, and layers without experts."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig

from models.harness import TINY, Loaded, check_greedy, check_logits, checkpoint, older_config
from quire.layers.moe import MoE

MOE = {
    **TINY,
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
CASES: dict[str, dict[str, Any]] = {
    "normalised": {},
    "not normalised": {"norm_topk_prob": False},
    "one expert": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "all experts": {"num_experts_per_tok": 6},
    "dense layer": {"mlp_only_layers": [1]},
    "every second": {"decoder_sparse_step": 2},
    "window": {"use_sliding_window": True, "sliding_window": 20, "attention_bias": True},
}


def make(path: Path, case: str) -> Any:
    return checkpoint(path / case, Qwen3MoeConfig(**{**MOE, **CASES[case]}))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_whole_chunked_and_token_by_token(
    case: str, kernels: str, tmp_path: Path
) -> None:
    model = make(tmp_path, case)
    check_logits(tmp_path / case, model, kernels)


@pytest.mark.parametrize(
    ("case", "sparse"),
    [
        ("normalised", [True, True, True]),
        ("dense layer", [True, False, True]),
        ("every second", [False, True, False]),
    ],
)
def test_the_right_layers_have_experts(case: str, sparse: list[bool], tmp_path: Path) -> None:
    make(tmp_path, case)
    layers = Loaded(tmp_path / case, "reference").model.layers  # type: ignore[attr-defined]
    assert [isinstance(layer.mlp, MoE) for layer in layers] == sparse


def test_older_config_files_give_the_same_logits(tmp_path: Path) -> None:
    model = make(tmp_path, "normalised")
    check_logits(older_config(tmp_path / "normalised", {}), model, "reference")


@pytest.mark.parametrize("case", ["normalised", "dense layer"])
def test_greedy_tokens_of_the_engine_are_those_of_transformers(
    case: str, kernels: str, tmp_path: Path
) -> None:
    model = make(tmp_path, case)
    check_greedy(tmp_path / case, model, kernels)
