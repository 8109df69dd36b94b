"""What stop strings and bad words are to a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from quire.errors import UsageError
from quire.params import SamplingParams
from quire.tokenization.stop import StopStrings

# What a request's slot on a GPU holds (MAX_WORD_TOKENS in quire/kernels/device_state.py).
MAX_BAD_WORD_TOKENS = 4096


class TextEncoder(Protocol):
    """What is needed of quire.tokenization.tokenizer.Tokenizer."""

    def encode(self, text: str, /, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class TextRules:
    """Stop strings, compiled, and bad words as token sequences: made once, in time that grows with
    their length, and shared by all prompts and choices of a call."""

    stops: StopStrings | None = None
    bad_words: list[list[int]] = field(default_factory=list)


def text_rules(params: SamplingParams, tokenizer: TextEncoder | None) -> TextRules:
    """Raises UsageError where they need a tokenizer and there is none, and for bad words of too
    many tokens."""
    if tokenizer is None:
        for name in ("stop", "bad_words"):
            if getattr(params, name):
                raise UsageError("no_tokenizer", f"{name} needs a tokenizer", field=name)
        return TextRules()
    stops = StopStrings(params.stop_strings) if params.stop_strings else None
    return TextRules(stops, _token_sequences(params.bad_words or [], tokenizer))


def _token_sequences(words: list[str], tokenizer: TextEncoder) -> list[list[int]]:
    """Each word at a text's start and after a space, as vLLM has it."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids:
                found[tuple(ids)] = None
    tokens = sum(map(len, found))
    if tokens > MAX_BAD_WORD_TOKENS:
        raise UsageError(
            "invalid_value",
            f"bad_words: {tokens} tokens together, each word with and without a space before it",
            why=f"at most {MAX_BAD_WORD_TOKENS} are possible",
            field="bad_words",
        )
    return [list(ids) for ids in found]
