"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from quire.errors import UsageError
from quire.outputs import ChoiceDelta, CompletionOutput
from quire.server.body import read_body
from quire.server.calls import Call, build_call, sampling_params
from quire.server.chat_answer import ChoiceReader, Reading
from quire.server.chat_prompt import render_chat, shown_tools
from quire.server.fields import invalid
from quire.server.generation import (
    Collected,
    Deltas,
    Usage,
    collect,
    has_news,
    run_call,
    until_disconnect,
)
from quire.server.logprobs import chat_logprobs, prompt_logprobs
from quire.server.prompts import Prompt, check_ids, encode_text
from quire.server.schemas import CHAT, NamedTool
from quire.server.sse import EventStream, FrameWriter, encode
from quire.server.state import ServerState

LONG_ANSWER = 65536  # characters; parsing more may take long


async def chat_completions(state: ServerState, request: Request) -> Response:
    """Answer a conversation. Raises QuireError."""
    call, reading = await _read_call(state, request)
    deltas = run_call(state.accepting_service().engine, state.metrics, call)
    if call.stream:
        return EventStream(_frames(call, reading, deltas), call.id)
    result = await until_disconnect(request.receive, collect(deltas, call))
    long = sum(len(choice.text) for choice in result.choices[0]) > LONG_ANSWER
    body = await state.encode(call.large or long, lambda: encode(_whole(call, reading, result)))
    return Response(body, media_type="application/json", headers={"x-request-id": call.id})


async def _read_call(state: ServerState, request: Request) -> tuple[Call, Reading]:
    options = state.options.server
    state.accepting_service()
    with state.bodies.hold() as hold:
        body = await read_body(request, options, hold)
        fields = CHAT.parse(body, options.allow_unknown_fields)
        state.check_model(fields.get("model"))
        if "messages" not in fields:
            raise UsageError("missing_field", "messages is missing", field="messages")
        tools = _reads_tools(state, fields)
        params = sampling_params(state, fields, None, _overrides(state, fields, tools))
        rendered = await render_chat(state, fields)
        special = bool(fields.get("add_special_tokens"))  # the template writes its own
        ids = await encode_text(state, rendered.text, special, "messages")
        check_ids(state, ids, "messages")
        prompt = [Prompt(ids, rendered.text)]
        tenant = request.scope["quire.tenant"]
        call = await build_call(state, fields, prompt, params, "chatcmpl-", tenant)
        parallel = fields.get("parallel_tool_calls") is not False
        return call, Reading(state.ready_service().dialect, rendered, tools, parallel)


def _reads_tools(state: ServerState, fields: dict[str, Any]) -> bool:
    """Whether tool calls are looked for in the answer. Raises UsageError for what cannot be."""
    choice = fields.get("tool_choice")
    if choice == "required" or isinstance(choice, NamedTool):
        raise UsageError(
            "not_supported",
            "tool_choice can only be auto or none yet",
            why="nothing here makes a model call a tool, so this cannot be promised",
            fix='leave tool_choice out, or send "auto" or "none"',
            field="tool_choice",
        )
    if choice == "auto" and not fields.get("tools"):
        raise invalid("tool_choice", "auto without tools", "none or absent unless tools are given")
    dialect = state.ready_service().dialect
    if shown_tools(fields) and dialect.tools == "none":
        raise UsageError(
            "not_supported",
            "tools are not supported: this server does not read tool calls",
            why=dialect.tools_reason,
            fix="start it with a --tool-call-parser that fits the model, or leave tools out",
            field="tools",
        )
    return bool(shown_tools(fields))


def _overrides(state: ServerState, fields: dict[str, Any], tools: bool) -> dict[str, Any]:
    """Sampling parameters under the names chat has for them. Raises UsageError."""
    result: dict[str, Any] = {}
    service = state.ready_service()
    if service.shows_markup and (tools or service.dialect.reasoning != "none"):
        result["skip_special_tokens"] = False
    limits = {fields.get(name) for name in ("max_tokens", "max_completion_tokens")} - {None}
    if len(limits) > 1:
        raise invalid(
            "max_completion_tokens", "differs from max_tokens", "equal to max_tokens, or alone"
        )
    if limits:
        result["max_tokens"] = limits.pop()
    elif "max_tokens" in fields or "max_completion_tokens" in fields:
        result["max_tokens"] = None
    top = fields.get("top_logprobs")
    wanted = bool(fields.get("logprobs"))
    if top and not wanted:
        raise invalid("top_logprobs", "given without logprobs", "absent unless logprobs is true")
    result["logprobs"] = (top or 0) if wanted else None
    return result


def _logprobs(call: Call, choice: CompletionOutput | ChoiceDelta) -> dict[str, Any] | None:
    if call.logprobs is None:
        return None
    return chat_logprobs(choice.token_ids, choice.logprobs or [], call.logprobs)


def _whole(call: Call, reading: Reading, result: Collected) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    choices = []
    for choice in result.choices[0]:
        reader = reading.choice()
        message = reader.read(choice.text, end=True).message()
        entry = {
            "index": choice.index,
            "message": message,
            "logprobs": _logprobs(call, choice),
            "finish_reason": reader.finish_reason(choice.finish_reason),
            "stop_reason": choice.stop_reason,
        }
        if call.return_token_ids:
            entry["token_ids"] = choice.token_ids
        choices.append(entry)
    body = {
        "id": call.id,
        "object": "chat.completion",
        "created": call.created,
        "model": call.model,
        "system_fingerprint": call.fingerprint,
        "choices": choices,
        "usage": result.usage.to_dict(),
    }
    positions = result.prompt_logprobs[0]
    if positions is not None:
        body["prompt_logprobs"] = prompt_logprobs(positions)
    if call.return_token_ids:
        body["prompt_token_ids"] = call.requests[0].prompt_token_ids
    return body


async def _frames(call: Call, reading: Reading, deltas: Deltas) -> AsyncGenerator[bytes, None]:
    """First the role of each choice, then one frame per choice that has news."""
    writer, usage = FrameWriter(call, "chat.completion.chunk"), Usage()
    readers = [reading.choice() for _ in range(call.n)]
    role = b'"delta":{"role":"assistant","content":""},"logprobs":null,'
    yield b"".join(writer.choice(index, role, None) for index in range(call.n))
    async with aclosing(deltas):
        async for index, delta in deltas:
            usage.update(index, delta)
            frames = [
                _frame(writer, call, c, readers[c.index]) for c in delta.choices if has_news(c)
            ]
            if frames:
                yield b"".join(frames)
    if call.include_usage:
        yield writer.usage(usage.to_dict())


def _frame(writer: FrameWriter, call: Call, choice: ChoiceDelta, reader: ChoiceReader) -> bytes:
    piece = reader.read(choice.text, end=choice.finish_reason is not None)
    content = b'"delta":%b,"logprobs":%b,' % (
        encode(piece.delta()),
        encode(_logprobs(call, choice)),
    )
    end = b""
    if choice.finish_reason is not None:
        end += b',"stop_reason":' + encode(choice.stop_reason)
    if call.return_token_ids:
        end += b',"token_ids":' + encode(choice.token_ids)
    return writer.choice(choice.index, content, reader.finish_reason(choice.finish_reason), end)
