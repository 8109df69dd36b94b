"""Qwen3-MoE: Qwen3 with experts in place of most feed-forward layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quire.layers.build import Build
from quire.layers.moe import MoE
from quire.models import llama
from quire.models.config import activation, expert_counts, whole
from quire.models.llama import Block, common


@dataclass(frozen=True)
class Config(llama.Config):
    """`sparse[i]`: layer i has experts."""

    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    normalize: bool = False
    sparse: tuple[bool, ...] = ()

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Config:
        """Qwen3-MoE's config.json: every `decoder_sparse_step`-th layer has experts, those in
        `mlp_only_layers` have none."""
        bias = bool(hf.get("attention_bias", False))
        values = common(hf, bool(hf.get("use_sliding_window", False)))
        every, dense = whole(hf, "decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
        experts, per_token = expert_counts(hf, values["layers"])
        return cls(
            **values,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=True,
            activation=activation(hf),
            experts=experts,
            experts_per_token=per_token,
            expert_intermediate=whole(hf, "moe_intermediate_size"),
            normalize=bool(hf.get("norm_topk_prob", False)),
            sparse=tuple(i not in dense and (i + 1) % every == 0 for i in range(values["layers"])),
        )


class Layer(llama.Layer):
    def make_mlp(self, config: Config, build: Build, name: str) -> Block:
        index = int(name.split(".")[2])
        if not config.sparse[index]:
            return super().make_mlp(config, build, name)
        return MoE(
            build,
            name,
            hidden=config.hidden,
            intermediate=config.expert_intermediate,
            experts=config.experts,
            experts_per_token=config.experts_per_token,
            normalize=config.normalize,
            activation=config.activation,
        )


class Model(llama.Model):
    layer_class = Layer
