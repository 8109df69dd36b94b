"""Named tensors of a model, wherever they come from, read part by part and never pickled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quire.errors import ModelError

if TYPE_CHECKING:
    from quire.weights.hub import ModelFiles
    from quire.weights.source import TensorInfo, WeightSource


def open_source(
    files: ModelFiles, dummy: Sequence[TensorInfo] | None = None, seed: int = 0
) -> WeightSource:
    """The weights of resolved model files; seeded random ones of the given kinds if `dummy`.

    ModelError if the files hold no weights that can be read safely, or are corrupt.
    """
    if dummy is not None:
        from quire.weights.dummy import DummySource

        return DummySource(dummy, seed)
    if files.kind == "gguf":
        from quire.weights.gguf import GgufSource

        return GgufSource(files.gguf_header)
    if files.kind == "safetensors":
        from quire.weights.safetensors import SafetensorsSource

        return SafetensorsSource(files.path)
    raise no_weights(files)


def no_weights(files: ModelFiles) -> ModelError:
    """The error of a model that has only a config.json."""
    pickled = [name.name for name in files.path.glob("*.bin")]
    return ModelError(
        code="no_weights",
        what=f"{files.name} has a config.json but no safetensors weights",
        why=f"{pickled[0]} is a pickle, which can run code when it is loaded" if pickled else "",
        fix="convert the model to safetensors, or use --load-format dummy",
    )
