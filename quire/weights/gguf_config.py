"""A Hugging Face config.json rebuilt from GGUF metadata.

Keys: gguf-py/gguf/constants.py of llama.cpp; what each becomes: the configuration classes of
transformers. The original dtype is not recorded in a GGUF file, so there is no torch_dtype.
"""

from __future__ import annotations

import struct
from math import pi
from typing import Any

from quire.formats.layout import FLOAT_FORMATS
from quire.weights.gguf_header import GgufHeader, corrupt, unsupported
from quire.weights.gguf_names import architecture

GEMMA3_LOCAL_ROPE_THETA = 10_000.0
GEMMA3_WINDOW_PATTERN = 6  # every sixth layer sees everything
GEMMA3_27B_LAYERS = 62  # the one size that scales queries by hidden size / heads
_CLASSES = {
    "deepseek2": ("DeepseekV2ForCausalLM", "deepseek_v2"),
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}


def hf_config(header: GgufHeader) -> dict[str, Any]:
    """The config.json a Hugging Face checkpoint of this model would have.

    ModelError if the architecture is unknown, or metadata is missing or impossible.
    """
    kind = architecture(header)
    class_name, model_type = _CLASSES[kind]
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.info.shape) != 2:
        raise corrupt(header.path, "it has no token_embd.weight matrix")
    hidden = _count(header, f"{kind}.embedding_length")
    if embedding.info.shape[1] != hidden:
        raise corrupt(header.path, f"embeddings {embedding.info.shape}, hidden size {hidden}")
    layers = _count(header, f"{kind}.block_count")
    if layers > len(header.tensors):
        raise corrupt(header.path, f"{layers} layers in {len(header.tensors)} tensors")
    heads = _count(header, f"{kind}.attention.head_count")
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": embedding.info.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _count(header, f"{kind}.attention.head_count_kv", heads),
        "head_dim": _count(header, f"{kind}.attention.key_length", max(hidden // heads, 1)),
        "intermediate_size": _count(header, f"{kind}.feed_forward_length"),
        "max_position_embeddings": _count(header, f"{kind}.context_length"),
        "rms_norm_eps": _short(header.number(f"{kind}.attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_theta": _short(header.number(f"{kind}.rope.freq_base", 10_000.0)),
        "rope_scaling": _rope_scaling(header, kind),
    }
    _add_partial_rotary(header, kind, config)
    _ADD[kind](header, config)
    config.update(special_ids(header))
    return config


def special_ids(header: GgufHeader) -> dict[str, Any]:
    """bos, eos and pad ids; eos is a list where a turn or message has an end of its own."""
    ids: dict[str, Any] = {}
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in header.metadata:
            ids[name] = header.integer(f"tokenizer.ggml.{key}_token_id")
    ends = [
        header.integer(f"tokenizer.ggml.{key}_token_id")
        for key in ("eos", "eot", "eom")
        if f"tokenizer.ggml.{key}_token_id" in header.metadata
    ]
    ends = list(dict.fromkeys(ends))
    if ends:
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return ids


def _count(header: GgufHeader, key: str, default: int | None = None) -> int:
    value = header.integer(key, default)
    if not 0 < value < 1 << 31:
        raise corrupt(header.path, f"{key} is {value}")
    return value


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        try:
            same = struct.pack("<f", short) == struct.pack("<f", value)
        except OverflowError:
            return value
        if same:
            return short
    return value


def _add_partial_rotary(header: GgufHeader, kind: str, config: dict[str, Any]) -> None:
    rotary = _count(header, f"{kind}.rope.dimension_count", config["head_dim"])
    if rotary > config["head_dim"]:
        raise corrupt(header.path, f"{rotary} rotary dimensions of {config['head_dim']}")
    if rotary < config["head_dim"]:
        config["partial_rotary_factor"] = rotary / config["head_dim"]


def _add_llama(header: GgufHeader, config: dict[str, Any]) -> None:
    if header.integer("llama.expert_count", 0):
        raise unsupported(header.path, "it is a llama architecture with experts (Mixtral)")
    config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    window = header.integer("llama.attention.sliding_window", 0)
    if window:
        config.update(
            architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=window
        )


def _add_qwen(header: GgufHeader, config: dict[str, Any]) -> None:
    config["use_sliding_window"] = False


def _add_qwen3moe(header: GgufHeader, config: dict[str, Any]) -> None:
    _add_qwen(header, config)
    config.update(
        num_experts=_count(header, "qwen3moe.expert_count"),
        num_experts_per_tok=_count(header, "qwen3moe.expert_used_count"),
        moe_intermediate_size=_count(header, "qwen3moe.expert_feed_forward_length"),
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _add_gemma3(header: GgufHeader, config: dict[str, Any]) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    kinds = [
        "full_attention" if (layer + 1) % GEMMA3_WINDOW_PATTERN == 0 else "sliding_attention"
        for layer in range(layers)
    ]
    config.update(
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=(
            hidden // heads if layers == GEMMA3_27B_LAYERS else config["head_dim"]
        ),
        sliding_window=_count(header, "gemma3.attention.sliding_window"),
        sliding_window_pattern=GEMMA3_WINDOW_PATTERN,
        layer_types=kinds,
        rope_local_base_freq=_short(
            header.number("gemma3.rope.freq_base_swa", GEMMA3_LOCAL_ROPE_THETA)
        ),
    )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        present = f"gemma3.{name}" in header.metadata
        config[name] = _short(header.number(f"gemma3.{name}")) if present else None
    config["hidden_act"] = "gelu_pytorch_tanh"


# Values of expert_gating_func.
_SOFTMAX, _SIGMOID = 1, 2


def _add_deepseek2(header: GgufHeader, config: dict[str, Any]) -> None:
    """DeepSeek V2, or V3 where experts are chosen by sigmoid. Heads are those before the converter
    made keys and values one latent; files of before that have their sizes under the plain keys."""
    kind = "deepseek2"
    if header.integer(f"{kind}.nextn_predict_layers", 0):
        raise unsupported(header.path, "its layers for multi-token prediction are not known here")
    rotary = _count(header, f"{kind}.rope.dimension_count")
    key = _count(header, f"{kind}.attention.key_length_mla", config["head_dim"])
    value = _count(header, f"{kind}.attention.value_length")
    if key <= rotary:
        raise corrupt(header.path, f"{rotary} of {key} values of a key are rotary")
    gating = header.integer(f"{kind}.expert_gating_func", _SOFTMAX)
    if gating not in (_SOFTMAX, _SIGMOID):
        raise unsupported(header.path, f"its expert_gating_func is {gating}")
    groups = _count(header, f"{kind}.expert_group_count", 1)
    method = "greedy" if groups == 1 else "group_limited_greedy"
    if gating == _SIGMOID:
        method = "noaux_tc"
        config.update(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3")
    config.pop("head_dim")
    config.pop("partial_rotary_factor", None)
    config.update(
        q_lora_rank=header.integer(f"{kind}.attention.q_lora_rank", 0) or None,
        kv_lora_rank=_count(header, f"{kind}.attention.kv_lora_rank"),
        qk_nope_head_dim=key - rotary,
        qk_rope_head_dim=rotary,
        v_head_dim=_count(header, f"{kind}.attention.value_length_mla", value),
        n_routed_experts=_count(header, f"{kind}.expert_count"),
        num_experts_per_tok=_count(header, f"{kind}.expert_used_count"),
        n_shared_experts=header.integer(f"{kind}.expert_shared_count", 0),
        moe_intermediate_size=_count(header, f"{kind}.expert_feed_forward_length"),
        first_k_dense_replace=header.integer(f"{kind}.leading_dense_block_count", 0),
        scoring_func="sigmoid" if gating == _SIGMOID else "softmax",
        topk_method=method,
        n_group=groups,
        topk_group=_count(header, f"{kind}.expert_group_used_count", groups),
        norm_topk_prob=header.flag(f"{kind}.expert_weights_norm", False),
        routed_scaling_factor=_short(header.number(f"{kind}.expert_weights_scale", 1.0)) or 1.0,
    )
    multiplier = f"{kind}.rope.scaling.yarn_log_multiplier"
    if config["rope_scaling"] is not None and multiplier in header.metadata:
        # The converter writes a tenth of mscale_all_dim, and nothing of mscale, which is the same
        # in all published models.
        mscale = _short(10 * _short(header.number(multiplier)))
        config["rope_scaling"].update(mscale=mscale, mscale_all_dim=mscale)


_ADD = {
    "deepseek2": _add_deepseek2,
    "llama": _add_llama,
    "qwen2": _add_qwen,
    "qwen3": _add_qwen,
    "qwen3moe": _add_qwen3moe,
    "gemma3": _add_gemma3,
}


def _rope_scaling(header: GgufHeader, kind: str) -> dict[str, Any] | None:
    if "rope_freqs.weight" in header.tensors:
        return _llama3_scaling(header, kind)
    prefix = f"{kind}.rope.scaling"
    method = header.text(f"{prefix}.type", "none")
    if method == "none":
        return None
    scaling: dict[str, Any] = {
        "rope_type": method,
        "factor": _short(header.number(f"{prefix}.factor")),
    }
    if method == "yarn":
        scaling["original_max_position_embeddings"] = _count(
            header, f"{prefix}.original_context_length"
        )
        for key in ("attn_factor", "yarn_attn_factor"):
            # What it multiplies has changed from version to version of llama.cpp.
            if header.number(f"{prefix}.{key}", 1.0) != 1.0:
                raise unsupported(header.path, f"its rotary scaling has an {key} of its own")
        for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if f"{prefix}.{key}" in header.metadata:
                scaling[name] = _short(header.number(f"{prefix}.{key}"))
    elif method != "linear":
        raise unsupported(header.path, f"it has the unknown rotary scaling {method!r}")
    return scaling


def _llama3_scaling(header: GgufHeader, kind: str) -> dict[str, Any]:
    """Llama 3's parameters from the per-frequency divisors that the converter computed of them."""
    from quire.weights.gguf import GgufSource

    info = header.tensors["rope_freqs.weight"].info
    if info.packed or len(info.shape) != 1 or info.format not in FLOAT_FORMATS:
        raise corrupt(header.path, "rope_freqs.weight is not a vector")
    with GgufSource(header) as source:
        assert isinstance(source, GgufSource)
        stored = source.read_raw("rope_freqs.weight").float().tolist()
    theta = header.number(f"{kind}.rope.freq_base", 10_000.0)
    for original in (8192, 2048, 4096, 16384, 32768):
        scaling = {
            "rope_type": "llama3",
            "factor": float(f"{max(stored):.5g}"),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        expected = _llama3_divisors(scaling, theta, len(stored))
        if all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(stored, expected, strict=True)):
            return scaling
    raise unsupported(header.path, "its rope_freqs are not Llama 3's scaling of frequencies")


def _llama3_divisors(scaling: dict[str, Any], theta: float, count: int) -> list[float]:
    """What each rotary frequency is divided by (transformers, _compute_llama3_parameters)."""
    factor, low, high = (
        scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    )  # fmt: skip
    original = scaling["original_max_position_embeddings"]
    divisors = []
    for index in range(count):
        turns = original / (2 * pi * theta ** (index / count))
        if turns < low:
            divisors.append(factor)
        elif turns > high:
            divisors.append(1.0)
        else:
            smooth = (turns - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors
