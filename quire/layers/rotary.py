"""Rotary position embedding: tables of cosines and sines (Su et al. 2021), with scalings.

The tables are computed as Hugging Face transformers does (float32 inverse frequencies), so that
logits agree.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from quire.errors import ModelError
from quire.layers.build import Build


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and scaling values, from either generation of config.json.

    transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling` stood apart.
    """
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    scaling.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    scaling["rope_type"] = scaling.get("rope_type") or scaling.get("type") or "default"
    return scaling


def inverse_frequencies(rotary_dim: int, parameters: dict[str, Any]) -> torch.Tensor:
    """Angles per position, float32 [rotary_dim / 2]. Raises ModelError for an unknown scaling."""
    theta, kind = float(parameters["rope_theta"]), parameters["rope_type"]
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    inverse = 1.0 / (theta**exponents)
    if kind == "default":
        return inverse
    if kind == "linear":
        return inverse / float(parameters["factor"])
    if kind == "llama3":
        return _llama3(inverse, parameters)
    if kind == "factors":  # explicit divisors, as GGUF files carry them
        return inverse / torch.tensor(parameters["factors"], dtype=torch.float32)
    raise ModelError(
        "unknown_rope",
        f"rope scaling {kind!r} is not known",
        why="the model's config.json asks for it",
        fix="known kinds: default, linear, llama3",
    )


def _llama3(inverse: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, middle ones blended."""
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    original = float(parameters["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inverse
    blend = (original / wavelength - low) / (high - low)
    smoothed = (1 - blend) * inverse / factor + blend * inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, inverse)
    middle = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(middle, smoothed, scaled)


class RotaryTable:
    """cos then sin of every position's angles, float32 [max_len, rotary_dim].

    Made on first use, once for all layers of equal parameters.
    """

    def __init__(self, build: Build, rotary_dim: int, parameters: dict[str, Any]):
        self.build, self.rotary_dim, self.parameters = build, rotary_dim, parameters
        self._table: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor:
        if self._table is None:
            key = f"{self.rotary_dim} {sorted(self.parameters.items(), key=str)}"
            if key not in self.build.tables:
                self.build.tables[key] = self._compute()
            self._table = self.build.tables[key]
        return self._table

    def _compute(self) -> torch.Tensor:
        inverse = inverse_frequencies(self.rotary_dim, self.parameters)
        angles = torch.arange(self.build.max_len).float()[:, None] * inverse[None, :]
        return torch.cat([angles.cos(), angles.sin()], dim=1).contiguous()
