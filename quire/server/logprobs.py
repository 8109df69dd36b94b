"""Log-probabilities in OpenAI's two shapes (completions and chat), and vLLM's for prompts.

What belongs to one position is JSON already: encoding holds the interpreter's lock, and a long
prompt with many candidates would hold it for half a second as one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from quire.outputs import Logprob, PositionLogprobs

_encode = msgspec.json.Encoder().encode
# JSON has no minus infinity; OpenAI's own floor for an impossible token.
FLOOR = -9999.0


def completion_logprobs(
    ids: list[int],
    positions: Sequence[PositionLogprobs | None],
    count: int,
    offset: int,
    decode: Callable[[int], str],
) -> dict[str, Any]:
    """`logprobs` of a completion choice: parallel lists over tokens.

    `count`: candidates to show. `offset`: characters of text before the first token. A position
    of None (a prompt's first token) has no log-probability. `decode` gives a token's text where
    the engine gave none.
    """
    result: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for token, position in zip(ids, positions, strict=True):
        text = _text(token, position[token]) if position else decode(token)
        result["tokens"].append(text)
        result["token_logprobs"].append(_value(position[token]) if position else None)
        top = {_text(i, entry): _value(entry) for i, entry in _top(position, token, count)}
        result["top_logprobs"].append(_json(top if position else None))
        result["text_offset"].append(offset)
        offset += len(text)
    return result


def chat_logprobs(ids: list[int], positions: list[PositionLogprobs], count: int) -> dict[str, Any]:
    """`logprobs` of a chat choice: one entry per token, with `count` candidates each."""
    content = []
    for token, position in zip(ids, positions, strict=True):
        entry = _chat_entry(token, position[token])
        ranked = sorted(position.items(), key=lambda item: item[1].rank)[:count]
        entry["top_logprobs"] = [_chat_entry(i, candidate) for i, candidate in ranked]
        content.append(_json(entry))
    return {"content": content, "refusal": None}


def prompt_logprobs(positions: list[PositionLogprobs | None]) -> list[msgspec.Raw]:
    """vLLM's `prompt_logprobs`: per position None or {token id: {logprob, rank, decoded_token}}."""
    return [
        _json(None if position is None else _prompt_position(position)) for position in positions
    ]


def _prompt_position(position: PositionLogprobs) -> dict[str, dict[str, Any]]:
    return {
        str(token): {
            "logprob": _value(entry),
            "rank": entry.rank,
            "decoded_token": entry.decoded_token,
        }
        for token, entry in position.items()
    }


def _json(value: Any) -> msgspec.Raw:
    return msgspec.Raw(_encode(value))


def _top(position: PositionLogprobs | None, chosen: int, count: int) -> list[tuple[int, Logprob]]:
    """The `count` most likely candidates, and the chosen one."""
    if not position:
        return []
    ranked = sorted(position.items(), key=lambda item: item[1].rank)
    return [item for i, item in enumerate(ranked) if i < count or item[0] == chosen]


def _chat_entry(token: int, entry: Logprob) -> dict[str, Any]:
    text = _text(token, entry)
    return {"token": text, "logprob": _value(entry), "bytes": list(text.encode())}


def _text(token: int, entry: Logprob) -> str:
    return entry.decoded_token if entry.decoded_token is not None else f"token_id:{token}"


def _value(entry: Logprob) -> float:
    return max(entry.logprob, FLOOR)
