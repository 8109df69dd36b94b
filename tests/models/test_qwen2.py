"""Qwen2 against transformers: biases on query, key and value, windows in the upper layers."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from models.harness import TINY, Loaded, check_greedy, check_logits, checkpoint, older_config

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "window off": {"sliding_window": 20, "use_sliding_window": False},
    "window": {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 1},
}


def make(path: Path, case: str) -> Any:
    return checkpoint(path / case, Qwen2Config(**{**TINY, **CASES[case]}))


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


def test_layers_below_max_window_layers_see_everything(tmp_path: Path) -> None:
    make(tmp_path, "window")
    for path in (tmp_path / "window", older_config(tmp_path / "window", {})):
        groups = Loaded(path, "reference").groups
        assert {(g.window, g.layers) for g in groups} == {(None, (0,)), (20, (1, 2))}


@pytest.mark.parametrize("case", ["plain", "window"])
def test_greedy_tokens_of_the_engine_are_those_of_transformers(
    case: str, kernels: str, tmp_path: Path
) -> None:
    model = make(tmp_path, case)
    check_greedy(tmp_path / case, model, kernels)
