"""Typed values of quantisation configs, with errors that name the key."""

from __future__ import annotations

from typing import Any

from quire.quant.errors import bad_quantization


def table(config: dict[str, Any], key: str) -> dict[str, Any]:
    """A JSON object; empty where it is missing or null."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_quantization(f"{key} is not an object but {_short(value)}")
    return value


def strings(config: dict[str, Any], key: str) -> tuple[str, ...]:
    """A list of strings; empty where it is missing or null."""
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise bad_quantization(f"{key} is not a list of names but {_short(value)}")
    return tuple(value)


def whole(config: dict[str, Any], key: str, default: int) -> int:
    """A positive whole number."""
    value = config.get(key, default)
    if value is None:
        return default
    if type(value) is not int or not 0 < value <= 2**20:
        raise bad_quantization(f"{key} is {_short(value)}, not a positive whole number")
    return value


def flag(config: dict[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad_quantization(f"{key} is {_short(value)}, not true or false")
    return value


def choice(config: dict[str, Any], key: str, default: str, known: tuple[str, ...]) -> str | None:
    """One of `known`; None for another."""
    value = config.get(key)
    if value is None:
        return default
    return value if isinstance(value, str) and value in known else None


def kv_cache_scheme(config: dict[str, Any]) -> str:
    """The format of the KV cache that `kv_cache_scheme` tells, "" where there is none."""
    scheme = table(config, "kv_cache_scheme")
    if not scheme:
        return ""
    kind, bits = str(scheme.get("type") or "float"), whole(scheme, "num_bits", 8)
    return "fp8" if (kind, bits) == ("float", 8) else f"{kind} of {bits} bits"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
