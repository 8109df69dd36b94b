"""From a request's prompt to checked token ids. Long texts are tokenized off the event loop."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from quire.errors import UsageError
from quire.params import check_tokens
from quire.server.fields import Field, decode_field, invalid
from quire.server.schemas import COMPLETION, MAX_PROMPTS
from quire.server.state import ServerState

# Tokens longer than this are rare (GPT-2's longest is 128 characters): a text with more
# characters than this for every token of context is refused before it is tokenized.
CHARACTERS_PER_TOKEN = 128
INLINE_CHARACTERS = 2048


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the text they came from where there is one."""

    ids: list[int]
    text: str | None = None


async def encode_text(state: ServerState, text: str, special: bool, name: str) -> list[int]:
    """Token ids of `text`. Raises UsageError where it can never fit the context."""
    tokenizer = state.tokenizer()
    limit = state.ready_service().engine.info.max_model_len * CHARACTERS_PER_TOKEN
    if len(text) > limit:
        raise UsageError(
            "context_length_exceeded",
            f"{name}: {len(text)} characters are more than the model's context can hold",
            why=f"at most {limit} characters are tokenized",
            field=name,
        )
    if len(text) <= INLINE_CHARACTERS:
        return tokenizer.encode(text, add_special_tokens=special)
    return await state.tokenizing.run(lambda: tokenizer.encode(text, add_special_tokens=special))


async def encode_prompts(state: ServerState, raw: msgspec.Raw, special: bool) -> list[Prompt]:
    """The prompts of `/v1/completions`: text, ids, or a list of either. Raises UsageError."""
    prompts = []
    for item in parse_prompts(bytes(raw), state.ready_service().engine.info.max_model_len):
        if isinstance(item, str):
            if not item:
                raise _empty("prompt")
            ids = await encode_text(state, item, special, "prompt")
            prompts.append(Prompt(ids, item))
        else:
            prompts.append(Prompt(item))
    for checked in prompts:
        check_ids(state, checked.ids, "prompt")
    return prompts


def parse_prompts(raw: bytes, max_model_len: int) -> list[str] | list[list[int]]:
    """Prompts from JSON. Lists that are far too long are refused before they are decoded, so
    that they cost the event loop nothing. Raises UsageError."""
    field = COMPLETION.fields["prompt"]
    start = re.match(rb"\[\s*([\[\"]?)", raw)
    if start is None:
        return [_decode(raw, str)]
    if start[1] == b'"':
        if raw.count(b'"') - raw.count(b'\\"') > 2 * MAX_PROMPTS:
            raise invalid("prompt", "too many prompts", field.allowed)
        prompts: list[str] = _decode(raw, list[str])
    elif start[1] == b"[":
        if raw.count(b"[") > MAX_PROMPTS + 1 or raw.count(b",") > MAX_PROMPTS * max_model_len:
            raise invalid("prompt", "too many prompts or token ids", field.allowed)
        return list(_decode(raw, list[list[int]]))
    else:
        if (commas := raw.count(b",")) >= max_model_len:
            raise _too_long("prompt", commas + 1, max_model_len)
        return [_decode(raw, list[int])]
    if len(prompts) > MAX_PROMPTS:
        raise invalid("prompt", f"{len(prompts)} prompts in one request", field.allowed)
    return prompts


def _decode(raw: bytes, kind: Any) -> Any:
    allowed = COMPLETION.fields["prompt"].allowed
    return decode_field("prompt", msgspec.Raw(raw), Field(kind, allowed, max_bytes=None))


def check_ids(state: ServerState, ids: list[int], name: str) -> None:
    """Raise UsageError for no ids, ids outside the vocabulary, or more than the context holds."""
    info = state.ready_service().engine.info
    if not ids:
        raise _empty(name)
    if len(ids) >= info.max_model_len:
        raise _too_long(name, len(ids), info.max_model_len)
    check_tokens(name, ids, info.vocab_size)


def _empty(name: str) -> UsageError:
    return UsageError("empty_prompt", f"{name}: the prompt is empty", field=name)


def _too_long(name: str, count: int, max_model_len: int) -> UsageError:
    return UsageError(
        "context_length_exceeded",
        f"{name}: {count} tokens do not fit the context of {max_model_len} tokens",
        why="at least one token must be left for the answer",
        field=name,
    )
