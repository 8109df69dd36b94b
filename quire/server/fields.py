"""One field of a request: its type, its size, its limits, and words for what is allowed.

A field is decoded as its own type, so that hostile nesting never becomes Python objects. NaN and
Infinity are not JSON and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from quire.errors import UsageError
from quire.params import LIMITS, Limit, check_field

# An escaped character outside the basic plane takes 12 bytes of JSON (two \uXXXX).
_BYTES_PER_CHARACTER = 12


@dataclass(frozen=True)
class Field:
    """One field of a request.

    `type` is what msgspec decodes, `allowed` says it in words, `check` is a further condition on
    the decoded value. `max_bytes` and `most` (pairs: bytes that every element contains, and how
    often they may be there) bound the JSON text before it is decoded: what is far too long costs
    the event loop nothing.
    """

    type: Any
    allowed: str
    max_bytes: int | None = 4096
    most: tuple[tuple[bytes, int], ...] = ()
    check: Callable[[Any], bool] | None = None
    limit: Limit | None = None


def string_field(characters: int) -> Field:
    """A string of 1 to `characters` characters."""
    return Field(
        str | None,
        f"a string of 1 to {characters} characters",
        characters * _BYTES_PER_CHARACTER + 2,
        check=lambda value: 0 < len(value) <= characters,
    )


def bool_field() -> Field:
    """true or false."""
    return Field(bool | None, "true or false")


def int_field(low: int, high: int) -> Field:
    """An integer from `low` to `high`, inclusive."""
    return Field(
        int | None,
        f"an integer from {low} to {high}",
        check=lambda value: low <= value <= high,
    )


def limit_field(limit: Limit) -> Field:
    """The field that an entry of params.LIMITS describes."""
    allowed = limit.describe()
    if limit.kind == "strings":
        one = limit.characters * _BYTES_PER_CHARACTER + 4
        return Field(str | list[str] | None, allowed, 1024 + limit.items * one, limit=limit)
    if limit.kind == "ids":
        return Field(list[int] | None, allowed, None, ((b",", limit.items),), limit=limit)
    if limit.kind == "bias":
        return Field(dict[int, float] | None, allowed, None, ((b",", limit.items),), limit=limit)
    types: dict[str, Any] = {"int": int | None, "float": float | None, "bool": bool | None}
    return Field(types[limit.kind], allowed, limit=limit)


SAMPLING_FIELDS = {name: limit_field(limit) for name, limit in LIMITS.items()}


def decode_field(name: str, raw: msgspec.Raw, field: Field) -> Any:
    """The value of one field, checked. Raises UsageError that names it and what is allowed."""
    text = bytes(raw)
    if field.max_bytes is not None and len(text) > field.max_bytes:
        detail = f"{len(text)} bytes of JSON, more than any allowed value has"
        raise invalid(name, detail, field.allowed)
    if any(text.count(part) > most for part, most in field.most):
        raise invalid(name, "too many elements", field.allowed)
    try:
        value = msgspec.json.decode(raw, type=field.type)
    except RecursionError:
        raise invalid(name, "nested too deep", field.allowed) from None
    except UnicodeDecodeError:
        raise invalid(name, "not valid UTF-8", field.allowed) from None
    except msgspec.DecodeError as error:
        path, detail = _where(str(error))
        raise invalid(name, detail, field.allowed, path) from None
    if value is None:
        return None
    if field.limit is not None and field.limit.kind != "ids":  # those: once, by SamplingParams
        single = field.limit.kind == "strings" and isinstance(value, str)
        check_field(name, [value] if single else value, field.limit)
    elif field.check is not None and not field.check(value):
        raise invalid(name, "this value is not allowed", field.allowed)
    return value


def invalid(name: str, detail: str, allowed: str, path: str = "") -> UsageError:
    """A 400 that names a field, what is wrong with it, and what is allowed."""
    why = f"{name} must be {allowed}"
    return UsageError("invalid_value", f"{name}{path}: {detail}", why=why, field=name)


def _where(message: str) -> tuple[str, str]:
    """msgspec's "problem - at `$[0].role`" as ("[0].role", "problem")."""
    detail, _, path = message.partition(" - at ")
    found = re.search(r"\$([^`]*)", path)
    return (found[1] if found else ""), detail.replace("`", "")
