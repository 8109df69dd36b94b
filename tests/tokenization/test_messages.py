"""Messages of clients become what templates expect, or an error that names the place."""

from typing import Any

import pytest

from quire.errors import UsageError
from quire.tokenization.messages import normalize_messages


def one(message: Any, template: str = "") -> dict[str, Any]:
    return normalize_messages([message], template)[0]


def test_text_parts_are_joined_by_newlines_and_the_input_is_not_changed() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, "b"], "name": "x"}
    assert one(message) == {"role": "user", "content": "a\nb", "name": "x"}
    assert isinstance(message["content"], list)


def test_missing_content_becomes_empty_text() -> None:
    assert one({"role": "assistant", "content": None, "tool_calls": None}) == {
        "role": "assistant", "content": ""}  # fmt: skip


def test_developer_becomes_system_unless_the_template_knows_it() -> None:
    message = {"role": "developer", "content": "x"}
    assert one(message)["role"] == "system"
    assert one(message, "{% if role == 'developer' %}")["role"] == "developer"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": [1]}', {"a": [1]}), ("", {}), (None, {}), ({"b": 2}, {"b": 2})],
)
def test_arguments_of_tool_calls_become_objects(arguments: Any, expected: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    made = one({"role": "assistant", "tool_calls": [call]})["tool_calls"][0]
    assert made == {**call, "function": {"name": "f", "arguments": expected}}


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("text", "messages"),
        (None, "messages"),
        ([3], "messages[0]"),
        ([{"content": "x"}], "messages[0]"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "assistant", "tool_calls": 1}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
    ],
)
def test_anything_else_is_refused_with_its_place(messages: Any, field: str) -> None:
    with pytest.raises(UsageError) as caught:
        normalize_messages(messages, "")
    assert caught.value.field == field


def test_arguments_that_are_no_object_are_refused() -> None:
    for arguments in ("{", "[]", "3", 3):
        call = {"function": {"name": "f", "arguments": arguments}}
        with pytest.raises(UsageError, match="arguments"):
            one({"role": "assistant", "tool_calls": [call]})
