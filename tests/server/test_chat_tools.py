"""Tools and reasoning over HTTP, with the `openai` client unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_engine import MODEL, FakeRenderer
from server_harness import RunningServer, running

from quire.dialects.dialect import Dialect
from quire.server.schemas import MAX_TOOLS, MAX_TOOLS_DEPTH

VARIABLES = ("tools", "enable_thinking", "thinking")


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    dialect = Dialect(tools="hermes", reasoning="qwen3")
    with running(renderer=FakeRenderer(*VARIABLES), dialect=dialect) as server:
        yield server


@pytest.fixture
def server(shared: RunningServer) -> Iterator[RunningServer]:
    shared.renderer.variables = VARIABLES
    yield shared
    shared.engine.answer, shared.engine.delay = None, 0.0


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as made:
        yield made


MESSAGES = [{"role": "user", "content": "weather?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "d",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
ASKED = '{"city": "Zürich"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ASKED}}}\n</tool_call>'
ANSWER = f"<think>\nI should look.\n</think>\n\nLet me see.\n{CALL}\n{CALL}"


class Streamed:
    """A choice added up from its stream, as a client does."""

    def __init__(self) -> None:
        self.content, self.reasoning, self.reason = "", "", None
        self.calls: dict[int, dict[str, str]] = {}
        self.pieces = 0
        self.tokens: list[str] = []

    def take(self, choice: Any) -> None:
        self.content += choice.delta.content or ""
        self.reasoning += getattr(choice.delta, "reasoning", None) or ""
        self.reason = choice.finish_reason or self.reason
        self.tokens += [e.token for e in choice.logprobs.content] if choice.logprobs else []
        for call in choice.delta.tool_calls or []:
            if call.id is not None:
                assert call.type == "function" and call.index not in self.calls
                self.calls[call.index] = {"id": call.id, "name": call.function.name, "text": ""}
            else:
                assert call.function.name is None and call.type is None
            self.calls[call.index]["text"] += call.function.arguments
            self.pieces += 1


def stream(client: openai.OpenAI, **kwargs: Any) -> list[Streamed]:
    found = [Streamed() for _ in range(kwargs.get("n", 1))]
    asked = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "stream": True} | kwargs
    for chunk in client.chat.completions.create(**asked):
        for choice in chunk.choices:
            found[choice.index].take(choice)
    return found


def ask(client: openai.OpenAI, **kwargs: Any) -> Any:
    asked = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS} | kwargs
    return client.chat.completions.create(**asked)


def test_calls_reasoning_and_content_come_apart(
    client: openai.OpenAI, server: RunningServer
) -> None:
    server.engine.answer = ANSWER
    choice = ask(client).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.reasoning == "I should look."
    first, second = choice.message.tool_calls
    assert (first.type, first.function.name) == ("function", "get_weather")
    assert first.function.arguments == second.function.arguments == ASKED
    assert first.id != second.id


@pytest.mark.parametrize("delay", [0.0, 0.0002])
def test_a_stream_adds_up_to_the_whole_answer(
    client: openai.OpenAI, server: RunningServer, delay: float
) -> None:
    server.engine.answer, server.engine.delay = ANSWER, delay
    choices = stream(client, n=2, logprobs=True)
    assert len({call["id"] for choice in choices for call in choice.calls.values()}) == 4
    for choice in choices:
        assert (choice.content, choice.reasoning) == ("Let me see.", "I should look.")
        assert [(c["name"], c["text"]) for c in choice.calls.values()] == [
            ("get_weather", ASKED)
        ] * 2
        assert choice.reason == "tool_calls"
        assert len(choice.tokens) == len(ANSWER.encode())  # of all tokens, markup too
    assert choices[0].pieces > 2 or delay  # arguments come in pieces


def test_tools_reach_the_template_unless_none_may_be_called(
    client: openai.OpenAI, server: RunningServer
) -> None:
    server.engine.answer = CALL
    ask(client)
    assert server.renderer.kwargs["tools"] == TOOLS
    message = ask(client, tool_choice="none").choices[0]
    assert "tools" not in server.renderer.kwargs
    assert message.message.content == CALL and message.finish_reason == "stop"
    assert ask(client, tools=openai.NOT_GIVEN).choices[0].message.tool_calls is None


def test_a_conversation_with_calls_and_results_is_rendered(
    client: openai.OpenAI, server: RunningServer
) -> None:
    server.engine.answer = "<think>\nwhy\n</think>\n\n" + CALL
    message = ask(client).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    server.engine.answer = "It is sunny."
    answer = ask(client, messages=[*MESSAGES, message, result])
    assert answer.choices[0].message.content == "It is sunny."
    _, assistant, tool = server.renderer.messages
    assert assistant["tool_calls"][0]["function"] == {
        "name": "get_weather", "arguments": {"city": "Zürich"}}  # fmt: skip
    assert assistant["content"] == "" and assistant["reasoning_content"] == "why"
    assert tool["tool_call_id"] == message.tool_calls[0].id


def test_one_call_where_no_parallel_ones_are_wanted(
    client: openai.OpenAI, server: RunningServer
) -> None:
    server.engine.answer = ANSWER + " and more"
    choice = ask(client, parallel_tool_calls=False).choices[0]
    assert len(choice.message.tool_calls) == 1 and choice.finish_reason == "tool_calls"
    [streamed] = stream(client, parallel_tool_calls=False)
    assert len(streamed.calls) == 1 and streamed.content == "Let me see."


def test_a_call_that_is_cut_comes_as_far_as_it_goes(
    client: openai.OpenAI, server: RunningServer
) -> None:
    server.engine.answer = CALL
    cut = CALL.encode().index(b"rich")
    choice = ask(client, max_tokens=cut).choices[0]
    assert choice.finish_reason == "length" and choice.message.content is None
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Zü'
    server.engine.answer = CALL[:-20]  # the model itself ended in the middle
    assert ask(client).choices[0].finish_reason == "stop"


def test_what_is_no_call_stays_content(client: openai.OpenAI, server: RunningServer) -> None:
    server.engine.answer = '<tool_call>{"name": oops}</tool_call>'
    choice = ask(client).choices[0]
    assert (choice.message.content, choice.finish_reason) == (server.engine.answer, "stop")
    assert [s.content for s in stream(client)] == [server.engine.answer]


def test_thoughts_that_do_not_end_are_thoughts(
    client: openai.OpenAI, server: RunningServer
) -> None:
    server.engine.answer = "<think>\nand then </th"
    message = ask(client).choices[0].message
    assert message.content is None and message.reasoning == "and then </th"


@pytest.mark.parametrize(("effort", "thinks"), [("none", False), ("low", True), ("high", True)])
def test_an_effort_switches_thinking_where_the_template_can_only_do_that(
    client: openai.OpenAI, server: RunningServer, effort: str, thinks: bool
) -> None:
    ask(client, reasoning_effort=effort, max_tokens=1)
    assert server.renderer.kwargs["enable_thinking"] is thinks
    server.renderer.variables = ("tools", "reasoning_effort")
    ask(client, reasoning_effort=effort, max_tokens=1)
    assert server.renderer.kwargs["reasoning_effort"] == effort


def test_an_effort_that_means_nothing_to_the_template_is_refused(
    client: openai.OpenAI, server: RunningServer
) -> None:
    server.renderer.variables = ("tools",)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, reasoning_effort="low")
    assert (caught.value.code, caught.value.param) == ("not_supported", "reasoning_effort")


def test_tools_that_the_template_would_not_show_are_refused(
    client: openai.OpenAI, server: RunningServer
) -> None:
    server.renderer.variables = ()
    with pytest.raises(openai.BadRequestError, match="template") as caught:
        ask(client)
    assert (caught.value.code, caught.value.param) == ("not_supported", "tools")


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("tool_choice", "required", "not_supported"),
        ("tool_choice", {"type": "function", "function": {"name": "get_weather"}}, "not_supported"),
        ("tool_choice", "sometimes", "invalid_value"),
        ("tools", [tool()] * (MAX_TOOLS + 1), "invalid_value"),
        ("tools", [tool(parameters=nested(MAX_TOOLS_DEPTH + 1))], "invalid_value"),
        ("tools", [tool(parameters=[])], "invalid_value"),
        ("tools", [tool(description="x" * 300_000)], "invalid_value"),
        ("tools", [tool(name='a"><b')], "invalid_value"),
        ("tools", [tool(name="f\n")], "invalid_value"),
        ("tools", [tool(strict=True)], "not_supported"),
        ("tools", [tool(extra=1)], "invalid_value"),
        ("tools", [{"type": "retrieval"}], "invalid_value"),
        ("tools", {}, "invalid_value"),
        ("parallel_tool_calls", "yes", "invalid_value"),
        ("reasoning_effort", "most", "invalid_value"),
    ],
)
def test_bad_tools_are_refused_by_name(
    client: openai.OpenAI, field: str, value: object, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=TOOLS, extra_body={field: value})
    assert (caught.value.code, caught.value.param) == (code, field)


def test_tools_as_deep_as_allowed_are_taken(client: openai.OpenAI, server: RunningServer) -> None:
    server.engine.answer = "x"
    ask(client, tools=[tool(parameters=nested(MAX_TOOLS_DEPTH - 1))])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": 3}}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "x", "function": {"name": "f"}}]},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}],
        },
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[" * 99999}}],
        },
    ],
)
def test_bad_calls_in_messages_are_refused(server: RunningServer, message: dict[str, Any]) -> None:
    with server.client() as http:
        answer = http.post("/v1/chat/completions", json={"messages": [message]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages")


def test_tokenize_counts_tools(server: RunningServer) -> None:
    with server.client() as http:
        answer = http.post("/tokenize", json={"messages": MESSAGES, "tools": TOOLS})
    assert answer.status_code == 200 and server.renderer.kwargs["tools"] == TOOLS


def test_frames_name_a_call_once_and_then_only_its_arguments(server: RunningServer) -> None:
    server.engine.answer = CALL
    body = {"messages": MESSAGES, "tools": TOOLS, "stream": True}
    with server.client() as http:
        text = http.post("/v1/chat/completions", json=body).text
    frames = [json.loads(line[6:]) for line in text.split("\n\n") if line[6:7] == "{"]
    deltas = [frame["choices"][0]["delta"] for frame in frames]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert set(calls[0]) == {"index", "id", "type", "function"}
    assert calls[0]["function"] == {"name": "get_weather", "arguments": "{"}
    assert all(set(c) == {"index", "function"} and c["index"] == 0 for c in calls[1:])
    assert all(set(c["function"]) == {"arguments"} for c in calls[1:])
    assert deltas[0] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("reasoning", ["none", "qwen3"])
@pytest.mark.parametrize("shows_markup", [True, False])
def test_special_tokens_are_kept_only_where_markers_are_such_and_are_looked_for(
    shows_markup: bool, reasoning: str
) -> None:
    dialect, renderer = Dialect(tools="hermes", reasoning=reasoning), FakeRenderer("tools")
    body = {"messages": MESSAGES, "max_tokens": 1}
    with running(renderer=renderer, dialect=dialect, shows_markup=shows_markup) as server:
        with server.client() as http:
            for asked in ({"tools": TOOLS}, {}):
                assert http.post("/v1/chat/completions", json=body | asked).status_code == 200
        with_tools, without = server.engine.requests
    assert with_tools.params.skip_special_tokens is not shows_markup
    assert without.params.skip_special_tokens is not (shows_markup and reasoning != "none")


def test_a_tool_goes_to_the_template_without_what_is_for_servers(
    client: openai.OpenAI, server: RunningServer
) -> None:
    ask(client, tools=[tool(strict=False)], max_tokens=1)
    assert server.renderer.kwargs["tools"] == [tool()]
