"""Qwen3: Llama's decoder with RMS norms on every query and key head."""

from __future__ import annotations

from typing import Any

from quire.models import llama
from quire.models.config import activation
from quire.models.llama import Model
from quire.models.qwen2 import qwen_common

__all__ = ["Config", "Model"]


class Config(llama.Config):
    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Config:
        """Qwen3's config.json."""
        bias = bool(hf.get("attention_bias", False))
        values = qwen_common({"head_dim": 128, **hf})
        return cls(**values, qkv_bias=bias, out_bias=bias, qk_norm=True, activation=activation(hf))
