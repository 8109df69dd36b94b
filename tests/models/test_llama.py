"""Llama against transformers: rope scalings, tied and untied heads, biases, any head size."""

import gguf
from transformers import LlamaConfig

from models.harness import Family, GgufFamilyTests

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

LLAMA = Family(
    config=LlamaConfig,
    cases={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
        "yarn": {"rope_parameters": YARN},
        "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "multi-head": {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
        "head size": {"head_dim": 24, "num_key_value_heads": 1},
    },
    older={"plain": {}, "llama3": {}, "linear": {}, "yarn": {}},
    greedy=["tied", "llama3"],
    gguf_arch=gguf.MODEL_ARCH.LLAMA,
    gguf_cases=["plain", "tied", "head size"],
)


class TestLlama(GgufFamilyTests):
    family = LLAMA
