"""What bytes each token stands for, so that text can be decoded token by token.

A decoder of the `tokenizers` library maps a list of tokens to text. For the byte-level kind and
the SentencePiece kind that is the same as joining bytes per token and decoding UTF-8 at the end;
only the second can be streamed. One difference is wanted: in a run of SentencePiece byte tokens
that is not valid UTF-8 as a whole, the library replaces every byte; here the valid characters in
it are kept, since a stream has shown them already.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from quire.errors import ModelError

SPACE_MARK = "\u2581"  # SentencePiece writes it for a space


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte (openai/gpt-2, encoder.py: bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table


_ALPHABET = byte_level_alphabet()


class TokenBytes:
    """Bytes per token id, computed on first use.

    `strips_space`: the decoder drops one space at the very beginning of a text. ModelError if
    the tokenizer's decoder is of a kind that cannot be streamed.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self._cache: dict[int, bytes] = {}
        self._byte_level = False
        self._byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        self.strips_space = False
        steps = decoder_steps(backend)
        for step in steps:
            if not self._understand(step):
                raise ModelError(
                    code="tokenizer_unsupported",
                    what="the tokenizer's decoder cannot be streamed",
                    why=f"unknown decoder step {json.dumps(step)}",
                )
        if not steps:
            raise ModelError(code="tokenizer_unsupported", what="the tokenizer has no decoder")

    def __getitem__(self, token_id: int) -> bytes:
        """The token's bytes; nothing for ids outside the vocabulary (padding rows of a model)."""
        found = self._cache.get(token_id)
        if found is None:
            token = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
            found = b"" if token is None else self._convert(token)
            self._cache[token_id] = found
        return found

    def _understand(self, step: dict[str, Any]) -> bool:
        """Notes what a decoder step does; False if it is none of those we can stream."""
        match step:
            case {"type": "ByteLevel"}:
                self._byte_level = True
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                self.strips_space = True
            case {"type": "Metaspace", "replacement": str(old)}:
                self._replacements.append((old, " "))
                self.strips_space = step.get("prepend_scheme", "always") != "never"
            case _:
                return False
        return True

    def _convert(self, token: str) -> bytes:
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._byte_fallback and len(token) == 6 and token[:3] == "<0x" and token[5] == ">":
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass  # a token that only looks like a byte stands for its own text
        if self._byte_level and all(character in _ALPHABET for character in token):
            return bytes(_ALPHABET[character] for character in token)
        return token.encode("utf-8", "replace")


def decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder's steps as the library's own JSON has them."""
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return steps
