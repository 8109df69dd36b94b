"""Mistral: Llama's decoder with a sliding window in every layer."""

from __future__ import annotations

from typing import Any

from quire.models import llama
from quire.models.config import activation
from quire.models.llama import Model, common

__all__ = ["Config", "Model"]


class Config(llama.Config):
    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Config:
        """Mistral's config.json; `sliding_window` null means full attention."""
        return cls(**common(hf, sliding=True), activation=activation(hf))
