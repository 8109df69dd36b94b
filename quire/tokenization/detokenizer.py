"""Tokens to text as they come: only whole characters leave."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from quire.tokenization.tokenizer import Tokenizer


class Detokenizer:
    """Decodes one request's tokens incrementally, in constant time per token.

    The texts of all `push` and the `finish` together are `Tokenizer.decode` of all tokens,
    however they were split. `continuation`: the tokens continue a text (as generated tokens
    continue the prompt), so a space at the very beginning is kept. ModelError if the tokenizer's
    decoder is of a kind that cannot be streamed.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, continuation: bool = False
    ):
        self._bytes = tokenizer.token_table
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._strip = self._bytes.strips_space and not continuation
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that the tokens complete; the bytes of a cut character wait for the next."""
        data = b"".join([self._bytes[i] for i in token_ids if i not in self._skipped])
        return self._emit(self._utf8.decode(data))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._emit(self._utf8.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
