"""The right file for an architecture, and no checkpoint that differs from its config is loaded."""

from typing import Any

import pytest
import torch

from models.deepseek_v4.published import FLASH
from models.test_config import LLAMA
from quire.errors import ModelError
from quire.kernels.reference import ops
from quire.layers.build import Build
from quire.models import (
    deepseek_v3,
    deepseek_v4,
    gemma3,
    gpt_oss,
    llama,
    mistral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from quire.models.registry import ARCHITECTURES, build_model, load_weights, read_config
from quire.weights.dummy import DummySource
from quire.weights.source import TensorInfo

FILES = [
    *(llama, mistral, qwen2, qwen3, qwen3_moe, gemma3, gpt_oss),
    *(deepseek_v3, deepseek_v3, deepseek_v4),
]
# Families whose config has nothing in common with the others'.
OWN = {"DeepseekV4ForCausalLM": {**FLASH, "n_routed_experts": 6}}
EXTRA = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "sliding_window": 8,
    "n_routed_experts": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def needed(hf: dict[str, Any]) -> tuple[Build, dict[str, TensorInfo]]:
    build = Build(ops)
    build_model(hf, build)
    return build, {t.name: t for w in build.weights for t in w.tensors()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_builds_the_model_of_its_file(name: str) -> None:
    file = FILES[list(ARCHITECTURES).index(name)]
    hf = {**OWN.get(name, {**LLAMA, **EXTRA}), "architectures": [name]}
    assert isinstance(read_config(hf), file.Config)  # type: ignore[attr-defined]
    assert isinstance(build_model(hf, Build(ops)), file.Model)  # type: ignore[attr-defined]


@pytest.mark.parametrize("names", [None, [], ["LlamaForCausaLM"], [["x"]], "LlamaForCausalLM"])
def test_an_unknown_architecture_is_an_error_for_people(names: Any) -> None:
    with pytest.raises(ModelError, match="architecture") as caught:
        read_config({**LLAMA, "architectures": names})
    assert "LlamaForCausalLM" in caught.value.fix


def test_only_nearly_the_same_architecture_is_suggested_and_all_known_are_listed() -> None:
    for name, close in (
        ("Qwen33MoeForCausalLM", None),
        ("QwenMoe3ForCausalLM", "Qwen3MoeForCausalLM"),
        ("LLamaForCausalLM", "LlamaForCausalLM"),
        ("Llama4ForCausalLM", None),
        ("FalconForCausalLM", None),
    ):
        with pytest.raises(ModelError) as caught:
            read_config({**LLAMA, "architectures": [name]})
        fix = caught.value.fix
        assert fix.startswith(f"did you mean {close!r}?" if close else "known: ")
        assert all(known in fix for known in ARCHITECTURES)


def test_building_allocates_nothing_so_that_a_plan_can_be_made_of_any_model() -> None:
    build, tensors = needed({**LLAMA, "num_hidden_layers": 4, "vocab_size": 2**20})
    assert sum(t.nbytes for t in tensors.values()) > 2**27
    assert all(not c.tensors for c in build.caches)


def test_progress_grows_to_one() -> None:
    build, tensors = needed(LLAMA)
    seen: list[float] = []
    load_weights(build, DummySource(list(tensors.values())), seen.append)
    assert seen == sorted(seen)
    assert (len(seen), seen[-1]) == (len(build.weights), 1.0)


def test_a_missing_tensor_a_wrong_shape_and_an_unknown_tensor_are_refused() -> None:
    build, tensors = needed(LLAMA)
    name = "model.layers.1.mlp.up_proj.weight"
    norm = TensorInfo("model.layers.0.self_attn.q_norm.weight", (16,), "bf16")
    wrong = TensorInfo(name, (95, 64), "bf16")
    for broken, code in (
        ({k: v for k, v in tensors.items() if k != name}, "missing_tensor"),
        ({**tensors, name: wrong}, "wrong_shape"),
        ({**tensors, norm.name: norm}, "unknown_tensor"),
    ):
        with pytest.raises(ModelError) as caught:
            load_weights(build, DummySource(list(broken.values())))
        assert caught.value.code == code


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_bias_that_no_layer_asks_for_is_left_out_where_it_is_zero(value: float) -> None:
    build, tensors = needed(LLAMA)
    bias = TensorInfo("model.layers.0.self_attn.q_proj.bias", (64,), "bf16")
    source = DummySource([*tensors.values(), bias], values={bias.name: value})
    if value == 0.0:
        load_weights(build, source)
        return
    with pytest.raises(ModelError) as caught:
        load_weights(build, source)
    assert caught.value.code == "unknown_tensor"


def test_tables_that_follow_from_the_config_and_a_copied_head_are_no_unknown_tensors() -> None:
    build, tensors = needed({**LLAMA, "tie_word_embeddings": True})
    assert "lm_head.weight" not in tensors
    derived = [
        TensorInfo("lm_head.weight", (100, 64), "bf16"),
        TensorInfo("model.layers.0.self_attn.rotary_emb.inv_freq", (8,), "f32"),
    ]
    load_weights(build, DummySource([*tensors.values(), *derived]))


def test_a_tied_head_uses_the_embedding_itself() -> None:
    build, tensors = needed({**LLAMA, "tie_word_embeddings": True})
    model = build_model({**LLAMA, "tie_word_embeddings": True}, build)
    source = DummySource(list(tensors.values()))
    for weight in build.weights:
        weight.load(source)
    table = source.read("model.embed_tokens.weight")
    assert isinstance(table, torch.Tensor)
    hidden = torch.randn(3, 64)
    assert torch.allclose(model.logits(hidden), hidden @ table.float().T, atol=1e-5)
