"""Qwen2 and Qwen2.5: Llama's decoder with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from quire.models import llama
from quire.models.llama import Model, common

__all__ = ["Config", "Model"]


class Config(llama.Config):
    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Config:
        """Qwen2's config.json; its window applies only where `use_sliding_window` is true, and
        without `layer_types` only from layer `max_window_layers` on."""
        sliding = bool(hf.get("use_sliding_window", False))
        values = common(hf, sliding)
        if sliding and not isinstance(hf.get("layer_types"), list):
            first = int(hf.get("max_window_layers", values["layers"]))
            values["windows"] = tuple(
                w if i >= first else None for i, w in enumerate(values["windows"])
            )
        return cls(**values, qkv_bias=True)
