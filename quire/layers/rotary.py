"""Rotary position embedding: tables of cosines and sines (Su et al. 2021), with scalings.

The tables are computed as Hugging Face transformers does (float32 inverse frequencies), so that
logits agree.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from quire.errors import ModelError
from quire.layers.build import Build

ORIGINAL = "original_max_position_embeddings"
MOST = sys.float_info.max


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and scaling values, from either generation of config.json.

    transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling` stood apart.
    Raises ModelError where they are no table.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ModelError("bad_config", f"config.json: the rope parameters are {given!r}")
    found = dict(given)
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)):
        if found.get(key) is None:
            found[key] = default if config.get(key) is None else config[key]
    found["rope_type"] = found.get("rope_type") or found.pop("type", None) or "default"
    if found["rope_type"] == "yarn" and found.get(ORIGINAL) is None:
        found[ORIGINAL] = config.get("max_position_embeddings")
    return found


def _value(parameters: dict[str, Any], key: str) -> float:
    """A positive number among rope parameters."""
    value = parameters.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MOST:
        raise ModelError(
            "bad_config",
            f"config.json: {key} of the rope parameters is {value!r}",
            why=f"rope scaling {parameters['rope_type']!r} needs a positive number",
        )
    return float(value)


def inverse_frequencies(rotary_dim: int, parameters: dict[str, Any]) -> torch.Tensor:
    """Angles per position, float32 [rotary_dim / 2]. Raises ModelError for an unknown scaling."""
    theta, kind = _value(parameters, "rope_theta"), parameters["rope_type"]
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    inverse = 1.0 / (theta**exponents)
    if kind == "default":
        return inverse
    if kind == "linear":
        return inverse / _value(parameters, "factor")
    if kind == "llama3":
        return _llama3(inverse, parameters)
    if kind == "yarn":
        return _yarn(inverse, parameters)
    raise ModelError(
        "unknown_rope",
        f"rope scaling {kind!r} is not known",
        why="the model's config.json asks for it",
        fix="known kinds: default, linear, llama3, yarn",
    )


def _llama3(inverse: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, middle ones blended."""
    factor = _value(parameters, "factor")
    low, high = _value(parameters, "low_freq_factor"), _value(parameters, "high_freq_factor")
    original = _value(parameters, "original_max_position_embeddings")
    wavelength = 2 * math.pi / inverse
    blend = (original / wavelength - low) / (high - low)
    smoothed = (1 - blend) * inverse / factor + blend * inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, inverse)
    middle = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(middle, smoothed, scaled)


def _yarn(inverse: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    """YaRN (Peng et al. 2023): pairs that turn often within the original context stay, those that
    turn rarely are divided by `factor`, a ramp lies between."""
    parameters = {"beta_fast": 32.0, "beta_slow": 1.0, **parameters}
    theta, original = _value(parameters, "rope_theta"), _value(parameters, ORIGINAL)
    pairs = len(inverse)
    if theta <= 1:
        raise _bad_yarn(f"rope_theta is {theta}, and must be more than 1")

    def pair_of(name: str) -> float:
        """The pair (a fraction of one) that turns this often within the original context."""
        ratio = original / (_value(parameters, name) * 2 * math.pi)
        if not 0 < ratio < math.inf:
            raise _bad_yarn(f"{name} {parameters[name]} is too far from {ORIGINAL} {original}")
        return pairs * math.log(ratio) / math.log(theta)

    low, high = pair_of("beta_fast"), pair_of("beta_slow")
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = (torch.arange(pairs).float() - low) / (high - low if high != low else 0.001)
    ramp = ramp.clamp(0, 1)
    return inverse / _value(parameters, "factor") * ramp + inverse * (1 - ramp)


def _bad_yarn(why: str) -> ModelError:
    return ModelError("bad_config", "config.json: its YaRN rope parameters cannot be used", why=why)


def attention_factor(parameters: dict[str, Any]) -> float:
    """What cosines and sines are multiplied with: YaRN's temperature, 1 for other scalings."""
    if parameters["rope_type"] != "yarn":
        return 1.0
    if parameters.get("attention_factor") is not None:
        return _value(parameters, "attention_factor")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return yarn_growth(parameters, "mscale") / yarn_growth(parameters, "mscale_all_dim")
    return yarn_growth({**parameters, "mscale": 1.0}, "mscale")


def yarn_growth(parameters: dict[str, Any], key: str) -> float:
    """0.1 m ln(factor) + 1 of YaRN (Peng et al. 2023, equation 22) with m the value of `key`, by
    which DeepSeek weighs it; 1 where the key is missing or 0, and for other scalings."""
    if parameters["rope_type"] != "yarn" or not parameters.get(key):
        return 1.0
    return 0.1 * _value(parameters, key) * math.log(max(1.0, _value(parameters, "factor"))) + 1.0


class RotaryTable:
    """cos then sin of every position's angles, float32 [max_len, rotary_dim].

    Made on first use, once for all layers of equal parameters. `partial_rotary_factor` is the
    part of a head that is rotated. Raises ModelError for parameters that are not known.
    """

    def __init__(self, build: Build, head_size: int, parameters: dict[str, Any]):
        self.build = build
        part = min(_value(parameters, "partial_rotary_factor"), 2.0)
        rotary_dim = int(head_size * part)
        if rotary_dim % 2 or not 0 < rotary_dim <= head_size:
            raise ModelError(
                "bad_config", f"config.json: {rotary_dim} of {head_size} values of a head rotate"
            )
        self.inverse = inverse_frequencies(rotary_dim, parameters)
        self.factor = attention_factor(parameters)
        self.key = f"{rotary_dim} {sorted(parameters.items(), key=str)}"
        build.rotary_bytes[self.key] = 4 * rotary_dim
        self._table: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor:
        if self._table is None:
            if self.key not in self.build.tables:
                self.build.tables[self.key] = self._compute()
            self._table = self.build.tables[self.key]
        return self._table

    def _compute(self) -> torch.Tensor:
        # Computed on the CPU whatever the device, so that all devices rotate by the same angles.
        table = torch.empty(self.build.max_len, 2 * len(self.inverse))
        cosine, sine = table.chunk(2, dim=1)
        torch.mul(torch.arange(self.build.max_len).float()[:, None], self.inverse, out=sine)
        cosine.copy_(sine).cos_()
        sine.sin_()
        if self.factor != 1.0:
            table *= self.factor
        return table.to(self.build.device)
