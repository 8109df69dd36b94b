"""Quantisation configs of NVIDIA's ModelOpt, in hf_quant_config.json or config.json."""

from __future__ import annotations

from typing import Any

from quire.formats.layout import QUANT_FORMATS
from quire.quant.errors import bad_quantization, unknown_quantization
from quire.quant.fields import kv_cache_scheme, strings, table, whole
from quire.quant.scheme import Rule, Scheme
from quire.quant.storage import Fp8, Nvfp4, Storage

STORAGES: dict[str, Storage] = {
    "FP8": Fp8(activation="tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": Fp8(),
    "FP8_PB_WO": Fp8(block=True, activation="none"),
    "NVFP4": Nvfp4(),
    "W4A16_NVFP4": Nvfp4(),
}


def modelopt(config: dict[str, Any]) -> Scheme:
    """hf_quant_config.json holds the table `quantization`, config.json the same keys by other
    names. Raises ModelError for an algorithm that is not known."""
    inner = table(config, "quantization") or config
    algorithm = inner.get("quant_algo")
    if not isinstance(algorithm, str):
        raise bad_quantization(f"quant_algo is {algorithm!r}")
    algorithm = algorithm.upper()
    if algorithm == "MIXED_PRECISION":
        layers = table(inner, "quantized_layers")
        rules = tuple(
            Rule((name,), _storage(layer if isinstance(layer, dict) else {}))
            for name, layer in layers.items()
        )
        if not rules:
            raise bad_quantization("quant_algo is MIXED_PRECISION and quantized_layers is empty")
    else:
        rules = (Rule(("*",), _storage(inner)),)
    kv_cache = str(inner.get("kv_cache_quant_algo") or kv_cache_scheme(inner)).lower()
    return Scheme(
        f"modelopt {algorithm}",
        rules,
        strings(inner, "exclude_modules") + strings(inner, "ignore"),
        everything=True,
        kv_cache="" if kv_cache == "none" else kv_cache,
    )


def _storage(layer: dict[str, Any]) -> Storage:
    algorithm = str(layer.get("quant_algo")).upper()
    if algorithm not in STORAGES:
        raise unknown_quantization(f"modelopt {algorithm!r}")
    storage = STORAGES[algorithm]
    group = whole(layer, "group_size", QUANT_FORMATS["nvfp4"])
    if storage.format == "nvfp4" and group != QUANT_FORMATS["nvfp4"]:
        raise unknown_quantization(f"modelopt NVFP4 in groups of {group}")
    return storage
