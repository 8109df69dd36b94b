"""Llama against transformers: rope scalings, tied and untied heads, biases, any head size."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import LlamaConfig

from models.harness import (
    TINY,
    check_greedy,
    check_logits,
    checkpoint,
    gguf_checkpoint,
    older_config,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "multi-head": {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
    "head size": {"head_dim": 24, "num_key_value_heads": 1},
}


def make(path: Path, case: str) -> Any:
    return checkpoint(path / case, LlamaConfig(**{**TINY, **CASES[case]}))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_whole_chunked_and_token_by_token(
    case: str, kernels: str, tmp_path: Path
) -> None:
    model = make(tmp_path, case)
    check_logits(tmp_path / case, model, kernels)


@pytest.mark.parametrize("case", ["plain", "llama3", "linear"])
def test_older_config_files_give_the_same_logits(case: str, tmp_path: Path) -> None:
    model = make(tmp_path, case)
    check_logits(older_config(tmp_path / case, {}), model, "reference")


@pytest.mark.parametrize("case", ["tied", "llama3"])
def test_greedy_tokens_of_the_engine_are_those_of_transformers(
    case: str, kernels: str, tmp_path: Path
) -> None:
    model = make(tmp_path, case)
    check_greedy(tmp_path / case, model, kernels)


@pytest.mark.parametrize("case", ["plain", "tied", "head size"])
def test_a_gguf_file_gives_the_same_logits(case: str, kernels: str, tmp_path: Path) -> None:
    model = make(tmp_path, case)
    file = gguf_checkpoint(tmp_path / "model.gguf", model, gguf.MODEL_ARCH.LLAMA)
    check_logits(file, model, kernels)
