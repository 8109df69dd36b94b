"""The fields of one route, and a request's body as checked values.

A body is first split into raw fields, of which only known ones become objects; then each is
decoded as its own type (`fields`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec

from quire.errors import UsageError, suggest
from quire.server.fields import Field, decode_field


@dataclass(frozen=True)
class RequestSchema:
    """The fields of one route.

    `ignored` cannot change the answer and are accepted unread. `not_built` would change it and
    are refused, except for the neutral values given with each name.
    """

    fields: Mapping[str, Field]
    ignored: frozenset[str] = frozenset()
    not_built: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def parse(self, body: bytes, allow_unknown: bool = False) -> dict[str, Any]:
        """Given fields, checked; None where null was given. Raises UsageError."""
        values = {}
        for name, raw in self._split(body, allow_unknown).items():
            if name in self.fields:
                values[name] = decode_field(name, raw, self.fields[name])
            elif name in self.not_built:
                _refuse_unless_neutral(name, bytes(raw), self.not_built[name])
        return values

    @cached_property
    def _shapes(self) -> tuple[type[msgspec.Struct], type[msgspec.Struct]]:
        """Objects with these fields left raw: refusing unknown ones, and skipping them."""
        names = [*self.fields, *self.ignored, *self.not_built]
        raws = [(name, msgspec.Raw, None) for name in names]
        strict, lenient = (
            msgspec.defstruct("Body", raws, forbid_unknown_fields=forbid)
            for forbid in (True, False)
        )
        return strict, lenient

    def _split(self, body: bytes, allow_unknown: bool) -> dict[str, msgspec.Raw]:
        """The raw fields of a JSON object that are given. Raises UsageError."""
        try:
            found = msgspec.json.decode(body, type=self._shapes[allow_unknown])
        except msgspec.ValidationError as error:
            raise self._unknown(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _not_json(str(error)) from None
        except RecursionError:
            raise _not_json("it is nested too deep") from None
        return {name: raw for name, raw in msgspec.structs.asdict(found).items() if raw is not None}

    def _unknown(self, message: str) -> UsageError:
        match = re.search("unknown field `(.*)`", message, re.DOTALL)
        if match is None:
            return _not_json("it must be an object")
        name = match[1][:80]
        return UsageError(
            "unknown_field",
            f"unknown field {name!r}",
            fix=suggest(name, list(self.fields)),
            field=name,
        )


def _not_json(why: str) -> UsageError:
    return UsageError("invalid_json", "the request body is not a JSON object", why=why)


def _refuse_unless_neutral(name: str, text: bytes, neutral: tuple[Any, ...]) -> None:
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
