"""Thoughts and answers of each family, as their templates write them."""

from __future__ import annotations

import pytest

from quire.dialects.dialect import Dialect

from .reading import parse, read

QWEN = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        (QWEN, "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        (QWEN, "\n<think>hm</think>yes", "hm", "yes"),
        (QWEN, "<think>\n\n</think>\n\nyes", "", "yes"),
        (QWEN, "yes <think>no</think>", "", "yes <think>no</think>"),
        (QWEN, "<think>a<think>b</think>c</think>", "a<think>b", "c</think>"),
        (QWEN + "<think>\n", "hm\n</think>\n\nyes", "hm", "yes"),
        (QWEN + "<think>", "\nhm\n</think>\nyes", "hm", "yes"),
        (QWEN + "<think>\n", "\nhm", "\nhm", ""),
        (QWEN + "<think>\n\n</think>\n\n", "yes </think>", "", "yes </think>"),
        (QWEN, "<think>\ncut", "cut", ""),
        (QWEN, "<think>cut </thin", "cut </thin", ""),
        (QWEN, "<thin", "", "<thin"),
        (QWEN, "a\n\n\n</think>", "", "a\n\n\n</think>"),
        (QWEN, "<think>a\n\n\n</think>\n\n\nb", "a\n\n", "\nb"),
        (QWEN, " " * 9 + "<think>a", "", " " * 9 + "<think>a"),
    ],
)
def test_qwen3(prompt: str, text: str, reasoning: str, content: str) -> None:
    found = parse(text, reasoning="qwen3", prompt=prompt)
    assert (found.reasoning, found.content) == (reasoning, content)


def test_deepseek_r1_thinks_unless_the_prompt_has_closed_it() -> None:
    found = parse("hm\n</think>\n\nyes", reasoning="deepseek_r1", prompt="x")
    assert (found.reasoning, found.content) == ("hm", "yes")
    assert parse("<think>\nhm", reasoning="deepseek_r1", prompt="x").reasoning == "hm"
    assert parse("yes", reasoning="deepseek_r1", prompt="<think>\n\n</think>\n\n").content == "yes"


def test_deepseek_v4_thinks_where_the_prompt_says_so_and_keeps_every_line_end() -> None:
    found = parse("\nhm\n</think>\n\nyes", reasoning="deepseek_v4", prompt="<think>")
    assert (found.reasoning, found.content) == ("\nhm\n", "\n\nyes")
    assert parse("<think>x", reasoning="deepseek_v4", prompt="</think>").content == "<think>x"


def test_a_user_who_writes_tags_does_not_make_the_answer_thoughts() -> None:
    prompt = "<|im_start|>user\nwhat does <think> do?<|im_end|>\n" + QWEN
    assert parse("it opens", reasoning="qwen3", prompt=prompt).content == "it opens"


@pytest.mark.parametrize(
    ("said", "thinks"), [("<think>so", True), ("<think>so</think>then", False), ("", False)]
)
def test_an_answer_that_continues_a_message_continues_its_thoughts(said: str, thinks: bool) -> None:
    parser = Dialect(reasoning="qwen3").parser("prompt", tools=False, resumed=said)
    found = read(parser.feed("more") + parser.finish())
    assert (found.reasoning, found.content) == (("more", "") if thinks else ("", "more"))
