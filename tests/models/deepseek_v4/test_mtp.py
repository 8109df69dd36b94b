"""DeepSeek V4's MTP module against one made of transformers' blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.deepseek_v4.oracle import HEAVY, SPARSE, Oracle, published_config
from models.harness import TOLERANCE, Loaded, text
from quire.engine.startup import kernel_facts
from quire.errors import ModelError
from quire.layers.build import Build
from quire.models.deepseek_v4 import Config, Model
from quire.models.deepseek_v4.mtp import Drafter
from quire.models.deepseek_v4.names import adapt_drafter
from quire.models.registry import load_weights
from quire.weights import open_source
from quire.weights.hub import resolve


@pytest.fixture
def oracle(tmp_path: Path) -> Oracle:
    return Oracle(tmp_path, compress_rates={SPARSE: 4, HEAVY: 128})


def drafter_of(target: Loaded, path: Path) -> Drafter:
    """The module with weights, beside the target in its Build."""
    weights, target.build.weights = target.build.weights, []
    drafter = Drafter(target.model, target.build)
    with adapt_drafter(open_source(resolve(str(path)))) as source:
        load_weights(target.build, source)
    target.build.weights += weights
    target.allocate()
    return drafter


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_drafts_equal_those_of_transformers_blocks(
    oracle: Oracle, kernels: str, chunk: int | None
) -> None:
    tokens = text(40)
    following = [*tokens[1:], 5]
    _, streams = oracle.expected(tokens)
    logits, wanted = oracle.drafted(streams, following)
    ours = Loaded(oracle.published, kernels)
    drafter = drafter_of(ours, oracle.published)
    given = torch.tensor(following)
    with torch.inference_mode():
        parts = [
            drafter.forward(streams[part], given[part], positions, step)
            for part, positions, step in ours.steps(len(tokens), chunk)
        ]
        found = torch.cat(parts)
        assert (found - wanted).abs().max() < TOLERANCE
        assert (drafter.logits(found) - logits).abs().max() < TOLERANCE


def test_a_checkpoint_without_module_is_refused(oracle: Oracle) -> None:
    build = Build(kernel_facts().reference)
    config = {**published_config(oracle.config), "num_nextn_predict_layers": 0}
    config["compress_ratios"].pop()
    with pytest.raises(ModelError) as caught:
        Drafter(Model(Config.from_hf(config), build), build)
    assert caught.value.code == "no_drafter"
