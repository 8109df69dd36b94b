"""Chat messages as clients send them, made into what chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quire.errors import UsageError

TEXT_PARTS = ("text", "input_text", "output_text")


def normalize_messages(messages: Any, template: str) -> list[dict[str, Any]]:
    """Copies of the messages: text parts joined by newlines, arguments of tool calls as objects.

    A developer's message becomes a system message where the template has no such role; missing
    content becomes empty text. UsageError naming the message for anything else than messages of
    text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise _invalid("messages must be a list of at least one message", "messages")
    knows_developer = "developer" in template
    return [
        _normalize(message, f"messages[{place}]", knows_developer)
        for place, message in enumerate(messages)
    ]


def _normalize(message: Any, field: str, knows_developer: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise _invalid("a message must be an object with a role", field)
    result = dict(message)
    if result["role"] == "developer" and not knows_developer:
        result["role"] = "system"
    result["content"] = _text(message.get("content"), f"{field}.content")
    calls = message.get("tool_calls")
    if calls is None:
        result.pop("tool_calls", None)
    else:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise _invalid("tool_calls must be a list", f"{field}.tool_calls")
        result["tool_calls"] = [
            _tool_call(call, f"{field}.tool_calls[{place}]") for place, call in enumerate(calls)
        ]
    return result


def _text(content: Any, field: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise _invalid("content must be text or a list of parts", field)
    texts = []
    for place, part in enumerate(content):
        where = f"{field}[{place}]"
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise _invalid("a content part must be an object with a type", where)
        elif part["type"] not in TEXT_PARTS:
            raise UsageError(
                code="content_unsupported",
                what=f"content of type {part['type']!r} is not supported by this model",
                fix="send text",
                field=where,
            )
        elif not isinstance(part.get("text"), str):
            raise _invalid("a text part must have text", where)
        else:
            texts.append(part["text"])
    return "\n".join(texts)


def _tool_call(call: Any, field: str) -> dict[str, Any]:
    """Templates iterate over arguments; the wire has them as a JSON string."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _invalid("a tool call must have a function with a name", field)
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    elif isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise _invalid(f"arguments are not JSON: {error}", f"{field}.arguments") from error
    if not isinstance(arguments, Mapping):
        raise _invalid("arguments must be an object", f"{field}.arguments")
    return {**call, "function": {**function, "arguments": dict(arguments)}}


def _invalid(what: str, field: str) -> UsageError:
    return UsageError(code="messages_invalid", what=what, field=field)
