"""Shared fixtures: tiny models as config.json directories, loaded with dummy weights.

Triton kernels are tested in Triton's interpreter, and on the GPU where there is one. The
interpreter is chosen when a kernel is defined, so this file must come before any kernel.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

WriteModel = Callable[..., str]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a GPU, `-m gpu` has what computes there and not in the interpreter."""
    if torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("triton"):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> WriteModel:
    """Writes a config.json (the tiny Llama with changes) and returns its directory."""

    def write(**changes: Any) -> str:
        directory: Path = tmp_path_factory.mktemp("model")
        (directory / "config.json").write_text(json.dumps({**TINY_LLAMA, **changes}))
        return str(directory)

    return write


@pytest.fixture(scope="session")
def tiny_llama(write_model: WriteModel) -> str:
    return write_model()


@pytest.fixture(scope="session")
def tiny_gemma(write_model: WriteModel) -> str:
    """Sliding and global layers mixed: two KV groups."""
    return write_model(
        architectures=["Gemma3ForCausalLM"],
        model_type="gemma3_text",
        head_dim=16,
        num_hidden_layers=4,
        sliding_window=24,
        sliding_window_pattern=2,
        query_pre_attn_scalar=16,
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="session")
def tiny_moe(write_model: WriteModel) -> str:
    return write_model(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
        norm_topk_prob=True,
    )


@pytest.fixture(scope="session")
def tiny_latents(write_model: WriteModel) -> str:
    """One latent per token, no experts."""
    from runner.engines import FAMILIES

    return write_model(**{**FAMILIES["deepseek_v3"], "first_k_dense_replace": 2})


@pytest.fixture(scope="session")
def tiny_deepseek(write_model: WriteModel) -> str:
    """One latent per token, experts in groups beside a shared one."""
    from runner.engines import FAMILIES

    return write_model(**FAMILIES["deepseek_v3"])
