"""From flags, environment, config file and keyword arguments to Options, with every value checked.

Precedence: keyword or flag, then environment, then config file, then default.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import Field, replace
from pathlib import Path
from typing import Any

from quire.config.options import SECTIONS, Options, all_options
from quire.config.sizes import parse_size
from quire.errors import UsageError, suggest

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


def base_type(item: Field[Any]) -> str:
    """ "int", "float", "bool" or "str" of an option, without its ` | None`."""
    return str(item.type).split("|")[0].strip()


def convert(name: str, item: Field[Any], value: Any, where: str = "") -> Any:
    """`value` (of a flag, variable, file key or keyword) as the option's type, checked.

    Raises UsageError that names the option, what is allowed and `where` the value came from.
    """
    if value is None and "None" in str(item.type):
        return None
    if item.metadata["parse"]:
        return item.metadata["parse"](value)
    try:
        if item.metadata["check"] and isinstance(value, list):
            value = ",".join(map(str, value))
        return _in_range(_to_type(base_type(item), value, item.metadata["size"]), item.metadata)
    except ValueError as error:
        shown = "..." if item.metadata["secret"] else repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise UsageError(
            code="invalid_option",
            what=f"--{name.replace('_', '-')}: {shown} is not allowed" + (where and f" ({where})"),
            why=f"it must be {error}",
            fix=suggest(str(value), list(item.metadata["choices"] or ())),
            field=name,
        ) from None


def _to_type(kind: str, value: Any, size: bool) -> Any:
    """Raises ValueError whose text says what is allowed."""
    if kind == "bool":
        return _to_bool(value)
    if kind == "int":
        return _to_int(value, size)
    if kind == "float":
        return _to_float(value)
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    raise ValueError("a string")


def _in_range(value: Any, meta: Mapping[str, Any]) -> Any:
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError("one of " + ", ".join(meta["choices"]))
    if meta["low"] is not None and value < meta["low"]:
        raise ValueError(f"at least {meta['low']}")
    if meta["high"] is not None and value > meta["high"]:
        raise ValueError(f"at most {meta['high']}")
    if meta["check"]:
        meta["check"](value)
    return value


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    raise ValueError("true or false")


def _to_int(value: Any, size: bool) -> int:
    if isinstance(value, str) and size:
        return parse_size(value)
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError("a whole number")
    try:
        return int(value)
    except (ValueError, TypeError):
        raise ValueError("a whole number") from None


def _to_float(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


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
    for section in SECTIONS:
        changes = {name: v for name, v in values.items() if known[name][0] == section}
        options = replace(options, **{section: replace(getattr(options, section), **changes)})
    return options


def _checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    known = all_options()
    result: dict[str, Any] = {}
    for raw, value in values.items():
        name = raw.replace("-", "_")
        if name not in known:
            raise UsageError(
                code="unknown_option",
                what=f"unknown option {raw!r} in {where}",
                fix=suggest(name, list(known)),
                field=raw,
            )
        if name in result:
            raise UsageError(
                code="option_twice",
                what=f"{name} is given twice in {where}",
                why="`-` and `_` in a name mean the same",
                field=name,
            )
        result[name] = convert(name, known[name][1], value, f"in {where}")
    return result


def read_config_file(path: str) -> dict[str, Any]:
    """Keys of a TOML file; tables named after the sections may group them."""
    import tomllib

    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError("config_file", f"cannot read {path}", why=str(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError("config_file", f"{path} is not valid TOML", why=str(error)) from None
    flat: dict[str, Any] = {}
    for key, value in data.items():
        entries = value if isinstance(value, dict) and key in SECTIONS else {key: value}
        for name, entry in entries.items():
            if name in flat:
                raise UsageError(
                    "option_twice", f"{name} is given twice in config file {path}", field=name
                )
            flat[name] = entry
    return flat


def options_markdown() -> str:
    """docs/options.md: every option as flag, variable, file key, default and meaning."""
    lines = [
        "# Options",
        "",
        "Generated from `quire/config/options.py` by `python -m quire.config.parse`. A flag",
        "`--some-option` is also the environment variable `QUIRE_SOME_OPTION`, the key",
        "`some-option` of a TOML file given with `--config`, and the keyword `some_option` of",
        "`quire.LLM`. Flags win over the environment, the environment over the file. Booleans have",
        "a `--no-...` form. `model` is the first argument of a command instead of a flag.",
    ]
    for section in SECTIONS:
        lines += ["", f"## {section}", "", "| flag | default | meaning |", "|---|---|---|"]
        for name, (_, item) in all_options(section).items():
            flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            lines.append(f"| `{flag}` | {_default_text(item)} | {describe(item)} |")
    return "\n".join(lines) + "\n"


def describe(item: Field[Any]) -> str:
    """An option's help with its choices and range."""
    meta = item.metadata
    if meta["choices"]:
        return f"{meta['help']} ({', '.join(meta['choices'])})"
    low, high = meta["low"], meta["high"]
    if low is not None and high is not None:
        return f"{meta['help']} ({low} to {high})"
    return f"{meta['help']} (at least {low})" if low is not None else str(meta["help"])


def _default_text(item: Field[Any]) -> str:
    if item.default is None:
        return ""
    if isinstance(item.default, bool):
        return "yes" if item.default else "no"
    return f"`{item.default}`"


if __name__ == "__main__":
    print(options_markdown(), end="")
