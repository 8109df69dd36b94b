"""From a request's prompt to checked token ids. Long texts are tokenized off the event loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quire.errors import UsageError
from quire.server.fields import invalid
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


async def encode_prompts(state: ServerState, prompt: Any, special: bool) -> list[Prompt]:
    """The prompts of `/v1/completions`: text, ids, or a list of either. Raises UsageError."""
    prompts = []
    for item in _as_list(prompt):
        if isinstance(item, str):
            if not item:
                raise invalid("prompt", "an empty prompt", "not empty")
            ids = await encode_text(state, item, special, "prompt")
            prompts.append(Prompt(ids, item))
        else:
            prompts.append(Prompt(item))
    for checked in prompts:
        check_ids(state, checked.ids, "prompt")
    return prompts


def _as_list(prompt: Any) -> list[Any]:
    allowed = COMPLETION.fields["prompt"].allowed
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        detail = "a list of different kinds" if kinds else "an empty list"
        raise invalid("prompt", detail, allowed)
    if kinds == {int}:
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise invalid("prompt", f"{len(prompt)} prompts in one request", allowed)
    return list(prompt)


def check_ids(state: ServerState, ids: list[int], name: str) -> None:
    """Raise UsageError for no ids, ids outside the vocabulary, or more than the context holds."""
    info = state.ready_service().engine.info
    if not ids:
        raise invalid(name, "an empty prompt", "at least one token")
    if min(ids) < 0 or max(ids) >= info.vocab_size:
        bad = next(i for i in ids if not 0 <= i < info.vocab_size)
        raise invalid(
            name,
            f"token id {bad} is outside the vocabulary",
            f"ids from 0 to {info.vocab_size - 1}",
        )
    if len(ids) >= info.max_model_len:
        raise UsageError(
            "context_length_exceeded",
            f"{name}: {len(ids)} tokens do not fit the context of {info.max_model_len} tokens",
            why="at least one token must be left for the answer",
            field=name,
        )
