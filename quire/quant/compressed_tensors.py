"""quantization_config of compressed-tensors: groups of modules, each with its own arguments."""

from __future__ import annotations

from typing import Any

from quire.formats.layout import FP8_BLOCK, QUANT_FORMATS
from quire.quant.errors import bad_quantization, unknown_quantization
from quire.quant.fields import flag, kv_cache_scheme, strings, table, whole
from quire.quant.integers import PackedIntegers, PlainIntegers
from quire.quant.scheme import Rule, Scheme
from quire.quant.storage import Fp8, Mxfp4, Nvfp4, Storage

# Class names among targets, which mean every linear layer.
CLASSES = ("Linear",)
PACKED, PLAIN = ("pack-quantized",), ("int-quantized", "naive-quantized")
FLOATS = ("float-quantized", "naive-quantized")


def compressed_tensors(config: dict[str, Any]) -> Scheme:
    """Raises ModelError for arguments that are not known or make no sense."""
    sparsity = table(config, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise unknown_quantization(f"compressed-tensors with sparsity {sparsity!r}")
    named, by_class = [], []
    for group in table(config, "config_groups").values():
        if not isinstance(group, dict):
            raise bad_quantization(f"config_groups has {group!r}")
        targets = strings(group, "targets")
        storage = _storage(group, str(group.get("format") or config.get("format")))
        if any(target in CLASSES for target in targets):
            by_class.append(Rule(("*",), storage))
        names = tuple(target for target in targets if target not in CLASSES)
        if names:
            named.append(Rule(names, storage))
    kv_cache = kv_cache_scheme(config)
    if not named and not by_class and not kv_cache:
        raise bad_quantization("config_groups names no module")
    return Scheme(
        f"compressed-tensors {config.get('format')}",
        (*named, *by_class),  # a name says more than a class
        strings(config, "ignore"),
        everything=True,
        kv_cache=kv_cache,
    )


def _storage(group: dict[str, Any], form: str) -> Storage | None:
    weights = table(group, "weights")
    if not weights:
        return None
    kind, bits = weights.get("type"), weights.get("num_bits")
    if type(bits) is not int:
        raise bad_quantization(f"num_bits is {bits!r}, not a whole number")
    if kind == "float" and bits == 8 and form in FLOATS:
        return _float8(group, weights)
    if kind == "float" and bits == 4 and form == "nvfp4-pack-quantized":
        _group_size(weights, QUANT_FORMATS["nvfp4"])
        return Nvfp4()
    if kind == "float" and bits == 4 and form == "mxfp4-pack-quantized":
        _group_size(weights, QUANT_FORMATS["mxfp4"])
        return Mxfp4()
    if kind == "int" and bits in (4, 8) and form in PACKED:
        ordered = weights.get("actorder") in ("group", "dynamic", True)
        size = _columns(weights)
        return PackedIntegers(bits, size, ordered and size > 0, flag(weights, "symmetric", True))
    if kind == "int" and bits == 8 and form in PLAIN:
        return PlainIntegers(8, _columns(weights), False, flag(weights, "symmetric", True))
    raise unknown_quantization(f"compressed-tensors {form} with {kind} of {bits!r} bits")


def _float8(group: dict[str, Any], weights: dict[str, Any]) -> Storage:
    strategy = weights.get("strategy")
    if strategy not in ("tensor", "channel", "block"):
        raise unknown_quantization(f"compressed-tensors fp8 with strategy {strategy!r}")
    block = weights.get("block_structure")
    if strategy == "block" and block not in ([FP8_BLOCK, FP8_BLOCK], f"{FP8_BLOCK}x{FP8_BLOCK}"):
        raise unknown_quantization(f"compressed-tensors fp8 in blocks of {block!r}")
    inputs = table(group, "input_activations")
    activation = "none"
    if inputs:
        # Scales that depend on the whole batch are taken per token, which is finer.
        activation = "token" if inputs.get("dynamic") else "tensor"
    if strategy == "block" and activation == "tensor":
        raise unknown_quantization("compressed-tensors fp8 in blocks with static activation scales")
    return Fp8(strategy == "block", activation)


def _group_size(weights: dict[str, Any], wanted: int) -> None:
    size = whole(weights, "group_size", wanted)
    if size != wanted:
        raise unknown_quantization(f"compressed-tensors four-bit floats in groups of {size}")


def _columns(weights: dict[str, Any]) -> int:
    """Columns that share a scale, 0 for the whole row."""
    strategy = weights.get("strategy")
    if strategy == "group":
        return whole(weights, "group_size", 128)
    if strategy in ("channel", "tensor"):
        return 0
    raise unknown_quantization(f"compressed-tensors integers with strategy {strategy!r}")
