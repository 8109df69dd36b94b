"""A model's files as the source that its layers read: the family's names, quantised weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from quire.kernels.dense import DenseWeights
from quire.layers.build import Build, Kernels
from quire.models.deepseek_v4.parts import IndexTable
from quire.models.registry import adapt_source, build_model, build_mtp
from quire.quant.config import read_scheme
from quire.quant.online import Online
from quire.quant.scheme import Scheme
from quire.quant.source import QuantizedSource
from quire.weights import open_source
from quire.weights.dummy import DummySource
from quire.weights.hub import ModelFiles
from quire.weights.source import TensorInfo, WeightSource

# Formats of tensors that no checkpoint of a model stores in its dtype.
EXACT = ("f32", "i64")


def checkpoint_scheme(files: ModelFiles) -> Scheme | None:
    """How the checkpoint is quantised, None where it is not. Raises ModelError for a scheme that
    is not known."""
    if files.kind == "gguf":
        return None
    return read_scheme(files.config(), files.read_json("hf_quant_config.json"))


def open_checkpoint(files: ModelFiles, drafting: bool = False) -> WeightSource:
    """The weights under the names and shapes that the family's layers ask for; with `drafting`
    those of the MTP module too. Raises ModelError for files that are corrupt, incomplete or
    contradict the config."""
    source = adapt_source(files.config(), open_source(files), drafting)
    scheme = checkpoint_scheme(files)
    return source if scheme is None else QuantizedSource(source, scheme)


def declared_formats(
    hf: dict[str, Any],
    scheme: Scheme | None,
    online: Online | None = None,
    drafting: bool = False,
) -> dict[str, str]:
    """The formats of quantised weights by tensor name, as the config and --quantization tell them;
    with `drafting` those of the MTP module too. Raises UsageError or ModelError where there is
    nothing to quantise, or it cannot be."""
    if scheme is None and online is None:
        return {}
    tensors = _tensors(_shapes(hf, drafting))
    matrices = {info.name: info.shape for info in tensors if len(info.shape) == 2}
    if scheme is not None:
        return scheme.formats(matrices.items())
    return online.formats(matrices.items()) if online is not None else {}


def dummy_checkpoint(
    hf: dict[str, Any],
    scheme: Scheme | None,
    formats: Mapping[str, str],
    seed: int,
    drafting: bool = False,
) -> WeightSource:
    """Seeded weights of the model's shapes: quantised as the scheme says, else in `formats` by
    tensor name, in the config's dtype where they name none. With `drafting` those of the MTP module
    too."""
    declared = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16")
    dense = {"float32": "f32", "float16": "f16"}.get(declared.removeprefix("torch."), "bf16")
    infos: list[TensorInfo] = []
    values: dict[str, float | None] = {}
    build = _shapes(hf, drafting)
    for info in _tensors(build):
        module, _, last = info.name.rpartition(".")
        is_weight = scheme is not None and last == "weight" and len(info.shape) == 2
        storage = scheme.find(module) if scheme is not None and is_weight else None
        if storage is None:
            stored = info.format if info.format in EXACT else dense
            infos.append(TensorInfo(info.name, info.shape, formats.get(info.name, stored)))
            continue
        rows, columns = info.shape
        for part, (shape, format, value) in storage.dummies(rows, columns).items():
            infos.append(TensorInfo(f"{module}.{part}", shape, format))
            values[f"{module}.{part}"] = value
    limits = {w.name: w.limit for w in build.weights if isinstance(w, IndexTable)}
    source = DummySource(infos, seed, index_limits=limits, values=values)
    return source if scheme is None else QuantizedSource(source, scheme)


def _shapes(hf: dict[str, Any], drafting: bool) -> Build:
    # Names and shapes are the same for all kernels; for dense ones the experts of a layer are one
    # weight, and not thousands of layers that nobody asks to compute.
    build = Build(cast(Kernels, DenseWeights(torch.bfloat16, torch.device("meta"))))
    model = build_model(hf, build)
    if drafting:
        build_mtp(hf, model, build)
    return build


def _tensors(build: Build) -> list[TensorInfo]:
    return [info for weight in build.weights for info in weight.tensors()]
