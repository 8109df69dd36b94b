"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from quire.engine.api import GenerateRequest
from quire.errors import UsageError
from quire.outputs import ChoiceDelta, CompletionOutput, PositionLogprobs
from quire.server.body import read_body
from quire.server.calls import Call, build_call, sampling_params
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
from quire.server.logprobs import completion_logprobs, prompt_logprobs
from quire.server.prompts import encode_prompts
from quire.server.schemas import COMPLETION
from quire.server.sse import EventStream, FrameWriter, encode
from quire.server.state import ServerState

DEFAULT_MAX_TOKENS = 16  # OpenAI's and vLLM's default for this route; null means no limit


async def completions(state: ServerState, request: Request) -> Response:
    """Continue prompts. Raises QuireError."""
    call = await _read_call(state, request)
    engine = state.accepting_service().engine
    deltas = run_call(engine, state.metrics, call)
    if call.prompt_only:
        deltas = _without_output(deltas)
    answer = _Answer(state, call)
    if call.stream:
        return EventStream(answer.frames(deltas), call.id)
    result = await until_disconnect(request.receive, collect(deltas, call))
    body = await state.encode(call.large, lambda: encode(answer.whole(result)))
    return Response(body, media_type="application/json", headers={"x-request-id": call.id})


async def _read_call(state: ServerState, request: Request) -> Call:
    options = state.options.server
    state.accepting_service()
    with state.bodies.hold() as hold:
        body = await read_body(request, options, hold)
        fields = COMPLETION.parse(body, options.allow_unknown_fields)
        state.check_model(fields.get("model"))
        if "prompt" not in fields:
            raise UsageError("missing_field", "prompt is missing", field="prompt")
        overrides: dict[str, Any] = {}
        if "max_tokens" in fields:
            overrides["max_tokens"] = fields["max_tokens"]
        if fields.get("max_tokens") == 0:
            if not fields.get("echo"):
                raise invalid("max_tokens", "0 without echo", "at least 1, or 0 with echo")
            overrides["max_tokens"] = 1  # computed, as its logits are those after the prompt
        if fields.get("echo") and fields.get("logprobs") is not None:
            overrides["prompt_logprobs"] = fields["logprobs"]
        length = max(DEFAULT_MAX_TOKENS, fields.get("min_tokens") or 0)
        params = sampling_params(state, fields, length, overrides)
        special = fields.get("add_special_tokens")
        prompts = await encode_prompts(state, fields["prompt"], special is not False)
        tenant = request.scope["quire.tenant"]
        return await build_call(state, fields, prompts, params, "cmpl-", tenant)


async def _without_output(deltas: Deltas) -> Deltas:
    """Deltas as if nothing had been generated behind the prompt."""
    async with aclosing(deltas):
        async for index, delta in deltas:
            delta.num_output_tokens = 0
            for choice in delta.choices:
                choice.text, choice.token_ids, choice.logprobs = "", [], None
                if choice.finish_reason == "stop":
                    choice.finish_reason, choice.stop_reason = "length", None
            yield index, delta


class _Answer:
    """The answer to one call, whole or in frames."""

    def __init__(self, state: ServerState, call: Call):
        self._state = state
        self._tokenizer = state.ready_service().tokenizer
        self._call = call

    def _decode(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def _prompt_text(self, request: GenerateRequest) -> str:
        if request.prompt is not None or self._tokenizer is None:
            return request.prompt or ""
        return self._tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)

    def _logprobs(
        self,
        choice: CompletionOutput | ChoiceDelta,
        request: GenerateRequest,
        prompt: list[PositionLogprobs | None] | None,
        offset: int,
    ) -> dict[str, Any] | None:
        """`prompt` is given where the choice begins with its prompt (echo)."""
        if self._call.logprobs is None:
            return None
        ids = choice.token_ids
        positions: list[PositionLogprobs | None] = list(choice.logprobs or [])
        if prompt is not None:
            # A request that ran out of time in its prompt has fewer positions than tokens.
            missing = len(request.prompt_token_ids) - len(prompt)
            ids = request.prompt_token_ids + ids
            positions = [*prompt, *[None] * missing, *positions]
        return completion_logprobs(ids, positions, self._call.logprobs, offset, self._decode)

    def whole(self, result: Collected) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        call, choices = self._call, []
        for index, request in enumerate(call.requests):
            positions = result.prompt_logprobs[index]
            text = self._prompt_text(request) if call.echo else ""
            for choice in result.choices[index]:
                echoed = positions if call.echo else None
                entry = {
                    "index": index * call.n + choice.index,
                    "text": text + choice.text,
                    "logprobs": self._logprobs(choice, request, echoed, 0),
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                }
                if positions is not None:
                    entry["prompt_logprobs"] = prompt_logprobs(positions)
                if call.return_token_ids:
                    entry["token_ids"] = choice.token_ids
                    entry["prompt_token_ids"] = request.prompt_token_ids
                choices.append(entry)
        return {
            "id": call.id,
            "object": "text_completion",
            "created": call.created,
            "model": call.model,
            "system_fingerprint": call.fingerprint,
            "choices": choices,
            "usage": result.usage.to_dict(),
        }

    async def frames(self, deltas: Deltas) -> AsyncGenerator[bytes, None]:
        """One frame per choice that has news; frames of one delta leave together."""
        call = self._call
        writer, usage = FrameWriter(call, "text_completion"), Usage()
        lengths: dict[int, int] = {}
        positions: dict[int, list[PositionLogprobs | None]] = {}
        async with aclosing(deltas):
            async for index, delta in deltas:
                usage.update(index, delta)
                if delta.prompt_logprobs is not None:  # in pieces, as the prompt is computed
                    positions.setdefault(index, []).extend(delta.prompt_logprobs)
                fresh = [choice for choice in delta.choices if has_news(choice)]
                known = positions.get(index)
                write = partial(self._frames, writer, index, fresh, known, lengths)
                # Only a first frame can be large: with echo it has the prompt's positions.
                begins = call.echo and any(index * call.n + c.index not in lengths for c in fresh)
                if frames := await self._state.encode(call.large and begins, write):
                    yield frames
        if call.include_usage:
            yield writer.usage(usage.to_dict())

    def _frames(
        self,
        writer: FrameWriter,
        index: int,
        choices: list[ChoiceDelta],
        positions: list[PositionLogprobs | None] | None,
        lengths: dict[int, int],
    ) -> bytes:
        return b"".join([self._frame(writer, index, c, positions, lengths) for c in choices])

    def _frame(
        self,
        writer: FrameWriter,
        index: int,
        choice: ChoiceDelta,
        positions: list[PositionLogprobs | None] | None,
        lengths: dict[int, int],
    ) -> bytes:
        """`lengths`: characters sent so far by choice number; a choice not in it is new."""
        call, request = self._call, self._call.requests[index]
        number = index * call.n + choice.index
        first = number not in lengths
        offset = lengths.setdefault(number, 0)
        echoed = positions if first and call.echo else None
        logprobs = self._logprobs(choice, request, echoed, offset)
        text = (self._prompt_text(request) if first and call.echo else "") + choice.text
        lengths[number] += len(text)
        content = b'"text":%b,"logprobs":%b,' % (encode(text), encode(logprobs))
        end = self._ending(choice, request, first)
        return writer.choice(number, content, choice.finish_reason, end)

    def _ending(self, choice: ChoiceDelta, request: GenerateRequest, first: bool) -> bytes:
        end = b""
        if choice.finish_reason is not None:
            end += b',"stop_reason":' + encode(choice.stop_reason)
        if self._call.return_token_ids:
            end += b',"token_ids":' + encode(choice.token_ids)
            if first:
                end += b',"prompt_token_ids":' + encode(request.prompt_token_ids)
        return end
