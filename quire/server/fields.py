"""JSON to checked fields: each field has one type, one size limit, and words for what is allowed.

A body is first split into raw fields, then each field is decoded as its own type: hostile nesting
or an unknown field never becomes Python objects. NaN and Infinity are not JSON and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from quire.errors import UsageError, suggest
from quire.params import LIMITS, Limit, check_field

# An escaped character outside the basic plane takes 12 bytes of JSON (two \uXXXX).
_BYTES_PER_CHARACTER = 12


@dataclass(frozen=True)
class Field:
    """One field of a request.

    `type` is what msgspec decodes, `allowed` says it in words, `max_bytes` bounds the JSON text
    before it is decoded, `check` is a further condition on the decoded value.
    """

    type: Any
    allowed: str
    max_bytes: int | None = 4096
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
    types: dict[str, tuple[Any, int]] = {
        "int": (int | None, 4096),
        "float": (float | None, 4096),
        "bool": (bool | None, 4096),
        "strings": (
            str | list[str] | None,
            1024 + limit.items * (limit.characters * _BYTES_PER_CHARACTER + 4),
        ),
        "ids": (list[int] | None, 1024 + 32 * limit.items),
        "bias": (dict[int, float] | None, 1024 + 64 * limit.items),
    }
    kind, max_bytes = types[limit.kind]
    return Field(kind, limit.describe(), max_bytes, limit=limit)


SAMPLING_FIELDS = {name: limit_field(limit) for name, limit in LIMITS.items()}


def split_object(body: bytes) -> dict[str, msgspec.Raw]:
    """The raw fields of a JSON object. Raises UsageError for anything else."""
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise UsageError("invalid_json", "the request body must be a JSON object") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError("invalid_json", "the request body is not JSON", why=str(error)) from None
    except RecursionError:
        raise UsageError("invalid_json", "the request body is nested too deep") from None


def decode_field(name: str, raw: msgspec.Raw, field: Field) -> Any:
    """The value of one field, checked. Raises UsageError that names it and what is allowed."""
    if field.max_bytes is not None and len(raw_bytes := bytes(raw)) > field.max_bytes:
        detail = f"{len(raw_bytes)} bytes of JSON, more than any allowed value has"
        raise invalid(name, detail, field.allowed)
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
    if field.limit is not None:
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


@dataclass(frozen=True)
class RequestSchema:
    """The fields of one route.

    `ignored` cannot change the answer and are accepted unread. `not_built` would change it and
    are refused, except for the neutral values given with each name.
    """

    fields: Mapping[str, Field]
    ignored: frozenset[str] = frozenset()
    not_built: Mapping[str, tuple[Any, ...]] | None = None

    def parse(self, body: bytes, allow_unknown: bool = False) -> dict[str, Any]:
        """Given fields, checked; None where null was given. Raises UsageError."""
        values = {}
        for name, raw in split_object(body).items():
            field = self.fields.get(name)
            if field is not None:
                values[name] = decode_field(name, raw, field)
            elif name in self.ignored:
                continue
            elif self.not_built is not None and name in self.not_built:
                _refuse_unless_neutral(name, raw, self.not_built[name])
            elif not allow_unknown:
                raise UsageError(
                    "unknown_field",
                    f"unknown field {name[:80]!r}",
                    fix=suggest(name[:80], list(self.fields)),
                    field=name[:80],
                )
        return values


def _refuse_unless_neutral(name: str, raw: msgspec.Raw, neutral: tuple[Any, ...]) -> None:
    text = bytes(raw)
    if text == b"null":
        return
    if len(text) <= 256:
        try:
            if msgspec.json.decode(text) in neutral:
                return
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UsageError("invalid_json", f"{name}: {error}", field=name) from None
    raise UsageError(
        "not_supported",
        f"{name} is not supported yet with this value",
        why="it would change the answer, so it is refused rather than ignored",
        fix=f"leave {name} out",
        field=name,
    )
