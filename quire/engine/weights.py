"""Where an engine's weights come from: files, quantised or not, or seeded dummies of their kind."""

from __future__ import annotations

import torch

from quire.config.options import Options
from quire.errors import UsageError
from quire.models.checkpoint import checkpoint_scheme, dummy_checkpoint, open_checkpoint
from quire.quant.online import Online, OnlineSource
from quire.quant.scheme import Scheme
from quire.quant.source import QuantizedSource
from quire.weights import open_source
from quire.weights.hub import ModelFiles
from quire.weights.source import WeightSource


def asked_quantization(options: Options, files: ModelFiles) -> Online | None:
    """What --quantization asks for. Raises UsageError for a checkpoint that is quantised."""
    if options.model.quantization is None:
        return None
    if files.kind == "gguf" or checkpoint_scheme(files) is not None:
        raise UsageError(
            "already_quantized",
            f"--quantization {options.model.quantization}: {files.name} is quantised already",
            why="rounding twice would lose more than the format says",
            fix="leave it out, or name an unquantised checkpoint",
            field="quantization",
        )
    return Online(options.model.quantization)


def kv_cache_format(scheme: Scheme | None, source: WeightSource | None) -> str:
    """The format of the KV cache that a checkpoint was made for, "" for the model's own."""
    if kv_cache_scales(source):
        return (scheme.kv_cache if scheme is not None else "") or "fp8"
    return "" if scheme is None else scheme.kv_cache


def kv_cache_scales(source: WeightSource | None) -> dict[str, torch.Tensor]:
    """A checkpoint's scales for an FP8 KV cache by tensor name. Raises ModelError for one that
    makes no sense."""
    return source.kv_scales() if isinstance(source, QuantizedSource) else {}


def open_weights(options: Options, files: ModelFiles) -> WeightSource | None:
    """The files' weights, quantised as they are read where --quantization asks for it; None with
    --load-format dummy and where there is only config.json.

    Raises UsageError where --load-format names another kind than the files are.
    """
    wanted = options.model.load_format
    held = "gguf" if files.kind == "gguf" else "safetensors"
    if wanted not in ("auto", "dummy", held):
        raise UsageError(
            "load_format_mismatch",
            f"--load-format {wanted}: the weights of {files.name} are {held}",
            fix="leave --load-format out, or name another model",
            field="load_format",
        )
    if wanted == "dummy" or files.kind == "config":
        return None
    return _quantize(open_checkpoint(files, options.engine.mtp), options, files)


def _quantize(source: WeightSource, options: Options, files: ModelFiles) -> WeightSource:
    online = asked_quantization(options, files)
    return source if online is None else OnlineSource(source, online)


def dummy_source(options: Options, files: ModelFiles) -> WeightSource:
    """Seeded weights of the model's shapes, in the formats that its config or its GGUF file
    tell."""
    scheme, formats = checkpoint_scheme(files), stored_formats(files)
    seed, drafting = options.model.seed, options.engine.mtp
    source = dummy_checkpoint(files.config(), scheme, formats, seed, drafting)
    return _quantize(source, options, files)


def stored_formats(files: ModelFiles) -> dict[str, str]:
    """The format of each tensor of a GGUF file, which dummies of it have too; none of others."""
    if files.kind != "gguf":
        return {}
    with open_source(files) as source:
        return {name: source.info(name).format for name in source.names()}
