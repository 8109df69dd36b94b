"""Llama (SmolLM2, Llama 3.x), and the decoder that Mistral, Qwen2 and Qwen3 vary in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from quire.errors import ModelError
from quire.layers.attention import Attention
from quire.layers.build import Build
from quire.layers.embedding import Embedding, Head, TiedHead
from quire.layers.inputs import StepInputs
from quire.layers.mlp import GatedMLP
from quire.layers.norm import ResidualStream, RMSNorm
from quire.layers.rotary import rope_parameters
from quire.models.config import activation, head_size, layer_windows, number, whole


@dataclass(frozen=True)
class Config:
    """Sizes of a Llama-like decoder. `windows[i]` is layer i's sliding window, None for full."""

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
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    activation: str = "silu"

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Config:
        """Llama's config.json."""
        bias = bool(hf.get("attention_bias", False))
        mlp_bias = bool(hf.get("mlp_bias", False))
        values = common(hf)
        return cls(
            **values,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=mlp_bias,
            activation=activation(hf),
        )


def common(hf: dict[str, Any], sliding: bool = False, first_window: int = 0) -> dict[str, Any]:
    """The values that all families of this decoder name alike.

    `sliding`: `sliding_window` counts, without `layer_types` from layer `first_window` on.
    """
    layers, heads = whole(hf, "num_hidden_layers"), whole(hf, "num_attention_heads")
    kv_heads = whole(hf, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(
            "bad_config", f"config.json: {heads} attention heads cannot share {kv_heads} KV heads"
        )
    return {
        "vocab_size": whole(hf, "vocab_size"),
        "hidden": whole(hf, "hidden_size"),
        "intermediate": whole(hf, "intermediate_size"),
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": head_size(hf),
        "max_len": whole(hf, "max_position_embeddings", 2048),
        "eps": number(hf, "rms_norm_eps", 1e-6),
        "rope": rope_parameters(hf),
        "tied": bool(hf.get("tie_word_embeddings", False)),
        "windows": tuple(layer_windows(hf, layers, sliding, first_window)),
    }


class Mixer(Protocol):
    """Attention: of a stream's norm [T, H] to [T, H], with what the cache has of other tokens."""

    def __call__(
        self, norm: RMSNorm, stream: ResidualStream, positions_T: torch.Tensor, step: StepInputs
    ) -> torch.Tensor: ...


class Block(Protocol):
    """A feed-forward layer: of a stream's norm [T, H] to [T, H], each token by itself."""

    def after(self, norm: RMSNorm, stream: ResidualStream) -> torch.Tensor: ...


class Layer:
    """Attention and feed-forward, each after a norm and added to the residual."""

    def __init__(self, config: Any, build: Build, index: int):
        name = f"model.layers.{index}"
        self.input_norm = RMSNorm(build, f"{name}.input_layernorm", config.hidden, config.eps)
        self.attention = self.make_attention(config, build, f"{name}.self_attn", index)
        self.post_norm = RMSNorm(
            build, f"{name}.post_attention_layernorm", config.hidden, config.eps
        )
        self.mlp = self.make_mlp(config, build, f"{name}.mlp")

    def make_attention(self, config: Any, build: Build, name: str, index: int) -> Mixer:
        return Attention(
            build,
            name,
            hidden=config.hidden,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_size=config.head_size,
            rope=config.rope,
            window=config.windows[index],
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm=config.qk_norm,
            norm_eps=config.eps,
            sinks=config.sinks,
        )

    def make_mlp(self, config: Any, build: Build, name: str) -> Block:
        return GatedMLP(
            build, name, config.hidden, config.intermediate, config.activation, config.mlp_bias
        )

    def __call__(self, stream: ResidualStream, positions: torch.Tensor, step: StepInputs) -> None:
        stream.add(self.attention(self.input_norm, stream, positions, step))
        stream.add(self.mlp.after(self.post_norm, stream))


class Model:
    """`forward` gives hidden states [T, H] before the head, `logits` the head's [T, V]."""

    layer_class: type[Layer] = Layer

    def __init__(self, config: Any, build: Build):
        self.config = config
        self.embed = Embedding(build, "model.embed_tokens", config.vocab_size, config.hidden)
        self.layers = [self.layer_class(config, build, i) for i in range(config.layers)]
        self.norm = RMSNorm(build, "model.norm", config.hidden, config.eps)
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
        return self.head(hidden)
