"""DeepSeek V4's config.json: as published (Flash, Pro, Base), and as transformers writes it."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Any

from quire.errors import ModelError
from quire.kv import BLOCK_SIZE
from quire.layers.rotary import rope_parameters
from quire.models.config import MOST_EXPERTS, number, whole

# The kinds of layers by the names that transformers has for them.
SLIDING, SPARSE, HEAVY = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
ARCHITECTURE, MODEL_TYPE = "DeepseekV4ForCausalLM", "deepseek_v4"
PUBLISHED_RATIOS = {0: SLIDING, 4: SPARSE, 128: HEAVY}
# Values that the published models have, and that the code here is written for.
ONLY = {
    "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
    "num_key_value_heads": 1, "n_shared_experts": 1,
}  # fmt: skip
MOST_BLOCK_TOKENS = 4096
MOST_STREAMS, MOST_SINKHORN_STEPS = 16, 1000


@dataclass(frozen=True)
class Layer:
    """`ratio`: tokens in a compressed entry, 0 where the layer has only its window. `sparse`:
    windows of entries overlap, and an indexer chooses among entries. `hashed`: experts follow from
    the token alone."""

    ratio: int
    sparse: bool
    hashed: bool


@dataclass(frozen=True)
class Config:
    """Sizes of a DeepSeek V4. `rotary_size`: values at the end of each head that rotate, by `rope`
    in layers with a window alone and by `compressed_rope` in all others. `streams`: of each token,
    hidden states beside each other. `mtp_layers`: modules that draft."""

    vocab_size: int
    hidden: int
    heads: int
    head_size: int
    rotary_size: int
    query_rank: int
    output_groups: int
    output_rank: int
    window: int
    layers: tuple[Layer, ...]
    index_heads: int
    index_size: int
    index_topk: int
    rope: dict[str, Any]
    compressed_rope: dict[str, Any]
    streams: int
    sinkhorn_steps: int
    stream_eps: float
    eps: float
    max_len: int
    experts: int
    experts_per_token: int
    expert_intermediate: int
    route_scale: float
    limit: float
    mtp_layers: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Config:
        """Raises ModelError for later architectures that go by the same name, and for values that
        contradict each other or that no published model has."""
        _refuse_others(hf)
        heads, head_size = whole(hf, "num_attention_heads"), whole(hf, "head_dim")
        rotary = _rotary_size(hf, head_size)
        groups, experts = (
            whole(hf, "o_groups"),
            whole({"num_experts": hf.get("n_routed_experts")}, "num_experts"),
        )
        return cls(
            vocab_size=whole(hf, "vocab_size"),
            hidden=whole(hf, "hidden_size"),
            heads=heads,
            head_size=head_size,
            rotary_size=rotary,
            query_rank=whole(hf, "q_lora_rank"),
            output_groups=groups,
            output_rank=whole(hf, "o_lora_rank"),
            window=whole(hf, "sliding_window"),
            layers=_layers(hf),
            index_heads=whole(hf, "index_n_heads"),
            index_size=whole(hf, "index_head_dim"),
            index_topk=whole(hf, "index_topk"),
            rope=_rope(hf, "main", hf.get("rope_theta"), None),
            compressed_rope=_rope(
                hf, "compress", hf.get("compress_rope_theta"), hf.get("rope_scaling")
            ),
            streams=whole(hf, "hc_mult"),
            sinkhorn_steps=whole(hf, "hc_sinkhorn_iters"),
            stream_eps=number(hf, "hc_eps", 1e-6),
            eps=number(hf, "rms_norm_eps", 1e-6),
            max_len=whole(hf, "max_position_embeddings"),
            experts=experts,
            experts_per_token=whole(hf, "num_experts_per_tok"),
            expert_intermediate=whole(hf, "moe_intermediate_size"),
            route_scale=number(hf, "routed_scaling_factor", 1.0),
            limit=number(hf, "swiglu_limit", 10.0),
            mtp_layers=int(number(hf, "num_nextn_predict_layers", 0)),
        )

    def __post_init__(self) -> None:
        ratios = [layer.ratio for layer in self.layers if layer.ratio]
        for wrong, why in (
            (self.heads % self.output_groups, "o_groups does not divide num_attention_heads"),
            (self.index_size < self.rotary_size, "index_head_dim is less than qk_rope_head_dim"),
            (self.experts_per_token > self.experts, "num_experts_per_tok is more than there are"),
            (self.experts * len(self.layers) > MOST_EXPERTS, f"more than {MOST_EXPERTS} experts"),
            (self.streams > MOST_STREAMS, f"hc_mult is more than {MOST_STREAMS}"),
            (
                self.sinkhorn_steps > MOST_SINKHORN_STEPS,
                f"hc_sinkhorn_iters is more than {MOST_SINKHORN_STEPS}",
            ),
            (self.limit <= 0, "swiglu_limit is not positive"),
            (
                max(ratios, default=0) > self.max_len or self.block_tokens > MOST_BLOCK_TOKENS,
                f"compressed entries of {sorted(set(ratios))} tokens",
            ),
        ):
            if wrong:
                raise ModelError("bad_config", "config.json does not fit together", why=why)

    @property
    def block_tokens(self) -> int:
        """Tokens in a page of compressed entries: whole entries of every layer, and whole blocks of
        the windows, so that every layer's pages end at the same tokens."""
        return lcm(BLOCK_SIZE, *(layer.ratio for layer in self.layers if layer.ratio))

    @property
    def overlap(self) -> int:
        """Tokens before an entry's own that it pools too, the most in any layer. After a prefix
        hit they are computed again: what they give to the next entry is kept nowhere else."""
        return max((layer.ratio for layer in self.layers if layer.sparse), default=0)


def _refuse_others(hf: dict[str, Any]) -> None:
    names = hf.get("architectures") or [ARCHITECTURE]
    later = [key for key in hf if key.startswith("engram")]
    later += ["model_type"] if hf.get("model_type", MODEL_TYPE) != MODEL_TYPE else []
    later += ["architectures"] if names[0] != ARCHITECTURE else []
    if later:
        name = names[0] if names[0] != ARCHITECTURE else hf.get("model_type")
        raise ModelError(
            "unsupported_model",
            f"the model is a {name!r}, a later architecture than DeepSeek V4",
            why=f"config.json: {', '.join(later)}",
            fix="use DeepSeek-V4-Flash or DeepSeek-V4-Pro",
        )
    found = [key for key in hf if key.startswith("dspark_")]
    if number(hf, "num_nextn_predict_layers", 0) > 1:  # the first checkpoints have one at most
        found.append("num_nextn_predict_layers")
    if found:
        raise ModelError(
            "unsupported_model",
            "the checkpoint is a later DeepSeek V4, which drafts with DSpark and is spoken to in "
            "another chat format: neither is supported",
            why=f"config.json: {', '.join(found)}",
            fix="use the first DeepSeek-V4-Flash or DeepSeek-V4-Pro, which have one MTP module",
        )
    for key, value in ONLY.items():
        if hf.get(key, value) != value:
            raise ModelError(
                "bad_config",
                f"config.json: {key} is {hf[key]!r}",
                why=f"DeepSeek V4 here has {value!r}",
            )


def _rotary_size(hf: dict[str, Any], head_size: int) -> int:
    size = hf.get("qk_rope_head_dim")
    if size is None:
        size = int(head_size * number(hf, "partial_rotary_factor", 64 / 512))
    size = whole({"qk_rope_head_dim": size}, "qk_rope_head_dim")
    if size % 2 or size > head_size:
        raise ModelError(
            "bad_config", f"config.json: {size} of {head_size} values of a head rotate"
        )
    return size


def _rope(hf: dict[str, Any], name: str, theta: Any, scaling: Any) -> dict[str, Any]:
    """Rotary parameters of one kind of layer: `theta` and `scaling` as published, or the table of
    this name as transformers has it. Of a head only the rotary part goes into the table, and YaRN
    changes angles alone: no temperature."""
    both = hf.get("rope_parameters")
    given = both.get(name) if isinstance(both, dict) else None
    if given is None:
        given = {**(scaling if isinstance(scaling, dict) else {}), "rope_theta": theta}
    longest = {"max_position_embeddings": hf.get("max_position_embeddings")}
    found = rope_parameters({"rope_parameters": given, **longest})
    return {**found, "partial_rotary_factor": 1.0, "attention_factor": 1.0}


def _layers(hf: dict[str, Any]) -> tuple[Layer, ...]:
    count = whole(hf, "num_hidden_layers")
    if isinstance(hf.get("compress_ratios"), list):
        found = _published_kinds(hf, count)
    else:
        found = _named_kinds(hf, count)
    hashed = _hashed(hf, count)
    return tuple(
        Layer(ratio, kind == SPARSE, by_token)
        for (kind, ratio), by_token in zip(found, hashed, strict=True)
    )


def _published_kinds(hf: dict[str, Any], count: int) -> list[tuple[str, int]]:
    ratios, drafting = hf["compress_ratios"], int(number(hf, "num_nextn_predict_layers", 0))
    if len(ratios) != count + drafting:
        raise ModelError(
            "bad_config",
            f"config.json: compress_ratios has {len(ratios)} entries for {count} layers and "
            f"{drafting} MTP modules",
        )
    if any(ratios[count:]):
        raise ModelError(
            "bad_config", f"config.json: compress_ratios of MTP modules are {ratios[count:]}"
        )
    for ratio in ratios:
        if not isinstance(ratio, int) or ratio not in PUBLISHED_RATIOS:
            raise ModelError(
                "bad_config",
                f"config.json: compress_ratios has {ratio!r}",
                why=f"known: {', '.join(map(str, PUBLISHED_RATIOS))}",
            )
    return [(PUBLISHED_RATIOS[ratio], ratio) for ratio in ratios[:count]]


def _named_kinds(hf: dict[str, Any], count: int) -> list[tuple[str, int]]:
    kinds, rates = hf.get("layer_types"), hf.get("compress_rates")
    if not isinstance(kinds, list) or len(kinds) != count or not isinstance(rates, dict):
        raise ModelError(
            "bad_config",
            "config.json: how layers compress is missing",
            why=f"compress_ratios, or layer_types of {count} layers with compress_rates",
            fix="check that config.json is the model's own",
        )
    for kind in kinds:
        if kind not in (SLIDING, SPARSE, HEAVY):
            raise ModelError("bad_config", f"config.json: layer_types has {kind!r}")
    return [(kind, 0 if kind == SLIDING else whole(rates, kind)) for kind in kinds]


def _hashed(hf: dict[str, Any], count: int) -> list[bool]:
    kinds = hf.get("mlp_layer_types")
    if not isinstance(kinds, list):
        hashed = int(number(hf, "num_hash_layers", 0))
        return [i < hashed for i in range(count)]
    if len(kinds) != count or any(kind not in ("hash_moe", "moe") for kind in kinds):
        raise ModelError(
            "bad_config", f"config.json: mlp_layer_types of {count} layers is {kinds!r}"
        )
    return [kind == "hash_moe" for kind in kinds]
