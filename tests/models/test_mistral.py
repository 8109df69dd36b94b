"""Mistral against transformers, with a window shorter than the text."""

from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig

from models.harness import TINY, Loaded, check_greedy, check_logits, checkpoint, older_config

# Below, at and above a block of the cache; 20 and 33 are no multiples of it.
WINDOWS = [1, 16, 20, 33, None]


def make(path: Path, window: int | None) -> Any:
    return checkpoint(path, MistralConfig(**TINY, sliding_window=window))


@pytest.mark.parametrize("window", WINDOWS)
def test_logits_equal_transformers_whole_chunked_and_token_by_token(
    window: int | None, kernels: str, tmp_path: Path
) -> None:
    model = make(tmp_path / "model", window)
    check_logits(tmp_path / "model", model, kernels)


def test_every_layer_has_the_window(tmp_path: Path) -> None:
    make(tmp_path / "model", 20)
    [group] = Loaded(tmp_path / "model", "reference").groups
    assert (group.window, group.layers) == (20, (0, 1, 2))


def test_older_config_files_give_the_same_logits(tmp_path: Path) -> None:
    model = make(tmp_path / "model", 20)
    check_logits(older_config(tmp_path / "model", {}), model, "reference")


def test_greedy_tokens_of_the_engine_are_those_of_transformers(
    kernels: str, tmp_path: Path
) -> None:
    model = make(tmp_path / "model", 20)
    check_greedy(tmp_path / "model", model, kernels)
