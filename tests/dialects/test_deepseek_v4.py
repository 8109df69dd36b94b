"""DeepSeek V4's prompts: the published texts by their hashes, and every rule by hand."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from quire.dialects import deepseek_v4
from quire.dialects.deepseek_v4 import encode
from quire.dialects.renderer import DeepSeekV4Renderer, chat_renderer
from quire.errors import UsageError
from quire.tokenization.messages import normalize_messages

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"ä": 1}}}]


def call(name: str, arguments: Any, id: str = "1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_the_fixed_texts_are_the_published_ones() -> None:
    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    assert digest(deepseek_v4.MAX_EFFORT) == "f7a24f3b3050d4a8"
    assert digest(deepseek_v4.tools_block([])) == "c7d3159308f7d076"


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello.", "reasoning_content": "Greet."},
    {"role": "user", "content": "Bye"},
]


def test_a_conversation_without_thinking_opens_each_answer_behind_its_thoughts() -> None:
    assert encode(CHAT) == (
        f"{BOS}Be brief.{USER}Hi{ASSISTANT}</think>Hello.{EOS}{USER}Bye{ASSISTANT}</think>"
    )


def test_thinking_drops_the_thoughts_of_old_turns_unless_told_not_to() -> None:
    assert encode(CHAT, thinking=True) == (
        f"{BOS}Be brief.{USER}Hi{ASSISTANT}</think>Hello.{EOS}{USER}Bye{ASSISTANT}<think>"
    )
    assert encode(CHAT, thinking=True, drop_thinking=False) == (
        f"{BOS}Be brief.{USER}Hi{ASSISTANT}<think>Greet.</think>Hello.{EOS}"
        f"{USER}Bye{ASSISTANT}<think>"
    )


def test_an_effort_stands_in_front_only_with_thinking() -> None:
    user = [{"role": "user", "content": "Hi"}]
    effort = deepseek_v4.MAX_EFFORT
    assert encode(user, thinking=True, max_effort=True).startswith(f"{BOS}{effort}{USER}")
    assert effort not in encode(user, max_effort=True)
    assert encode(user, generate=False) == f"{BOS}{USER}Hi"


def test_calls_and_results_with_tools_keep_all_thoughts() -> None:
    messages = [
        {"role": "system", "content": "S", "tools": TOOLS},
        {"role": "user", "content": "Q"},
        {
            "role": "assistant",
            "reasoning_content": "R",
            "content": "C",
            "tool_calls": [call("find", '{"a": "x<", "b": [1, "ä"]}'), call("g", {}, "2")],
        },
        {"role": "tool", "tool_call_id": "2", "content": "second"},
        {"role": "tool", "tool_call_id": "1", "content": "first"},
        {"role": "user", "content": "And?"},
    ]
    block = deepseek_v4.tools_block([{"name": "find", "parameters": {"ä": 1}}])
    assert '\n{"name": "find", "parameters": {"ä": 1}}\n' in block
    assert encode(messages, thinking=True) == (
        f"{BOS}S\n\n{block}{USER}Q{ASSISTANT}<think>R</think>C\n\n"
        "<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="find">\n'
        '<｜DSML｜parameter name="a" string="true">x<</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="b" string="false">[1, "ä"]</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="g">\n\n</｜DSML｜invoke>\n'
        f"</｜DSML｜tool_calls>{EOS}"
        f"{USER}<tool_result>first</tool_result>\n\n<tool_result>second</tool_result>\n\nAnd?"
        f"{ASSISTANT}<think>"
    )


def test_arguments_that_are_no_object_are_one_parameter() -> None:
    turn = {"role": "assistant", "content": "", "tool_calls": [call("f", "not json")]}
    assert '<｜DSML｜parameter name="arguments" string="true">not json<' in encode([turn])


def test_tasks_reminders_and_developers_stand_as_published() -> None:
    messages = [
        {"role": "developer", "content": "old"},
        {"role": "latest_reminder", "content": "today"},
        {"role": "user", "content": "Q", "task": "action"},
        {"role": "assistant", "content": "Search"},
        {"role": "developer", "content": "new"},
    ]
    assert encode(messages) == (
        f"{BOS}{USER}old{ASSISTANT}</think><｜latest_reminder｜>today{USER}Q"
        f"{ASSISTANT}</think><｜action｜>Search{EOS}{USER}new{ASSISTANT}</think>"
    )
    thinking = encode(messages, thinking=True)
    assert "old" not in thinking and thinking.endswith(f"{USER}new{ASSISTANT}<think>")
    assert encode([{"role": "user", "content": "Q", "task": "title"}]) == f"{BOS}{USER}Q<｜title｜>"


@pytest.mark.parametrize(
    "message", [{"role": "poet", "content": "x"}, {"role": "user", "content": "x", "task": "sing"}]
)
def test_unknown_roles_and_tasks_are_refused(message: dict[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        encode([message])
    assert caught.value.code == "messages_invalid"


def test_the_renderer_takes_variables_as_a_template_does() -> None:
    renderer = chat_renderer(["DeepseekV4ForCausalLM"], {}, {})
    assert isinstance(renderer, DeepSeekV4Renderer)
    messages = normalize_messages([{"role": "user", "content": "Hi"}], renderer.template)

    def end(**kwargs: Any) -> str:
        return renderer.render(messages, add_generation_prompt=True, **kwargs)[-8:]

    assert end() == "</think>" and end(enable_thinking=True) == "｜><think>"[-8:]
    assert end(reasoning_effort="high") == end(thinking=True)
    assert end(reasoning_effort="none") == "</think>"
    most = renderer.render(messages, reasoning_effort="xhigh", thinking=True)
    assert most.startswith(BOS + deepseek_v4.MAX_EFFORT)
    with_tools = renderer.render(messages, tools=TOOLS)
    assert with_tools.startswith(f"{BOS}\n\n## Tools\n") and '{"name": "find"' in with_tools


@pytest.mark.parametrize(
    "kwargs",
    [
        {"thinkng": True},
        {"thinking": "yes"},
        {"reasoning_effort": 3},
        {"thinking": True, "enable_thinking": False},
        {"thinking": False, "reasoning_effort": "high"},
    ],
)
def test_variables_that_mean_nothing_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        DeepSeekV4Renderer().render([{"role": "user", "content": "x"}], **kwargs)
    assert caught.value.code == "chat_arguments_invalid"
