"""Calls between <tool_call> and </tool_call>: what is one, what is not, and what stays of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.dialects import hermes
from quire.tokenization.chat_template import TemplateRenderer

from .reading import parse

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=6), VALUES, max_size=4)
# As the templates of Qwen2.5 and Qwen3 write a past call.
TEMPLATE = (
    "{% for call in messages[0].tool_calls %}{% if loop.index0 or messages[0].content %}\n"
    "{% endif %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}"
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["get", "a_b"]), ARGUMENTS), min_size=1, max_size=3))
def test_what_a_template_writes_is_read_back(calls: list[tuple[str, dict[str, Any]]]) -> None:
    given_calls = [{"function": {"name": n, "arguments": a}} for n, a in calls]
    message = {"role": "assistant", "content": "text", "tool_calls": given_calls}
    found = parse("text" + TemplateRenderer(TEMPLATE).render_inline([message]), "hermes")
    assert [(name, json.loads(text)) for name, text in found.calls] == calls
    assert found.complete == list(range(len(calls)))
    assert found.content == "text"


def call(arguments: str = "{}", head: str = '{"name": "f", "arguments": ', end: str = "}") -> str:
    return f"<tool_call>{head}{arguments}{end}</tool_call>"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (call('{"a": "</tool_call> } {"}'), '{"a": "</tool_call> } {"}'),
        (call('{"a": "\\\\"}'), '{"a": "\\\\"}'),
        (call('{ "a" :[{}, "]"] }'), '{ "a" :[{}, "]"] }'),
        (call('{"a": 1}', head='{"name":"f","arguments":', end=""), '{"a": 1}'),
        (call('{"a": 1}, "name": "f"', head='{"arguments": '), '{"a": 1}'),
        (call("null"), "{}"),
        (call("", head='{"name": "f"'), "{}"),
        (call('"{\\"a\\": 1}"'), '{"a": 1}'),
        (call('{"a": 1}').removesuffix("}</tool_call>"), '{"a": 1}'),
        (call('{"a": 1}').removesuffix("ool_call>"), '{"a": 1}'),
        (call("", head='{"name": "f"').removesuffix("</tool_call>"), "{}"),
    ],
)
def test_what_is_a_call(text: str, arguments: str) -> None:
    found = parse(text, "hermes")
    assert found.calls == [["f", arguments]] and found.complete == [0]
    assert found.content == ""


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "\n<tool_call>\n",
        "<tool_call>get_weather</tool_call>",
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "f", "argu',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "no json"}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "%s", "arguments": {}}</tool_call>' % ("f" * 300),
        '<tool_call>{"arguments": {"a": %s}, "name": "f"}</tool_call>' % ("9" * hermes.MAX_HELD),
        '<tool_call>{"arguments": %s' % ("[" * 5000),
        '<tool_call>{"arguments": ' + "[" * 9000 + "]" * 9000 + ', "name": "f"}</tool_call>',
        "<tool_call><function=f></function></tool_call>",
        "a <tool_call>" * 50,
    ],
)
def test_what_is_no_call_is_content_to_the_letter(text: str) -> None:
    found = parse(text, "hermes")
    assert found.calls == [] and found.content == text


def test_a_call_behind_a_broken_one_is_found() -> None:
    found = parse('<tool_call>{"name": <tool_call>' + call()[11:] + " done", "hermes")
    assert found.calls == [["f", "{}"]]
    assert found.content == '<tool_call>{"name":  done'


def test_arguments_that_are_no_json_stay_as_written_and_end_with_their_marker() -> None:
    for broken in ('{"a": oops', '{"a": "open\n'):
        found = parse(call(broken, end="") + "\n" + call('{"b": 2}'), "hermes")
        assert found.calls == [["f", broken.rstrip("\n")], ["f", '{"b": 2}']]
        assert found.content == ""


def test_a_call_that_is_cut_keeps_its_arguments_and_is_not_complete() -> None:
    whole = call('{"city": "Paris, \\"x\\""}')
    start = whole.index('{"city')
    for end in range(start + 1, whole.index("}}")):
        found = parse(whole[:end], "hermes")
        assert found.calls == [["f", whole[start:end]]] and found.complete == []
        assert found.content == ""


def test_arguments_stream_as_they_come() -> None:
    from quire.dialects.hermes import HermesParser

    parser = HermesParser()
    parser.feed('<tool_call>{"name": "f", "arguments": {"a": "')
    for letter in "long text":
        [piece] = parser.feed(letter)
        assert piece.text == letter  # type: ignore[union-attr]


def test_text_between_and_behind_calls_is_content_and_space_there_is_not() -> None:
    found = parse(f"a\n{call()}\n{call()}\n and {call()} \n", "hermes")
    assert len(found.calls) == 3 and found.content == "a\n and "
    assert parse(f"a\n\n{call()}", "hermes").content == "a\n"
