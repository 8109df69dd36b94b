"""Tiny random DeepSeek V3 checkpoints with the MTP layer, which transformers itself leaves out: one
assembled from its blocks."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

from models.harness import checkpoint


class Drafting(nn.Module):
    """The published module for multi-token prediction, out of transformers' blocks."""

    def __init__(self, config: DeepseekV3Config):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        larger = deepcopy(config)
        larger.num_hidden_layers += 1
        larger.layer_types = None
        larger._attn_implementation = "eager"
        self.enorm = hf.DeepseekV3RMSNorm(hidden, eps=eps)
        self.hnorm = hf.DeepseekV3RMSNorm(hidden, eps=eps)
        self.norm = hf.DeepseekV3RMSNorm(hidden, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.block = hf.DeepseekV3DecoderLayer(larger, config.num_hidden_layers)

    @torch.inference_mode()
    def forward(
        self, target: Any, hidden: torch.Tensor, following: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and hidden states of one sequence: hidden [1, T, H], following tokens [1, T]."""
        token = self.enorm(target.model.embed_tokens(following))
        x = self.eh_proj(torch.cat([token, self.hnorm(hidden)], dim=-1))
        place = torch.arange(x.shape[1])
        mask = torch.zeros(len(place), len(place)).masked_fill(place > place[:, None], -torch.inf)
        x = self.block(
            x,
            position_embeddings=target.model.rotary_emb(x, position_ids=place[None]),
            attention_mask=mask[None, None],
            position_ids=place[None],
        )
        x = self.norm(x)
        return target.lm_head(x), x


class WithMTP:
    """A checkpoint of transformers in `path`, with the layer `drafting` behind its last."""

    def __init__(self, path: Path, config: DeepseekV3Config, seed: int = 0):
        self.path = path
        self.model = checkpoint(path, config, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            self.drafting = Drafting(config).eval()
            for name, weight in self.drafting.named_parameters():
                if "norm" in name:
                    weight.data.uniform_(0.5, 1.5)
                else:
                    weight.data.normal_(std=0.2)
            for name, values in self.drafting.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    values.uniform_(-0.3, 0.3)
        self.write(load_file(path / "model.safetensors") | self._tensors())
        found = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**found, "num_nextn_predict_layers": 1}))

    @property
    def prefix(self) -> str:
        return f"model.layers.{self.model.config.num_hidden_layers}."

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """The checkpoint's tensors."""
        found = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(found, self.path / "model.safetensors")

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The module's tensors: transformers names those of the block when it saves a model of
        which this is a layer. And copies of embedding and head, as published checkpoints have."""
        changes = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "layer_types": None}
        single = DeepseekV3ForCausalLM(DeepseekV3Config(**self.model.config.to_dict() | changes))
        single.model.layers[0].load_state_dict(self.drafting.block.state_dict())
        single.save_pretrained(self.path / "drafting")
        begin = "model.layers.0."
        found = {
            self.prefix + name.removeprefix(begin): tensor
            for name, tensor in load_file(self.path / "drafting" / "model.safetensors").items()
            if name.startswith(begin)
        }
        for name in ("enorm", "hnorm", "eh_proj"):
            found[f"{self.prefix}{name}.weight"] = getattr(self.drafting, name).weight.detach()
        found[f"{self.prefix}shared_head.norm.weight"] = self.drafting.norm.weight.detach()
        found[f"{self.prefix}shared_head.head.weight"] = self.model.lm_head.weight.detach()
        found[f"{self.prefix}embed_tokens.weight"] = self.model.model.embed_tokens.weight.detach()
        return found

    @torch.inference_mode()
    def expected(
        self, tokens: list[int], following: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of one sequence: the model's hidden states [T, H], and of the module's logits [T, V] and
        hidden states [T, H]."""
        hidden = self.model.model(torch.tensor([tokens])).last_hidden_state
        logits, found = self.drafting(self.model, hidden, torch.tensor([following]))
        return hidden[0], logits[0], found[0]
