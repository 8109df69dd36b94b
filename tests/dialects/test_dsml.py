"""DeepSeek V4's calls: the encoder's own markup is read back, everything else is content."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.dialects import deepseek_v4
from quire.dialects.dsml import BAR, CLOSE, END_INVOKE, END_PARAMETER, OPEN, TOKEN

from .reading import parse
from .test_hermes import VALUES

NAMES = st.text(st.characters(codec="utf-8", exclude_characters='"<>'), min_size=1, max_size=6)
VALUES_WITHOUT_MARKUP = VALUES.filter(lambda value: BAR not in repr(value))
INVOKE = f'<{TOKEN}invoke name="f">'


def parameter(value: str, name: str = "p", text: bool = True) -> str:
    kind = "true" if text else "false"
    return f'<{TOKEN}parameter name="{name}" string="{kind}">{value}{END_PARAMETER}'


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(NAMES, st.dictionaries(NAMES, VALUES_WITHOUT_MARKUP, max_size=4)),
        min_size=1,
        max_size=3,
    )
)
def test_what_the_encoder_writes_is_read_back(calls: list[tuple[str, dict[str, Any]]]) -> None:
    given_calls = [{"function": {"name": n, "arguments": json.dumps(a)}} for n, a in calls]
    turn = {
        "role": "assistant",
        "content": "text\n",
        "reasoning_content": "why",
        "tool_calls": given_calls,
    }
    prompt = deepseek_v4.encode([turn], thinking=True)
    answer = prompt.removeprefix(deepseek_v4.BOS).removesuffix(deepseek_v4.EOS)
    found = parse(answer, "deepseek_v4", "deepseek_v4", deepseek_v4.ASSISTANT + "<think>")
    assert found.reasoning == "why" and found.content == "text\n"
    assert [(name, json.loads(text)) for name, text in found.calls] == calls
    assert found.complete == list(range(len(calls)))


def test_text_becomes_a_json_string_and_other_values_stay_as_written() -> None:
    tags = parameter('"x"\n\\') + "\n" + parameter("[1.50, null]", "q", text=False)
    found = parse(f"\n\n{OPEN}\n{INVOKE}\n{tags}\n{END_INVOKE}\n{CLOSE}", "deepseek_v4")
    assert found.calls == [["f", '{"p": "\\"x\\"\\n\\\\", "q": [1.50, null]}']]
    assert found.content == ""


@pytest.mark.parametrize(
    "text",
    [
        OPEN,
        f"\n\n{OPEN}\n",
        f"a\n\n{OPEN}\n{CLOSE}",
        f"\n{OPEN}words{CLOSE}",
        f"{OPEN}<{TOKEN}invoke>",
        f'{OPEN}<{TOKEN}invoke name="f',
        f'{OPEN}<{TOKEN}invoke name="">',
        f'{OPEN}<{TOKEN}invoke name="{"f" * 2000}">',
        f"{OPEN}{' ' * 1100}{INVOKE}",
        INVOKE + END_INVOKE,
        f"\n\n{OPEN[:-3]}",
    ],
)
def test_what_is_no_call_is_content_to_the_letter(text: str) -> None:
    found = parse(text, "deepseek_v4")
    assert found.calls == [] and found.content == text


def test_a_call_ends_where_its_markup_does_and_the_rest_is_content() -> None:
    found = parse(f"{OPEN}{INVOKE}{parameter('x')} words {OPEN}{INVOKE}{END_INVOKE}", "deepseek_v4")
    assert found.calls == [["f", '{"p": "x"}'], ["f", "{}"]]
    assert found.content == f" words {OPEN}"[:7] and found.complete == [0, 1]


def test_a_parameter_without_an_end_ends_with_its_call() -> None:
    open_value = parameter("x").removesuffix(END_PARAMETER)
    found = parse(
        f"{OPEN}{INVOKE}{open_value}{END_INVOKE}{INVOKE}{END_INVOKE}{CLOSE}", "deepseek_v4"
    )
    assert found.calls == [["f", '{"p": "x"}'], ["f", "{}"]] and found.content == ""


def test_a_call_without_an_end_ends_with_its_block() -> None:
    found = parse(f"{OPEN}{INVOKE}{parameter('x')}{CLOSE}", "deepseek_v4")
    assert found.calls == [["f", '{"p": "x"}']] and found.content == "" and found.complete == [0]


def test_a_value_of_nothing_is_null() -> None:
    found = parse(f"{OPEN}{INVOKE}{parameter('', text=False)}{END_INVOKE}", "deepseek_v4")
    assert found.calls == [["f", '{"p": null}']]


def test_a_call_that_is_cut_keeps_its_arguments_and_is_not_complete() -> None:
    start = f"\n\n{OPEN}\n{INVOKE}\n"
    body = parameter("Paris")
    for end in range(len(body)):
        found = parse(start + body[:end], "deepseek_v4")
        assert found.content == "" and found.complete == []
        [[name, arguments]] = found.calls
        # The beginning of the end tag may as well have been text.
        assert name == "f" and ('{"p": "Paris' + END_PARAMETER).startswith(arguments)
