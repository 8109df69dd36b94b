"""However a text is split: the same events, in linear time, with little held back."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quire.dialects import dsml, hermes
from quire.dialects.events import CallArguments, Content, Event, Reasoning
from quire.dialects.parser import REASONING_PARSERS, TOOL_PARSERS, OutputParser

from .reading import parse

DIALECTS = [
    (tools, reasoning, prompt)
    for tools in ("none", *TOOL_PARSERS)
    for reasoning in ("none", *REASONING_PARSERS)
    for prompt in ("", "x<think>", "x<think>\n", "<think>\n\n</think>\n\n")
]
CALL = '{"name": "f", "arguments": {"a": "}<é\\"", "b": [1, {}]}}'
# What markup is made of, whole and broken: hostile texts are made of these.
SHARDS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "</tool_", "<", ">", "\n", " ",
    "{", "}", "[", "]", '"', "\\", ",", ":", '{"name": "f", "arguments": ', '{"name"', CALL,
    f"<tool_call>\n{CALL}\n</tool_call>", '<tool_call>{"arguments": {"x": 1}, "name": "g"}',
    "words", "é", "\U0001f600", "\u2028", "\x00", "{" * 9, " " * 20, "null", "1e5",
    dsml.OPEN, dsml.CLOSE, dsml.END_INVOKE, dsml.END_PARAMETER, dsml.TOKEN, dsml.BAR,
    f'<{dsml.TOKEN}invoke name="f">', f'<{dsml.TOKEN}parameter name="p" string="true">',
    f'<{dsml.TOKEN}parameter name="q" string="false">', f"<{dsml.TOKEN}invoke",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(SHARDS) | st.text(max_size=3), max_size=30).map("".join)


def texts_of_all(text: str) -> str:
    return text.encode("utf-8", "ignore").decode()  # lone surrogates never leave a detokenizer


@settings(max_examples=250, deadline=None)
@given(TEXTS.map(texts_of_all), st.sampled_from(DIALECTS), st.data())
@example(f"\n\n{dsml.OPEN}\n", ("deepseek_v4", "none", ""), None)
def test_every_split_gives_the_same(
    text: str, dialect: tuple[str, str, str], data: st.DataObject | None
) -> None:
    whole = parse(text, *dialect)
    assert parse(list(text), *dialect) == whole
    if data is not None and text:
        cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parse(pieces, *dialect) == whole


@pytest.mark.parametrize("tools", [*TOOL_PARSERS])
def test_every_single_split_of_an_answer_gives_the_same(tools: str) -> None:
    call = f"\n<tool_call>\n{CALL}\n</tool_call>"
    invoke = (
        f'<{dsml.TOKEN}invoke name="f">\n<{dsml.TOKEN}parameter name="a" string="true">x"\n'
        f"{dsml.END_PARAMETER}\n{dsml.END_INVOKE}\n"
    )
    block = f"\n\n{dsml.OPEN}\n{invoke}{invoke}{dsml.CLOSE}"
    text = "<think>\nhm\n</think>\n\nLet me see." + (call * 2 if tools == "hermes" else block)
    whole = parse(text, tools, "qwen3")
    assert (whole.reasoning, whole.content) == ("hm", "Let me see.")
    assert [name for name, _ in whole.calls] == ["f", "f"] and whole.complete == [0, 1]
    for at in range(len(text)):
        assert parse([text[:at], text[at:]], tools, "qwen3") == whole


@settings(max_examples=300, deadline=None)
@given(TEXTS.map(texts_of_all), st.sampled_from(DIALECTS))
def test_no_text_is_lost_where_there_is_no_call(text: str, dialect: tuple[str, str, str]) -> None:
    """Thoughts and content are the text, but for tags of thoughts and line ends around them."""
    found = parse(text, *dialect)
    if found.calls:
        return
    assert text.endswith(found.content)
    front = text[: len(text) - len(found.content)]
    assert found.reasoning in front
    markup = front.replace(found.reasoning, "", 1)
    assert markup.replace("<think>", "", 1).replace("</think>", "", 1).strip() == ""


HOSTILE = {
    "openings": "<tool_call>",
    "open strings": '<tool_call>{"',
    "braces": "<tool_call>{" + "{" * 50,
    "heads": '<tool_call>{"name": "f", "arguments": {"a": "',
    "space": "<tool_call>" + " " * 500,
    "tails": '<tool_call>{"name": "f", "arguments": {}}' + " " * 60,
    "blocks": dsml.OPEN,
    "invokes": f'{dsml.OPEN}<{dsml.TOKEN}invoke name="',
    "values": f'{dsml.OPEN}<{dsml.TOKEN}invoke name="f"><{dsml.TOKEN}parameter name="p" string="'
    f'true">{dsml.BAR}',
    "angles": "<",
    "line ends": "\n",
    "thoughts": "</think",
    "calls": f"<tool_call>{CALL}</tool_call>",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("tools", [*TOOL_PARSERS])
def test_time_is_linear_and_little_is_held_back(name: str, tools: str) -> None:
    text = (HOSTILE[name] * (80_000 // len(HOSTILE[name])))[:80_000]
    for size in (1, 7, len(text)):
        parser, out, held = OutputParser(tools, "qwen3", ""), 0, 0
        start = time.process_time()
        for at in range(0, len(text), size):
            out += sum(map(length, parser.feed(text[at : at + size])))
            held = max(held, min(at + size, len(text)) - out) if not in_call(name) else held
        parser.finish()
        assert time.process_time() - start < 5.0  # quadratic work would take far longer
        limit = hermes.MAX_HELD if tools == "hermes" else dsml.MAX_TAG
        assert held <= limit + 100


def in_call(name: str) -> bool:
    """Texts whose markup becomes calls: that is no longer in the output, so nothing is measured."""
    return name in ("calls", "heads", "tails", "values", "invokes")


def length(event: Event) -> int:
    return len(event.text) if isinstance(event, Content | Reasoning | CallArguments) else 0
