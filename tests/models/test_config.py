"""Reading config.json: good values of both generations, and an error that names each bad one."""

from typing import Any

import pytest

from quire.errors import ModelError
from quire.models.config import activation, head_size, layer_windows, number, text_config, whole
from quire.models.registry import read_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("value", [0, -1, 1.5, "12", True, [4], 2**31])
def test_a_size_must_be_a_positive_whole_number(value: Any) -> None:
    with pytest.raises(ModelError, match="hidden_size"):
        whole({"hidden_size": value}, "hidden_size")
    with pytest.raises(ModelError):
        read_config({**LLAMA, "hidden_size": value})


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2 * 10**9},
        {"num_experts": 10**9, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        {
            "num_hidden_layers": 1024,
            "num_experts": 4096,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
        },
    ],
)
def test_sizes_that_would_keep_a_plan_busy_for_ever_are_refused(changes: dict[str, Any]) -> None:
    name = "Qwen3MoeForCausalLM" if "num_experts" in changes else "LlamaForCausalLM"
    with pytest.raises(ModelError) as caught:
        read_config({**LLAMA, "architectures": [name], **changes})
    assert caught.value.code == "bad_config"


def test_a_missing_size_is_an_error_and_a_default_stands_in_for_null() -> None:
    with pytest.raises(ModelError, match="vocab_size"):
        whole({}, "vocab_size")
    assert whole({"heads": None}, "heads", 3) == 3


@pytest.mark.parametrize("value", ["x", True, float("nan"), float("inf")])
def test_a_number_must_be_finite(value: Any) -> None:
    with pytest.raises(ModelError, match="rms_norm_eps"):
        number({"rms_norm_eps": value}, "rms_norm_eps", 1e-6)


def test_the_head_size_is_given_or_follows_from_the_heads() -> None:
    assert head_size({"hidden_size": 64, "num_attention_heads": 4}) == 16
    assert head_size({"hidden_size": 64, "num_attention_heads": 4, "head_dim": 40}) == 40
    assert head_size({"hidden_size": 64, "num_attention_heads": 4, "head_dim": None}) == 16
    with pytest.raises(ModelError, match="multiple"):
        head_size({"hidden_size": 65, "num_attention_heads": 4})


def test_windows_follow_layer_types_or_else_all_layers_from_the_first_one() -> None:
    types = ["sliding_attention", "full_attention"]
    config = {"sliding_window": 8, "layer_types": types}
    assert layer_windows(config, 2, sliding=True) == [8, None]
    assert layer_windows(config, 2, sliding=False) == [None, None]
    assert layer_windows({"sliding_window": 8}, 3, sliding=True, first=2) == [None, None, 8]
    assert layer_windows({"sliding_window": None}, 2, sliding=True) == [None, None]
    with pytest.raises(ModelError, match="3 layers"):
        layer_windows(config, 3, sliding=True)
    with pytest.raises(ModelError, match="chunked_attention"):
        layer_windows({"layer_types": ["chunked_attention"]}, 1, sliding=True)


def test_an_activation_that_is_not_known_is_refused() -> None:
    assert activation({}) == "silu"
    assert activation({"hidden_act": "gelu_pytorch_tanh"}) == "gelu_tanh"
    for name in ("gelu", "relu2", ["silu"]):
        with pytest.raises(ModelError, match="hidden_act"):
            read_config({**LLAMA, "hidden_act": name})


def test_a_text_config_stands_over_the_whole_one() -> None:
    nested = {"hidden_size": 1, "text_config": {"hidden_size": 2}, "vocab_size": 3}
    assert text_config(nested)["hidden_size"] == 2
    assert text_config(nested)["vocab_size"] == 3


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_key_value_heads": 3}, "KV heads"),
        ({"rope_parameters": "linear"}, "rope parameters"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        read_config({**LLAMA, **changes})


def test_more_experts_per_token_than_experts_are_refused() -> None:
    moe = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 2, "num_experts_per_tok": 3}
    with pytest.raises(ModelError, match="3 of 2"):
        read_config({**LLAMA, **moe, "moe_intermediate_size": 8})


def test_a_model_that_attends_in_both_directions_is_refused() -> None:
    gemma = {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}
    with pytest.raises(ModelError, match="both directions"):
        read_config({**LLAMA, **gemma, "sliding_window": 8})
