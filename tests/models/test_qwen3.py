"""Qwen3 against transformers: norms on query and key heads, a head size of its own."""

import gguf
from transformers import Qwen3Config

from models.harness import Family, GgufFamilyTests

WINDOW = {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 2}

QWEN3 = Family(
    config=Qwen3Config,
    cases={
        "plain": {"head_dim": 16},
        "tied": {"head_dim": 32, "tie_word_embeddings": True},
        "biases": {"head_dim": 16, "attention_bias": True},
        "default head size": {"num_attention_heads": 2, "num_key_value_heads": 1},
        "window": {"head_dim": 16, **WINDOW},
    },
    older={"plain": {}, "window": WINDOW},
    greedy=["plain", "window"],
    gguf_arch=gguf.MODEL_ARCH.QWEN3,
    gguf_cases=["plain", "tied"],
)


class TestQwen3(GgufFamilyTests):
    family = QWEN3
