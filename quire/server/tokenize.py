"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from quire.errors import UsageError
from quire.params import check_tokens
from quire.server.body import read_body
from quire.server.chat_prompt import render_chat
from quire.server.fields import invalid
from quire.server.prompts import INLINE_CHARACTERS, encode_text
from quire.server.schema import RequestSchema
from quire.server.schemas import DETOKENIZE, TOKENIZE
from quire.server.sse import encode
from quire.server.state import ServerState


async def tokenize(state: ServerState, request: Request) -> Response:
    """Token ids of a prompt, or of messages in the model's template. Raises QuireError."""
    with state.bodies.hold() as hold:
        body = await read_body(request, state.options.server, hold)
        fields = _fields(state, body, TOKENIZE)
        if ("prompt" in fields) == ("messages" in fields):
            raise UsageError(
                "missing_field", "give one of prompt and messages, not both", field="prompt"
            )
        if "prompt" in fields:
            special = fields.get("add_special_tokens") is not False
            ids = await encode_text(state, fields["prompt"], special, "prompt")
        else:
            text = (await render_chat(state, fields)).text
            special = bool(fields.get("add_special_tokens"))
            ids = await encode_text(state, text, special, "messages")
    result = {
        "count": len(ids),
        "max_model_len": state.ready_service().engine.info.max_model_len,
        "tokens": ids,
    }
    if fields.get("return_token_strs"):
        tokenizer = state.tokenizer()
        result["token_strs"] = await state.tokenizing.run(
            lambda: [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        )
    return Response(encode(result), media_type="application/json")


async def detokenize(state: ServerState, request: Request) -> Response:
    """The text of token ids. Raises QuireError."""
    with state.bodies.hold() as hold:
        body = await read_body(request, state.options.server, hold)
        fields = _fields(state, body, DETOKENIZE)
        if "tokens" not in fields:
            raise UsageError("missing_field", "tokens is missing", field="tokens")
        text = await _decode(state, fields["tokens"])
    return Response(encode({"prompt": text}), media_type="application/json")


async def _decode(state: ServerState, ids: list[int]) -> str:
    tokenizer, info = state.tokenizer(), state.ready_service().engine.info
    if len(ids) > info.max_model_len:
        raise invalid("tokens", f"{len(ids)} ids", f"at most {info.max_model_len} token ids")
    check_tokens("tokens", ids, info.vocab_size)
    if len(ids) <= INLINE_CHARACTERS:
        return tokenizer.decode(ids, skip_special_tokens=False)
    return await state.tokenizing.run(lambda: tokenizer.decode(ids, skip_special_tokens=False))


def _fields(state: ServerState, body: bytes, schema: RequestSchema) -> dict[str, Any]:
    fields = schema.parse(body, state.options.server.allow_unknown_fields)
    state.check_model(fields.get("model"))
    return fields
