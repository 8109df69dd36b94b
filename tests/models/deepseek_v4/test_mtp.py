"""DeepSeek V4's MTP module against one made of transformers' blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.deepseek_v4.oracle import HEAVY, SPARSE, Oracle, published_config
from models.harness import TOLERANCE, Loaded, text
from quire.engine.startup import kernel_facts
from quire.errors import ModelError
from quire.layers.build import Build
from quire.models.checkpoint import open_checkpoint
from quire.models.registry import build_model, build_mtp
from quire.weights.hub import resolve


@pytest.fixture
def oracle(tmp_path: Path) -> Oracle:
    return Oracle(tmp_path, compress_rates={SPARSE: 4, HEAVY: 128})


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_drafts_equal_those_of_transformers_blocks(
    oracle: Oracle, kernels: str, chunk: int | None
) -> None:
    tokens = text(40)
    following = [*tokens[1:], 5]
    _, streams = oracle.expected(tokens)
    logits, wanted = oracle.drafted(streams, following)
    ours = Loaded(oracle.published, kernels, drafting=True)
    drafter = ours.mtp
    assert drafter is not None
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
        build_mtp(config, build_model(config, build), build)
    assert caught.value.code == "no_drafter"


def test_a_checkpoint_whose_modules_weights_were_left_out_is_refused(oracle: Oracle) -> None:
    saved = oracle.path / "config.json"
    config = {**json.loads(saved.read_text()), "num_nextn_predict_layers": 1}
    saved.write_text(json.dumps(config))
    Loaded(oracle.path, "reference")
    with pytest.raises(ModelError) as caught:
        open_checkpoint(resolve(str(oracle.path)), drafting=True)
    assert caught.value.code == "no_drafter" and "'mtp.0.'" in str(caught.value)
