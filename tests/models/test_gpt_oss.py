"""gpt-oss against transformers: sinks, windows in turn, YaRN, experts with biases, MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quant.stored import mxfp4
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig

from models.harness import TINY, Family, FamilyTests, check_greedy, check_logits
from quire.errors import ModelError, PlanError
from quire.models.gpt_oss import Config

YARN = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 32, "rope_theta": 150000.0,
}  # fmt: skip
GPT_OSS = Family(
    config=GptOssConfig,
    base={
        **TINY,
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "intermediate_size": 32,
        "sliding_window": 20,
        "rope_parameters": YARN,
    },
    cases={
        "yarn": {},
        "truncated": {"rope_parameters": {**YARN, "truncate": True, "factor": 8.0}},
        "given factor": {"rope_parameters": {**YARN, "attention_factor": 0.9}},
        "published rope": {"rope_parameters": None},
        "plain rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "all full": {"layer_types": ["full_attention"] * 3},
        "one expert": {"num_experts_per_tok": 1},
        "no attention bias": {"attention_bias": False},
    },
    older={"yarn": {}},
    greedy=["yarn"],
)


class TestGptOss(FamilyTests):
    family = GPT_OSS


def quantise(path: Path, model: Any) -> None:
    """Gives the checkpoint's experts random MXFP4 codes, and the model their values."""
    generator = torch.Generator().manual_seed(4)
    make = mxfp4("blocks", "scales")
    tensors = load_file(path / "model.safetensors")
    state = model.state_dict()
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, width, rows = tensors.pop(name).shape
        made = [make(rows, width, generator) for _ in range(experts)]
        blocks = torch.stack([parts["blocks"] for parts, _ in made])
        tensors[f"{name}_blocks"] = blocks.view(experts, rows, width // 32, 16)
        tensors[f"{name}_scales"] = torch.stack([parts["scales"] for parts, _ in made])
        state[name].copy_(torch.stack([values.T for _, values in made]))
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (path / "config.json").write_text(json.dumps(config))


def test_mxfp4_experts_give_the_logits_of_their_values(kernels: str, tmp_path: Path) -> None:
    path, model = GPT_OSS.make(tmp_path, "yarn")
    quantise(path, model)
    check_logits(path, model, kernels)
    check_greedy(path, model, kernels, new_tokens=8)


@pytest.mark.parametrize(
    "change",
    [
        {"swiglu_limit": 5.0},
        {"swiglu_alpha": 1.0},
        {"num_experts_per_tok": 7},
        {"layer_types": ["full_attention"]},
    ],
)
def test_configs_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    config = GptOssConfig(**GPT_OSS.base).to_dict()
    with pytest.raises(ModelError):
        Config.from_hf({**config, **change})


def test_a_gpu_refuses_it_with_the_reason() -> None:
    from plan.test_gpu import plan

    config = {**GptOssConfig(**GPT_OSS.base).to_dict(), "architectures": ["GptOssForCausalLM"]}
    with pytest.raises(PlanError, match="biases") as caught:
        plan(config)
    assert caught.value.code == "unsupported_experts"
