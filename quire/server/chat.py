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
from quire.server.chat_prompt import render_chat
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
from quire.server.schemas import CHAT
from quire.server.sse import EventStream, FrameWriter, encode
from quire.server.state import ServerState


async def chat_completions(state: ServerState, request: Request) -> Response:
    """Answer a conversation. Raises QuireError."""
    call = await _read_call(state, request)
    deltas = run_call(state.accepting_service().engine, state.metrics, call)
    if call.stream:
        return EventStream(_frames(call, deltas), call.id)
    result = await until_disconnect(request.receive, collect(deltas, call))
    body = await state.encode(call.large, lambda: encode(_whole(call, result)))
    return Response(body, media_type="application/json", headers={"x-request-id": call.id})


async def _read_call(state: ServerState, request: Request) -> Call:
    options = state.options.server
    state.accepting_service()
    with state.bodies.hold() as hold:
        body = await read_body(request, options, hold)
        fields = CHAT.parse(body, options.allow_unknown_fields)
        state.check_model(fields.get("model"))
        if "messages" not in fields:
            raise UsageError("missing_field", "messages is missing", field="messages")
        params = sampling_params(state, fields, None, _overrides(fields))
        text = await render_chat(state, fields)
        special = bool(fields.get("add_special_tokens"))  # the template writes its own
        ids = await encode_text(state, text, special, "messages")
        check_ids(state, ids, "messages")
        prompt = [Prompt(ids, text)]
        tenant = request.scope["quire.tenant"]
        return await build_call(state, fields, prompt, params, "chatcmpl-", tenant)


def _overrides(fields: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters under the names chat has for them. Raises UsageError."""
    result: dict[str, Any] = {}
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


def _whole(call: Call, result: Collected) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    choices = []
    for choice in result.choices[0]:
        entry = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": _logprobs(call, choice),
            "finish_reason": choice.finish_reason,
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


async def _frames(call: Call, deltas: Deltas) -> AsyncGenerator[bytes, None]:
    """First the role of each choice, then one frame per choice that has news."""
    writer, usage = FrameWriter(call, "chat.completion.chunk"), Usage()
    role = b'"delta":{"role":"assistant","content":""},"logprobs":null,'
    yield b"".join(writer.choice(index, role, None) for index in range(call.n))
    async with aclosing(deltas):
        async for index, delta in deltas:
            usage.update(index, delta)
            frames = [_frame(writer, call, c) for c in delta.choices if has_news(c)]
            if frames:
                yield b"".join(frames)
    if call.include_usage:
        yield writer.usage(usage.to_dict())


def _frame(writer: FrameWriter, call: Call, choice: ChoiceDelta) -> bytes:
    text = b'{"content":%b}' % encode(choice.text) if choice.text else b"{}"
    content = b'"delta":%b,"logprobs":%b,' % (text, encode(_logprobs(call, choice)))
    end = b""
    if choice.finish_reason is not None:
        end += b',"stop_reason":' + encode(choice.stop_reason)
    if call.return_token_ids:
        end += b',"token_ids":' + encode(choice.token_ids)
    return writer.choice(choice.index, content, choice.finish_reason, end)
