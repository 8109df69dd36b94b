"""Tiny random DeepSeek V4 checkpoints of transformers, under published names and as it saves them,
with an MTP module assembled from its blocks."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

SLIDING, SPARSE, HEAVY = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
LAYERS = [SLIDING, SPARSE, HEAVY, SPARSE]
YARN = {
    "type": "yarn", "rope_type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# swiglu_limit and index_topk are small so that clamping and choosing happen; with fewer index heads
# scores of exactly zero are so many that ties decide.
TINY: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "qk_rope_head_dim": 16,
    "q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 20, "n_routed_experts": 8,
    "n_shared_experts": 1, "num_experts_per_tok": 3, "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True, "routed_scaling_factor": 1.5, "swiglu_limit": 1.0, "sliding_window": 8,
    "index_n_heads": 16, "index_head_dim": 24, "index_topk": 6, "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
    "rope_theta": 10000.0, "compress_rope_theta": 160000.0, "rope_scaling": YARN,
    "layer_types": LAYERS, "compress_rates": {SPARSE: 4, HEAVY: 16}, "num_hash_layers": 2,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1, "attn_implementation": "eager",
}  # fmt: skip
# How models differ from TINY.
CASES: dict[str, dict[str, Any]] = {
    "all kinds": {},
    "sizes": {
        "head_dim": 48, "num_attention_heads": 6, "o_groups": 3, "o_lora_rank": 16, "hc_mult": 3,
        "hc_sinkhorn_iters": 4, "sliding_window": 21, "index_topk": 3, "num_experts_per_tok": 2,
        "routed_scaling_factor": 2.5, "num_hash_layers": 1,
    },
    "no windows alone": {
        "layer_types": [HEAVY, HEAVY, SPARSE, HEAVY], "num_hash_layers": 0, "hc_sinkhorn_iters": 2,
    },
    "windows alone": {"layer_types": [SLIDING] * 2, "num_hidden_layers": 2, "hc_eps": 1e-3},
    "heavy alone": {"layer_types": [HEAVY] * 2, "num_hidden_layers": 2, "rms_norm_eps": 1e-3},
}  # fmt: skip


def published_config(config: DeepseekV4Config) -> dict[str, Any]:
    """config.json with the fields of the published ones (rates 4 and 128)."""
    ratios = {SLIDING: 0, **config.compress_rates}
    names = (
        "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "q_lora_rank", "o_groups",
        "o_lora_rank", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
        "scoring_func", "norm_topk_prob", "routed_scaling_factor", "swiglu_limit",
        "sliding_window", "index_n_heads", "index_head_dim", "index_topk", "hc_mult",
        "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "max_position_embeddings", "rope_theta",
        "compress_rope_theta", "num_nextn_predict_layers", "tie_word_embeddings", "hidden_act",
        "bos_token_id", "eos_token_id", "qk_rope_head_dim",
    )  # fmt: skip
    scaling = {key: value for key, value in YARN.items() if key != "rope_type"}
    return {
        **{name: getattr(config, name) for name in names},
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "float32",
        "num_hash_layers": config.mlp_layer_types.count("hash_moe"),
        "topk_method": "noaux_tc",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": scaling,
        "compress_ratios": [*(ratios[kind] for kind in config.layer_types), 0],
    }


@torch.no_grad()
def randomise(module: nn.Module, config: DeepseekV4Config, seed: int) -> None:
    """All parameters and tables: transformers leaves sinks, biases, bases and tables at zero."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor, deviation: float) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) * deviation

    for name, weight in module.named_parameters():
        if "norm" in name:
            weight.copy_(1 + noise(weight, 0.1))
        elif name.endswith("scale"):
            weight.copy_(1 + noise(weight, 0.2))
        elif name.endswith(("position_bias", "base")):
            weight.copy_(noise(weight, 0.5))
        elif name.endswith("sinks") or "embed_tokens" in name:
            weight.copy_(noise(weight, 1.0))
        else:
            weight.copy_(noise(weight, 1.3 * weight.shape[-1] ** -0.5))
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(noise(buffer, 0.3))
        elif name.endswith("tid2eid"):
            rows = [
                torch.randperm(config.n_routed_experts, generator=generator)
                for _ in range(config.vocab_size)
            ]
            buffer.copy_(torch.stack(rows)[:, : config.num_experts_per_tok])


class Drafting(nn.Module):
    """The published MTP module out of transformers' blocks, which itself has none."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        kinds = {
            "layer_types": [*config.layer_types, SLIDING],
            "mlp_layer_types": [*config.mlp_layer_types, "moe"],
            "num_hidden_layers": config.num_hidden_layers + 1,
        }
        larger = DeepseekV4Config(**{**config.to_dict(), **kinds})
        larger._attn_implementation = "eager"
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.window = config.sliding_window
        self.enorm = hf.DeepseekV4RMSNorm(hidden, eps=eps)
        self.hnorm = hf.DeepseekV4RMSNorm(hidden, eps=eps)
        self.norm = hf.DeepseekV4RMSNorm(hidden, eps=eps)
        self.e_proj = nn.Linear(hidden, hidden, bias=False)
        self.h_proj = nn.Linear(hidden, hidden, bias=False)
        self.block = hf.DeepseekV4DecoderLayer(larger, config.num_hidden_layers)
        self.hc_head = hf.DeepseekV4HyperHead(larger)

    def forward(
        self, target: Any, streams: torch.Tensor, following: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and streams of one sequence: streams [1, T, n, D], following tokens [1, T]."""
        token = self.e_proj(self.enorm(target.model.embed_tokens(following)))
        x = token[:, :, None] + self.h_proj(self.hnorm(streams))
        place = torch.arange(x.shape[1])
        seen = (place <= place[:, None]) & (place > place[:, None] - self.window)
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
        rotary, ids = target.model.rotary_emb, place[None]
        x = self.block(
            x,
            position_embeddings={
                kind: rotary(x, position_ids=ids, layer_type=kind) for kind in ("main", "compress")
            },
            position_ids=ids,
            attention_mask=mask,
            input_ids=following,
            past_key_values=None,
        )
        return target.lm_head(self.norm(self.hc_head(x))), x


# Published names of what transformers saves otherwise; `attn.norm` is the norm of keys.
PUBLISHED = {
    "model.embed_tokens.weight": "embed.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}


def published_name(name: str) -> str:
    name = PUBLISHED.get(name, name).removeprefix("model.")
    return name.replace(".attn.norm.weight", ".attn.kv_norm.weight")


class Oracle:
    """A checkpoint in `path` as transformers saves it, and one in `published` under published
    names, with MTP module. `model` and `drafting` are transformers'."""

    def __init__(self, path: Path, **changes: Any):
        self.path, self.published = path / "saved", path / "published"
        # A copy: transformers adds to the tables that it is given.
        self.config = DeepseekV4Config(**deepcopy({**TINY, **changes}))
        with torch.random.fork_rng():
            self.model = DeepseekV4ForCausalLM(self.config).eval()
            self.drafting = Drafting(self.config).eval()
        randomise(self.model, self.config, 0)
        randomise(self.drafting, self.config, 7)
        self.model.save_pretrained(self.path)
        self.published.mkdir()
        tensors = load_file(self.path / "model.safetensors")
        found = {published_name(name): tensor for name, tensor in tensors.items()}
        save_file(found | self._drafting_tensors(path), self.published / "model.safetensors")
        config = json.loads((self.path / "config.json").read_text())
        if set(self.config.compress_rates.values()) == {4, 128}:
            config = published_config(self.config)
        (self.published / "config.json").write_text(json.dumps(config))

    def _drafting_tensors(self, path: Path) -> dict[str, torch.Tensor]:
        """The module's tensors: transformers names those of the block when it saves a model of
        which this is a layer."""
        kinds = {"layer_types": [SLIDING], "mlp_layer_types": ["moe"], "num_hidden_layers": 1}
        single = DeepseekV4ForCausalLM(DeepseekV4Config(**{**self.config.to_dict(), **kinds}))
        single.model.layers[0].load_state_dict(self.drafting.block.state_dict())
        single.save_pretrained(path / "drafting")
        tensors = load_file(path / "drafting" / "model.safetensors")
        shutil.rmtree(path / "drafting")
        begin = "model.layers.0."
        found = {
            f"mtp.0.{published_name(name.removeprefix(begin))}": tensor
            for name, tensor in tensors.items()
            if name.startswith(begin)
        }
        for name in ("enorm", "hnorm", "norm", "e_proj", "h_proj"):
            found[f"mtp.0.{name}.weight"] = getattr(self.drafting, name).weight.detach()
        for name in ("fn", "base", "scale"):
            found[f"mtp.0.hc_head_{name}"] = getattr(self.drafting.hc_head, f"hc_{name}").detach()
        return {name: tensor.contiguous().clone() for name, tensor in found.items()}

    @torch.inference_mode()
    def expected(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T, V] of one sequence, and its streams [T, n * D] after the last layer."""
        caught: list[torch.Tensor] = []
        layer = self.model.model.layers[-1]
        hook = layer.register_forward_hook(lambda module, inputs, output: caught.append(output))
        logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0]
        hook.remove()
        return logits, caught[0][0].flatten(1)

    @torch.inference_mode()
    def drafted(
        self, streams: torch.Tensor, following: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T, V] and streams [T, n * D] of the MTP module."""
        wide = streams.view(1, len(following), self.config.hc_mult, -1)
        logits, found = self.drafting(self.model, wide, torch.tensor([following]))
        return logits[0], found[0].flatten(1)
