"""The Jinja environment that chat templates are written for.

It has what transformers gives them (utils/chat_template_utils.py): sandboxed, blocks trimmed,
loop controls, `raise_exception`, `strftime_now`, `tojson` without HTML escaping, and the
`generation` tag, which marks text for training and means nothing here. Only Jinja is imported:
the template worker starts from this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CACHED_TEMPLATES = 32


class TemplateRaised(jinja2.TemplateError):
    """A template called raise_exception: its words are for the user."""


class OutputTooLong(Exception):
    """A template wrote more than the limit."""


class GenerationTag(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: the body as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateRaised(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=1)
def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    return made


@lru_cache(maxsize=CACHED_TEMPLATES)
def compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def render(template: str, context: Mapping[str, Any], max_characters: int) -> str:
    """The rendered text. OutputTooLong beyond `max_characters`; what Jinja and the template
    raise comes through as it is."""
    pieces: list[str] = []
    length = 0
    for piece in compiled(template).generate(context):
        length += len(piece)
        if length > max_characters:
            raise OutputTooLong(f"more than {max_characters} characters")
        pieces.append(piece)
    return "".join(pieces)


def describe(error: BaseException) -> dict[str, str]:
    """An exception of `render` as data: `kind` is raised, too_long, memory or failed."""
    if isinstance(error, TemplateRaised):
        return {"kind": "raised", "message": str(error)}
    if isinstance(error, OutputTooLong):
        return {"kind": "too_long", "message": str(error)}
    if isinstance(error, MemoryError):
        return {"kind": "memory", "message": "it needs more memory than a template may have"}
    if isinstance(error, jinja2.TemplateSyntaxError):
        message = f"line {error.lineno}: {error.message}"
        return {"kind": "failed", "message": message}
    return {"kind": "failed", "message": f"{type(error).__name__}: {error}"}
