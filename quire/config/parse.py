"""From flags, environment, config file and keyword arguments to Options, with every value checked.

Precedence: keyword or flag, then environment, then config file, then default.
"""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import Field, replace
from pathlib import Path
from typing import Any

from quire.config.options import Options, all_options
from quire.errors import UsageError, suggest

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


def parse_size(text: str) -> int:
    """Bytes from "4GiB", "500MB" or "1024". Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise ValueError("a size like 4GiB, 500MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def base_type(item: Field[Any]) -> str:
    """"int", "float", "bool" or "str" of an option, without its ` | None`."""
    return str(item.type).split("|")[0].strip()


def convert(name: str, item: Field[Any], value: Any) -> Any:
    """`value` (of a flag, variable, file key or keyword) as the option's type, checked.

    Raises UsageError that names the option and what is allowed.
    """
    kind, meta = base_type(item), item.metadata
    if value is None and "None" in str(item.type):
        return None
    try:
        if kind == "bool":
            result: Any = _to_bool(value)
        elif kind == "int":
            result = _to_int(value, meta["size"])
        elif kind == "float":
            if isinstance(value, bool):
                raise ValueError("a number")
            result = float(value)
            if not math.isfinite(result):
                raise ValueError("a finite number")
        elif isinstance(value, str):
            result = value
        else:
            raise ValueError("a string")
        if meta["choices"] and result not in meta["choices"]:
            raise ValueError("one of " + ", ".join(meta["choices"]))
        if meta["low"] is not None and result < meta["low"]:
            raise ValueError(f"at least {meta['low']}")
        if meta["high"] is not None and result > meta["high"]:
            raise ValueError(f"at most {meta['high']}")
    except ValueError as error:
        allowed = str(error)
        if "could not convert" in allowed or "invalid literal" in allowed:
            allowed = "a number"
        shown = "..." if meta["secret"] else repr(value)
        raise UsageError(
            code="invalid_option",
            what=f"--{name.replace('_', '-')}: {shown} is not allowed",
            why=f"it must be {allowed}",
            field=name,
        ) from None
    return result


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    raise ValueError("true or false")


def _to_int(value: Any, size: bool) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError("a whole number")
    if isinstance(value, str) and size:
        return parse_size(value)
    return int(value)


def build_options(
    given: dict[str, Any],
    environment: dict[str, str] | None = None,
    config_file: str | None = None,
) -> Options:
    """Options from named values. Unknown names are UsageErrors with a suggestion."""
    values: dict[str, Any] = {}
    if config_file:
        values.update(_checked(read_config_file(config_file), f"config file {config_file}"))
    if environment:
        values.update(_checked(environment, "the environment (QUIRE_*)"))
    values.update(_checked(given, "the arguments"))
    options = Options()
    known = all_options()
    for section in ("model", "engine", "server"):
        changes = {name: v for name, v in values.items() if known[name][0] == section}
        options = replace(options, **{section: replace(getattr(options, section), **changes)})
    return options


def _checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    known = all_options()
    result = {}
    for raw, value in values.items():
        name = raw.replace("-", "_")
        if name not in known:
            raise UsageError(
                code="unknown_option",
                what=f"unknown option {raw!r} in {where}",
                fix=suggest(name, list(known)),
                field=raw,
            )
        result[name] = convert(name, known[name][1], value)
    return result


def read_config_file(path: str) -> dict[str, Any]:
    """Keys of a TOML file; tables named after the sections may group them."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError("config_file", f"cannot read {path}", why=str(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError("config_file", f"{path} is not valid TOML", why=str(error)) from None
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and key in ("model", "engine", "server"):
            flat.update(value)
        else:
            flat[key] = value
    return flat


def options_markdown() -> str:
    """docs/options.md: every option as flag, variable, file key, default and meaning."""
    lines = [
        "# Options",
        "",
        "Generated from `quire/config/options.py` (`make docs`). A flag `--some-option` is also the",
        "environment variable `QUIRE_SOME_OPTION`, the key `some-option` of a TOML file given with",
        "`--config`, and the keyword `some_option` of `quire.LLM`. Flags win over the environment,",
        "the environment over the file. Booleans have a `--no-...` form.",
    ]
    for section in ("model", "engine", "server"):
        lines += ["", f"## {section}", "", "| flag | default | meaning |", "|---|---|---|"]
        for name, (_, item) in all_options(section).items():
            meta = item.metadata
            text = meta["help"]
            if meta["choices"]:
                text += " (" + ", ".join(meta["choices"]) + ")"
            if meta["live"]:
                text += "; can change while running"
            lines.append(f"| `--{name.replace('_', '-')}` | {item.default!r} | {text} |")
    return "\n".join(lines) + "\n"
