"""gpt-oss: experts with biases and a clamped SwiGLU in every layer, attention with sinks, sliding
and full layers in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quire.errors import ModelError
from quire.kernels.reference.activation.gated_activation import SWIGLU_ALPHA, SWIGLU_LIMIT
from quire.layers.build import Build
from quire.layers.moe import MoE
from quire.layers.rotary import rope_parameters
from quire.models import llama
from quire.models.config import expert_counts, number, whole
from quire.models.llama import Block, common
from quire.weights.fused_experts import FusedExperts
from quire.weights.source import WeightSource

# What the family's configs leave out where it is as in the published models.
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
    "rope_theta": 150000.0,
}


@dataclass(frozen=True)
class Config(llama.Config):
    """`intermediate` is that of an expert."""

    experts: int = 0
    experts_per_token: int = 0
    expert_bias: bool = True

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Config:
        """gpt-oss's config.json."""
        layers = whole(hf, "num_hidden_layers")
        kinds = ("sliding_attention", "full_attention")
        defaults = {"head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": ROPE["rope_theta"]}
        hf = {**defaults, **hf}
        if not isinstance(hf.get("layer_types"), list):
            hf["layer_types"] = [kinds[i % 2] for i in range(layers)]
        if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
            hf["rope_parameters"] = ROPE
        experts, per_token = expert_counts(hf, layers)
        for key, only in (("swiglu_alpha", SWIGLU_ALPHA), ("swiglu_limit", SWIGLU_LIMIT)):
            if number(hf, key, only) != only:
                raise ModelError(
                    "unknown_activation",
                    f"config.json: {key} is {hf[key]}",
                    why=f"the clamped SwiGLU here has {only}",
                )
        bias = bool(hf.get("attention_bias", True))
        return cls(
            **{**common(hf, sliding=True), "rope": rope_parameters(hf)},
            qkv_bias=bias,
            out_bias=bias,
            sinks=True,
            activation="swiglu_oai",
            experts=experts,
            experts_per_token=per_token,
        )


def adapt(hf: dict[str, Any], source: WeightSource) -> WeightSource:
    """The checkpoint with experts one by one. Raises ModelError for a bad config."""
    config = Config.from_hf(hf)
    modules = {f"model.layers.{layer}.mlp.experts" for layer in range(config.layers)}
    return FusedExperts(source, modules, config.experts)


class Layer(llama.Layer):
    def make_mlp(self, config: Any, build: Build, name: str) -> Block:
        # The softmax over the chosen experts' logits is that over all, scaled to sum to 1.
        return MoE(
            build,
            name,
            hidden=config.hidden,
            intermediate=config.intermediate,
            experts=config.experts,
            experts_per_token=config.experts_per_token,
            normalize=True,
            activation=config.activation,
            router="router",
            bias=True,
        )


class Model(llama.Model):
    layer_class = Layer
