"""Mistral against transformers, with a window shorter than the text."""

from pathlib import Path

from transformers import MistralConfig

from models.harness import Family, FamilyTests, Loaded

MISTRAL = Family(
    config=MistralConfig,
    # Below, at and above a block of the cache; 20 and 33 are no multiples of it.
    cases={f"window {size}": {"sliding_window": size} for size in (1, 16, 20, 33, None)},
    older={"window 20": {}},
    greedy=["window 20"],
)


class TestMistral(FamilyTests):
    family = MISTRAL


def test_every_layer_has_the_window(tmp_path: Path) -> None:
    path, _ = MISTRAL.make(tmp_path, "window 20")
    [group] = Loaded(path, "reference").groups
    assert (group.window, group.layers) == (20, (0, 1, 2))
