"""Qwen3 against transformers: norms on query and key heads, a head size of its own."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import Qwen3Config

from models.harness import (
    TINY,
    check_greedy,
    check_logits,
    checkpoint,
    gguf_checkpoint,
    older_config,
)

CASES: dict[str, dict[str, Any]] = {
    "plain": {"head_dim": 16},
    "tied": {"head_dim": 32, "tie_word_embeddings": True},
    "biases": {"head_dim": 16, "attention_bias": True},
    "default head size": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "window": {
        "head_dim": 16,
        "sliding_window": 20,
        "use_sliding_window": True,
        "max_window_layers": 2,
    },
}


def make(path: Path, case: str) -> Any:
    return checkpoint(path / case, Qwen3Config(**{**TINY, **CASES[case]}))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_whole_chunked_and_token_by_token(
    case: str, kernels: str, tmp_path: Path
) -> None:
    model = make(tmp_path, case)
    check_logits(tmp_path / case, model, kernels)


@pytest.mark.parametrize("case", ["plain", "window"])
def test_older_config_files_give_the_same_logits(case: str, tmp_path: Path) -> None:
    model = make(tmp_path, case)
    check_logits(older_config(tmp_path / case, CASES[case]), model, "reference")


@pytest.mark.parametrize("case", ["plain", "window"])
def test_greedy_tokens_of_the_engine_are_those_of_transformers(
    case: str, kernels: str, tmp_path: Path
) -> None:
    model = make(tmp_path, case)
    check_greedy(tmp_path / case, model, kernels)


@pytest.mark.parametrize("case", ["plain", "tied"])
def test_a_gguf_file_gives_the_same_logits(case: str, kernels: str, tmp_path: Path) -> None:
    model = make(tmp_path, case)
    file = gguf_checkpoint(tmp_path / "model.gguf", model, gguf.MODEL_ARCH.QWEN3)
    check_logits(file, model, kernels)
