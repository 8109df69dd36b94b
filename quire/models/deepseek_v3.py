"""DeepSeek V2, V3 and R1: multi-head latent attention, experts in groups beside a shared one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quire.errors import ModelError
from quire.layers.build import Build
from quire.layers.inputs import StepInputs
from quire.layers.latent import LatentAttention, LatentSizes
from quire.layers.linear import Linear
from quire.layers.moe import Grouped, MoE
from quire.layers.norm import ResidualStream, RMSNorm
from quire.layers.rotary import rope_parameters, yarn_growth
from quire.models import llama
from quire.models.config import activation, expert_counts, number, whole
from quire.models.llama import Block, Mixer

V2 = "DeepseekV2ForCausalLM"
# How experts are chosen, by `topk_method`: among groups or all, with a learnt correction or not.
METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


@dataclass(frozen=True)
class Config:
    """`intermediate` is that of the layers without experts, `sparse[i]`: layer i has experts.
    `shared_intermediate` 0: there is no shared expert. `mtp_layers`: layers after the last that
    predict further tokens (multi-token prediction), which the model itself does not use; `sparse`
    goes on with them."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    sizes: LatentSizes
    q_rank: int | None
    max_len: int
    eps: float
    rope: dict[str, Any]
    interleaved: bool
    scale: float
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    activation: str
    sparse: tuple[bool, ...]
    experts: int
    experts_per_token: int
    expert_intermediate: int
    shared_intermediate: int
    normalize: bool
    grouped: Grouped
    mtp_layers: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Config:
        """The config.json of DeepseekV2ForCausalLM or DeepseekV3ForCausalLM."""
        layers, rope = whole(hf, "num_hidden_layers"), rope_parameters(hf)
        mtp_layers = _count(hf, "num_nextn_predict_layers")
        sizes = LatentSizes(
            nope=whole(hf, "qk_nope_head_dim"),
            rope=whole(hf, "qk_rope_head_dim"),
            value=whole(hf, "v_head_dim"),
            rank=whole(hf, "kv_lora_rank"),
        )
        dense, every = _count(hf, "first_k_dense_replace"), whole(hf, "moe_layer_freq", 1)
        expert = whole(hf, "moe_intermediate_size")
        experts, per_token = expert_counts(hf, layers, "n_routed_experts")
        return cls(
            vocab_size=whole(hf, "vocab_size"),
            hidden=whole(hf, "hidden_size"),
            intermediate=whole(hf, "intermediate_size"),
            layers=layers,
            heads=whole(hf, "num_attention_heads"),
            sizes=sizes,
            q_rank=None if hf.get("q_lora_rank") is None else whole(hf, "q_lora_rank"),
            max_len=whole(hf, "max_position_embeddings", 2048),
            eps=number(hf, "rms_norm_eps", 1e-6),
            rope=rope,
            interleaved=bool(hf.get("rope_interleave", True)),
            scale=(sizes.nope + sizes.rope) ** -0.5 * yarn_growth(rope, "mscale_all_dim") ** 2,
            tied=bool(hf.get("tie_word_embeddings", False)),
            attention_bias=bool(hf.get("attention_bias", False)),
            mlp_bias=bool(hf.get("mlp_bias", False)),
            activation=activation(hf),
            sparse=tuple(i >= dense and i % every == 0 for i in range(layers + mtp_layers)),
            experts=experts,
            experts_per_token=per_token,
            expert_intermediate=expert,
            shared_intermediate=expert * _count(hf, "n_shared_experts"),
            **_routing(hf, experts, per_token),
            mtp_layers=mtp_layers,
        )


def _count(hf: dict[str, Any], key: str) -> int:
    """A whole number that may be 0, and is where it is missing."""
    return whole(hf, key) if hf.get(key) else 0


def _routing(hf: dict[str, Any], experts: int, per_token: int) -> dict[str, Any]:
    """`normalize` and `grouped`. Raises ModelError for a routing that is not known, or that does
    not go with the number of experts."""
    older = hf.get("architectures") == [V2]
    method = hf.get("topk_method") or ("greedy" if older else "noaux_tc")
    corrected = method == "noaux_tc"
    scoring = hf.get("scoring_func") or ("sigmoid" if corrected else "softmax")
    if method not in METHODS or scoring != ("sigmoid" if corrected else "softmax"):
        raise ModelError(
            "unknown_routing",
            f"config.json: topk_method {method!r} with scoring_func {scoring!r}",
            why="known: greedy and group_limited_greedy with softmax, noaux_tc with sigmoid",
        )
    normalize = bool(hf.get("norm_topk_prob", not older))
    scale = number(hf, "routed_scaling_factor", 1.0 if older else 2.5)
    if normalize and not corrected and scale != 1:
        raise ModelError(
            "unknown_routing",
            f"config.json: norm_topk_prob with routed_scaling_factor {scale} and {method}",
            why="what is published of the family does not agree on whether weights that sum to 1 "
            "are scaled",
        )
    groups = 1 if method == "greedy" else whole(hf, "n_group", 1)
    chosen = 1 if method == "greedy" else whole(hf, "topk_group", groups)
    size, rest = divmod(experts, groups)
    if rest or chosen > groups or per_token > chosen * size or (corrected and size < 2):
        raise ModelError(
            "bad_config",
            f"config.json: {per_token} of {experts} experts for each token, from {chosen} of "
            f"{groups} groups",
        )
    return {"normalize": normalize, "grouped": Grouped(groups, chosen, corrected, scale)}


class Layer(llama.Layer):
    def make_attention(self, config: Any, build: Build, name: str, index: int) -> Mixer:
        return LatentAttention(
            build,
            name,
            hidden=config.hidden,
            heads=config.heads,
            sizes=config.sizes,
            q_rank=config.q_rank,
            rope=config.rope,
            scale=config.scale,
            interleaved=config.interleaved,
            bias=config.attention_bias,
        )

    def make_mlp(self, config: Any, build: Build, name: str) -> Block:
        if not config.sparse[int(name.split(".")[2])]:
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
            grouped=config.grouped,
            shared=config.shared_intermediate,
            shared_bias=config.mlp_bias,
        )


class Model(llama.Model):
    layer_class = Layer

    def __init__(self, config: Config, build: Build):
        super().__init__(config, build)
        last = range(config.layers, config.layers + config.mtp_layers)
        build.spare += [f"model.layers.{layer}." for layer in last]


class Drafter:
    """The layer behind the last, with embedding and head of the target: of a token's hidden state
    and of the token that follows, the token after that (DeepSeek-V3, section 2.2).

    Its weights and its cache come into `build`, the target's. Of further such layers none is read.
    """

    def __init__(self, target: Model, build: Build):
        config = target.config
        hidden, name = config.hidden, f"model.layers.{config.layers}"
        self.target = target
        self.token_norm = RMSNorm(build, f"{name}.enorm", hidden, config.eps)
        self.hidden_norm = RMSNorm(build, f"{name}.hnorm", hidden, config.eps)
        self.project = Linear(build, [f"{name}.eh_proj"], 2 * hidden, [hidden])
        self.layer = Layer(config, build, config.layers)
        self.norm = RMSNorm(build, f"{name}.shared_head.norm", hidden, config.eps)
        # The target's hidden states stay meanwhile, beside both parts and what they are joined to.
        build.add_width(5 * hidden)
        build.spare.remove(f"{name}.")
        # Copies of the target's embedding and head, which checkpoints keep in the module.
        build.spare += [f"{name}.embed_tokens.", f"{name}.shared_head.head."]

    @staticmethod
    def prefix(config: Config) -> str:
        """How the names of the module's tensors begin."""
        return f"model.layers.{config.layers}."

    def forward(
        self,
        hidden: torch.Tensor,
        next_tokens: torch.Tensor,
        positions: torch.Tensor,
        step: StepInputs,
    ) -> torch.Tensor:
        """Hidden states [T, H] of which `logits` gives the token after the next.

        `hidden` [T, H]: that of each token as the target's forward gives it, or from this function
        to draft another token (then with that token and the next position); `next_tokens` int64
        [T]: the tokens that follow; `positions` int64 [T] those of the tokens themselves.
        """
        parts = [self.token_norm(self.target.embed(next_tokens)), self.hidden_norm(hidden)]
        stream = ResidualStream(self.project(torch.cat(parts, dim=1)))
        self.layer(stream, positions, step)
        return self.norm.read(stream)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.target.head(hidden)
