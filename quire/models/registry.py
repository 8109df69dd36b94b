"""Which file serves which architecture, and loading weights into a built model."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch

from quire.errors import ModelError, suggest
from quire.layers.build import Build
from quire.layers.inputs import StepInputs
from quire.weights.source import WeightSource

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma3ForCausalLM": "gemma3",
}


class ModelConfig(Protocol):
    """What every family's Config has."""

    vocab_size: int
    hidden: int
    max_len: int


class Model(Protocol):
    """What every family's Model does; see quire/models/llama.py."""

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, step: StepInputs
    ) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


def _module(hf: dict[str, Any]) -> Any:
    names = hf.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in ARCHITECTURES:
        raise ModelError(
            "unknown_architecture",
            f"the model's architecture {name!r} is not known",
            why="config.json: architectures",
            fix=suggest(str(name), list(ARCHITECTURES))
            or "known: " + ", ".join(sorted(ARCHITECTURES)),
        )
    return import_module(f"quire.models.{ARCHITECTURES[name]}")


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """The family's Config. Raises ModelError for an unknown architecture or bad values."""
    config: ModelConfig = _module(hf).Config.from_hf(hf)
    return config


def build_model(hf: dict[str, Any], build: Build) -> Model:
    """The family's Model, without weights and caches."""
    module = _module(hf)
    model: Model = module.Model(module.Config.from_hf(hf), build)
    return model


def load_weights(
    build: Build, source: WeightSource, progress: Callable[[float], None] | None = None
) -> None:
    """Read all weights, one layer part at a time. Raises ModelError for a missing tensor or a
    wrong shape, before anything is read."""
    available = set(source.names())
    for weight in build.weights:
        for want in weight.tensors():
            if want.name not in available:
                raise ModelError(
                    "missing_tensor",
                    f"the checkpoint has no tensor {want.name!r}",
                    fix="check that all files of the model are there and belong together",
                )
            shape = tuple(source.info(want.name).shape)
            if shape != tuple(want.shape):
                raise ModelError(
                    "wrong_shape",
                    f"tensor {want.name!r} has shape {list(shape)}, the config says "
                    f"{list(want.shape)}",
                    fix="check that config.json and weights belong together",
                )
    for i, weight in enumerate(build.weights):
        weight.load(source)
        if progress is not None:
            progress((i + 1) / len(build.weights))
