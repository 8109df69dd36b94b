"""Rotary tables against transformers' own, and parameters of both generations of config.json."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quire.errors import ModelError
from quire.kernels.reference import ops
from quire.layers.build import Build
from quire.layers.rotary import RotaryTable, rope_parameters

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 1000000.0},
        {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        {**LLAMA3, "rope_theta": 500000.0},
    ],
)
@pytest.mark.parametrize("head_size", [64, 128])
def test_tables_equal_transformers_to_the_bit(parameters: dict[str, Any], head_size: int) -> None:
    length = 3000
    config = LlamaConfig(
        hidden_size=head_size, num_attention_heads=1, rope_parameters=dict(parameters)
    )
    cosine, sine = LlamaRotaryEmbedding(config)(torch.empty(1), torch.arange(length)[None])
    table = RotaryTable(Build(ops, max_len=length), head_size, rope_parameters(config.to_dict()))()
    half = head_size // 2
    assert torch.equal(table[:, :half], cosine[0, :, :half])
    assert torch.equal(table[:, half:], sine[0, :, :half])


@pytest.mark.parametrize(
    "older",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "rope_type": None, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_theta": 7.0},
    ],
)
def test_both_generations_of_config_files_mean_the_same(older: dict[str, Any]) -> None:
    found = rope_parameters(older)
    assert found == {**LLAMA3, "rope_theta": 5e5, "partial_rotary_factor": 1.0}


def test_nothing_given_is_the_plain_rotation_with_base_10000() -> None:
    plain = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    for config in ({}, {"rope_scaling": None, "rope_theta": None}, {"rope_parameters": {}}):
        assert rope_parameters(config) == plain


def test_layers_of_equal_parameters_share_one_table_and_others_do_not() -> None:
    build = Build(ops, max_len=32)
    first, same, other = (
        RotaryTable(build, 16, rope_parameters({"rope_theta": theta})) for theta in (1e4, 1e4, 1e6)
    )
    assert not build.tables, "building allocates nothing"
    assert first() is same()
    assert first() is not other()
    assert sum(build.rotary_bytes.values()) * 32 == sum(t.nbytes for t in build.tables.values())


def test_a_part_of_the_head_may_rotate() -> None:
    whole = RotaryTable(Build(ops, max_len=9), 8, rope_parameters({}))()
    config = {"partial_rotary_factor": 0.5}
    part = RotaryTable(Build(ops, max_len=9), 16, rope_parameters(config))()
    assert torch.equal(part, whole)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 64}},
        *[
            {"rope_scaling": {**YARN, **change}, "rope_theta": theta}
            for theta, change in (
                (1.0, {}),
                (0.5, {}),
                (10**400, {}),
                (1e4, {"beta_fast": 1e-320}),
                (1e4, {"beta_slow": 1e308}),
                (1e4, {"original_max_position_embeddings": 1e308, "beta_slow": 1e-300}),
            )
        ],
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"rope_scaling": {**LLAMA3, "low_freq_factor": None}},
        {"rope_theta": "1e4"},
        {"partial_rotary_factor": 0.2},
        {"partial_rotary_factor": 2.0},
        {"partial_rotary_factor": 1e308},
    ],
)
def test_unknown_or_incomplete_parameters_are_refused_when_the_model_is_built(
    config: dict[str, Any],
) -> None:
    with pytest.raises(ModelError) as caught:
        RotaryTable(Build(ops), 16, rope_parameters(config))
    assert caught.value.code in ("bad_config", "unknown_rope")
