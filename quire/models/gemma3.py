"""Gemma 3 (text): sliding and global layers mixed, each with its own rotary base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quire.errors import ModelError
from quire.layers.attention import Attention
from quire.layers.build import Build
from quire.layers.embedding import Embedding, Head, TiedHead
from quire.layers.inputs import StepInputs
from quire.layers.mlp import GatedMLP
from quire.layers.norm import ResidualStream, RMSNorm
from quire.layers.rotary import rope_parameters
from quire.models.config import activation, number, text_config, whole
from quire.models.llama import common


@dataclass(frozen=True)
class Config:
    """`windows[i]` None marks a global layer, which uses `rope`; the others use `local_rope`."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    max_len: int
    eps: float
    rope: dict[str, Any]
    tied: bool
    windows: tuple[int | None, ...]
    local_rope: dict[str, Any]
    scale: float
    attention_softcap: float | None
    final_softcap: float | None
    attention_bias: bool
    activation: str

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Config:
        """Gemma 3's config.json, of the text model or with a `text_config`."""
        hf = text_config(hf)
        hf = {"tie_word_embeddings": True, "head_dim": 256, **hf}
        if hf.get("use_bidirectional_attention"):
            raise ModelError(
                "unsupported_model",
                "the model attends in both directions",
                why="config.json: use_bidirectional_attention",
                fix="use a model that generates text",
            )
        layers = whole(hf, "num_hidden_layers")
        if not isinstance(hf.get("layer_types"), list):
            every = whole(hf, "sliding_window_pattern", 6)
            kinds = ("full_attention", "sliding_attention")
            hf["layer_types"] = [kinds[bool((i + 1) % every)] for i in range(layers)]
        both = hf.get("rope_parameters") or {}
        if "full_attention" in both:
            rope = rope_parameters({"rope_parameters": both["full_attention"], "rope_theta": 1e6})
            local = rope_parameters({"rope_parameters": both.get("sliding_attention")})
        else:
            rope = rope_parameters({"rope_theta": 1e6, **hf})
            local = rope_parameters({"rope_theta": number(hf, "rope_local_base_freq", 1e4)})
        return cls(
            **{**common({**hf, "rope_parameters": None}, sliding=True), "rope": rope},
            local_rope=local,
            scale=number(hf, "query_pre_attn_scalar", 256.0) ** -0.5,
            attention_softcap=_cap(hf, "attn_logit_softcapping"),
            final_softcap=_cap(hf, "final_logit_softcapping"),
            attention_bias=bool(hf.get("attention_bias", False)),
            activation=activation(hf, "hidden_activation", "gelu_pytorch_tanh"),
        )


def _cap(hf: dict[str, Any], key: str) -> float | None:
    return number(hf, key, 0.0) or None


class Layer:
    """Norms before and after both attention and feed-forward; all stored as weight - 1."""

    def __init__(self, config: Config, build: Build, index: int):
        name = f"model.layers.{index}"

        def norm(part: str) -> RMSNorm:
            return RMSNorm(build, f"{name}.{part}_layernorm", config.hidden, config.eps, 1.0)

        window = config.windows[index]
        self.input_norm = norm("input")
        self.attention = Attention(
            build,
            f"{name}.self_attn",
            hidden=config.hidden,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_size=config.head_size,
            rope=config.rope if window is None else config.local_rope,
            window=window,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            qk_norm=True,
            norm_eps=config.eps,
            norm_offset=1.0,
            scale=config.scale,
            softcap=config.attention_softcap,
        )
        self.attention_norm = norm("post_attention")
        self.mlp_input_norm = norm("pre_feedforward")
        self.mlp = GatedMLP(
            build, f"{name}.mlp", config.hidden, config.intermediate, config.activation
        )
        self.mlp_norm = norm("post_feedforward")

    def __call__(self, stream: ResidualStream, positions: torch.Tensor, step: StepInputs) -> None:
        x_TH = self.attention(self.input_norm, stream, positions, step)
        stream.add(self.attention_norm(x_TH))
        stream.add(self.mlp_norm(self.mlp.after(self.mlp_input_norm, stream)))


class Model:
    """`forward` gives hidden states [T, H] before the head, `logits` the head's [T, V]."""

    def __init__(self, config: Config, build: Build):
        self.config = config
        self.embed = Embedding(
            build,
            "model.embed_tokens",
            config.vocab_size,
            config.hidden,
            scale=config.hidden**0.5,
        )
        self.layers = [Layer(config, build, i) for i in range(config.layers)]
        self.norm = RMSNorm(build, "model.norm", config.hidden, config.eps, 1.0)
        self.head = (
            TiedHead(self.embed)
            if config.tied
            else Head(build, "lm_head", config.vocab_size, config.hidden)
        )

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, step: StepInputs
    ) -> torch.Tensor:
        """tokens int64 [T], positions int64 [T] -> [T, H]."""
        stream = ResidualStream(self.embed(tokens))
        for layer in self.layers:
            layer(stream, positions, step)
        return self.norm.read(stream)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden)
        cap = self.config.final_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
