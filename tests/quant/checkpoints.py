"""Tiny checkpoints, quantised and not, with the same values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quant.stored import SCHEMES, Maker
from quire.kernels.reference import ops
from quire.layers.build import Build
from quire.models.registry import build_model

# Sizes that no block of 128 divides.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 160,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
QWEN3_MOE: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}
# A head's rows of kv_b_proj are a block of 128, and what else is as small as groups allow.
DEEPSEEK: dict[str, Any] = {
    **LLAMA,
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": 160,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
DENSE = ("embed_tokens", "lm_head", "gate")


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model."""
    build = Build(ops)
    build_model(config, build)
    return {t.name: t.shape for w in build.weights for t in w.tensors()}


def write(
    directory: Path,
    config: dict[str, Any],
    quantization: dict[str, Any] | None,
    maker: Maker | None,
) -> tuple[Path, Path]:
    """(quantised checkpoint, one of the same values without quantisation). Values are scaled so
    that layers keep the size of what passes through them."""
    generator = torch.Generator().manual_seed(1)
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, shape in tensors(config).items():
        module = name.rpartition(".")[0]
        if maker is not None and len(shape) == 2 and module.rpartition(".")[2] not in DENSE:
            parts, values = maker(*shape, generator)
            stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        else:
            values = torch.randn(shape, generator=generator)
            values = 1 + 0.3 * values if len(shape) == 1 else values / math.sqrt(shape[1])
            stored[name] = values
        plain[name] = values
    paths = directory / "quantised", directory / "plain"
    for path, found, extra in (
        (paths[0], stored, {"quantization_config": quantization} if quantization else {}),
        (paths[1], plain, {}),
    ):
        path.mkdir(parents=True)
        save_file({n: t.contiguous() for n, t in found.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({**config, **extra}))
    return paths


def of_scheme(directory: Path, scheme: str, config: dict[str, Any] = LLAMA) -> tuple[Path, Path]:
    quantization, maker, _ = SCHEMES[scheme]
    return write(directory, config, quantization, maker)
