"""Qwen2 against transformers: biases on query, key and value, windows in the upper layers."""

from pathlib import Path

from transformers import Qwen2Config

from models.harness import Family, FamilyTests, Loaded, older_config

WINDOW = {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 1}

QWEN2 = Family(
    config=Qwen2Config,
    cases={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "window off": {"sliding_window": 20, "use_sliding_window": False},
        "window": WINDOW,
    },
    older={"plain": {}, "window": WINDOW},
    greedy=["plain", "window"],
)


class TestQwen2(FamilyTests):
    family = QWEN2


def test_layers_below_max_window_layers_see_everything(tmp_path: Path) -> None:
    path, _ = QWEN2.make(tmp_path, "window")
    for each in (path, older_config(path, {})):
        groups = Loaded(each, "reference").groups
        assert {(g.window, g.layers) for g in groups} == {(None, (0,)), (20, (1, 2))}
