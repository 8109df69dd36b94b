"""Qwen2 and Qwen2.5: Llama's decoder with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from quire.models import llama
from quire.models.config import activation, number
from quire.models.llama import Model, common

__all__ = ["Config", "Model"]


class Config(llama.Config):
    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Config:
        """Qwen2's config.json."""
        return cls(**qwen_common(hf), qkv_bias=True, activation=activation(hf))


def qwen_common(hf: dict[str, Any]) -> dict[str, Any]:
    """Qwen's window applies only where `use_sliding_window` is true, and without `layer_types`
    only from layer `max_window_layers` on."""
    first = int(number(hf, "max_window_layers", 28))
    return common(hf, bool(hf.get("use_sliding_window", False)), first)
