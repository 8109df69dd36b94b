"""Gemma 3 against transformers: sliding and global layers, each with its own rotary base."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3TextConfig

from models.harness import TINY, Loaded, check_greedy, check_logits, checkpoint, older_config

GEMMA = {
    **TINY,
    "num_hidden_layers": 4,
    "head_dim": 24,  # not hidden size / heads
    "query_pre_attn_scalar": 40,  # not the head size
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    },
}
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_parameters": LINEAR},
    "softcap": {"final_logit_softcapping": 3.0},
    "untied": {"tie_word_embeddings": False},
    "uneven": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "biases": {"attention_bias": True},
}


def make(path: Path, case: str) -> Any:
    return checkpoint(path / case, Gemma3TextConfig(**{**GEMMA, **CASES[case]}))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_whole_chunked_and_token_by_token(
    case: str, kernels: str, tmp_path: Path
) -> None:
    model = make(tmp_path, case)
    check_logits(tmp_path / case, model, kernels)


@pytest.mark.parametrize("case", ["plain", "linear"])
def test_older_config_files_give_the_same_logits(case: str, tmp_path: Path) -> None:
    model = make(tmp_path, case)
    rope = dict({**GEMMA, **CASES[case]}["rope_parameters"])
    scaling = {k: v for k, v in rope["full_attention"].items() if k != "rope_theta"}
    changes = {
        "rope_theta": 500000.0,
        "rope_local_base_freq": 5000.0,
        "rope_scaling": scaling if "factor" in scaling else None,
        "sliding_window_pattern": 2,
    }
    check_logits(older_config(tmp_path / case, changes), model, "reference")


@pytest.mark.parametrize(("case", "pools"), [("plain", {0}), ("uneven", {0, 1})])
def test_sliding_and_global_layers_share_a_pool_where_they_are_as_many(
    case: str, pools: set[int], tmp_path: Path
) -> None:
    make(tmp_path, case)
    groups = Loaded(tmp_path / case, "reference").groups
    assert {g.window for g in groups} == {None, 20}
    assert {g.pool for g in groups} == pools


@pytest.mark.parametrize("case", ["plain", "uneven", "softcap"])
def test_greedy_tokens_of_the_engine_are_those_of_transformers(
    case: str, kernels: str, tmp_path: Path
) -> None:
    model = make(tmp_path, case)
    check_greedy(tmp_path / case, model, kernels)
