"""Reading config.json: typed values with errors that name the key."""

from __future__ import annotations

from typing import Any

from quire.errors import ModelError


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


# What planning takes time for has bounds far above every known model (DeepSeek V3: 61 layers of
# 256 experts).
MOST = {"num_hidden_layers": 1024, "num_experts": 4096, "n_routed_experts": 4096}
MOST_EXPERTS = 2**17  # of all layers together


def whole(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer. Raises ModelError where it is missing or something else."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    most = MOST.get(key, 2**31 - 1)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ModelError(
            "bad_config",
            f"config.json: {key} is {value!r}",
            why=f"a whole number from 1 to {most} is needed",
            fix="check that the model's files are complete and of one version",
        )
    return value


def expert_counts(config: dict[str, Any], layers: int, key: str = "num_experts") -> tuple[int, int]:
    """Experts of a layer, and of each token; transformers 5 writes `key` as `num_local_experts`.
    Raises ModelError for more of a token than there are, and for too many altogether."""
    count = whole({key: config.get("num_local_experts"), **config}, key)
    per_token = whole(config, "num_experts_per_tok")
    if per_token > count:
        raise ModelError(
            "bad_config", f"config.json: {per_token} of {count} experts for each token"
        )
    if count * layers > MOST_EXPERTS:
        raise ModelError(
            "bad_config",
            f"config.json: {layers} layers of {count} experts",
            why=f"all layers together may have {MOST_EXPERTS}",
        )
    return count, per_token


# Names of activations in config.json, and what our layers call them.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYER_TYPES = {"full_attention", "sliding_attention"}


def activation(config: dict[str, Any], key: str = "hidden_act", default: str = "silu") -> str:
    """The feed-forward activation. Raises ModelError for one that is not known."""
    name = config.get(key) or default
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ModelError(
            "unknown_activation",
            f"config.json: {key} is {name!r}",
            why="known activations: " + ", ".join(ACTIVATIONS),
        )
    return ACTIVATIONS[name]


def number(config: dict[str, Any], key: str, default: float) -> float:
    """A finite number."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or value - value != 0:
        raise ModelError("bad_config", f"config.json: {key} is {value!r}", why="not a number")
    return float(value)


def head_size(config: dict[str, Any]) -> int:
    """`head_dim`, or the hidden size over the number of heads."""
    if config.get("head_dim") is not None:
        return whole(config, "head_dim")
    size, rest = divmod(whole(config, "hidden_size"), whole(config, "num_attention_heads"))
    if rest:
        raise ModelError(
            "bad_config",
            "config.json: hidden_size is no multiple of num_attention_heads, and there is no "
            "head_dim",
        )
    return size


def layer_windows(
    config: dict[str, Any], layers: int, sliding: bool, first: int = 0
) -> list[int | None]:
    """Each layer's sliding window: by `layer_types` where given, else all layers from `first`."""
    window = config.get("sliding_window") if sliding else None
    size = whole(config, "sliding_window") if window is not None else None
    types = config.get("layer_types")
    if not isinstance(types, list):
        return [size if i >= first else None for i in range(layers)]
    if len(types) != layers:
        raise ModelError(
            "bad_config",
            f"config.json: layer_types has {len(types)} entries for {layers} layers",
        )
    for kind in types:
        if kind not in LAYER_TYPES:
            raise ModelError(
                "bad_config",
                f"config.json: layer_types has {kind!r}",
                why="known kinds: " + ", ".join(sorted(LAYER_TYPES)),
            )
    return [size if kind == "sliding_attention" else None for kind in types]
