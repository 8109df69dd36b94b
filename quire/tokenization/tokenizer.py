"""A model's tokenizer: the `tokenizers` library and what the engine needs to know around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import tokenizers

from quire.errors import ModelError, UsageError
from quire.tokenization.special_tokens import special_tokens
from quire.tokenization.token_bytes import TokenBytes
from quire.weights.hub import ModelFiles, bad_config


class Tokenizer:
    """Encodes and decodes; immutable, safe to use from several threads.

    `special_tokens`: text by the name templates use, such as bos_token. `chat_templates`: Jinja
    text by name.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ):
        # A file may ask for truncation or padding; input is never cut or filled here.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def from_files(cls, files: ModelFiles) -> Tokenizer:
        """Loads a model's tokenizer. ModelError if it is missing, corrupt or of unknown kind."""
        if files.kind == "gguf":
            from quire.tokenization import gguf_tokenizer

            header = files.gguf_header
            return cls(
                gguf_tokenizer.build(header),
                gguf_tokenizer.special_tokens(header),
                gguf_tokenizer.chat_templates(header),
            )
        config = files.read_json("tokenizer_config.json") or {}
        return cls(
            _load_backend(files), special_tokens(files, config), _chat_templates(files, config)
        )

    @property
    def chat_template(self) -> str | None:
        """The template that is used when none is named."""
        return self.chat_templates.get("default")

    @cached_property
    def token_table(self) -> TokenBytes:
        """Bytes per token id. ModelError if this tokenizer's decoder has no such thing."""
        return TokenBytes(self.backend)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. UsageError for text that is not Unicode (lone surrogates).

        Other threads run meanwhile: of the library's methods only those for batches let them.
        """
        try:
            [found] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise UsageError(
                code="text_invalid", what="the text is not valid Unicode", why=str(error)
            ) from error
        ids: list[int] = found.ids
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text; ids outside the vocabulary stand for nothing, as in the library."""
        from quire.tokenization.detokenizer import Detokenizer

        if not self.streams:
            ids = [token_id for token_id in token_ids if 0 <= token_id < 1 << 32]
            text: str = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
            return text
        stream = Detokenizer(self, skip_special_tokens)
        return stream.push(token_ids) + stream.finish()

    @cached_property
    def streams(self) -> bool:
        """Whether the decoder can work token by token (word-piece decoders cannot)."""
        try:
            return self.token_table is not None
        except ModelError:
            return False

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token adds to a text."""
        return self.token_table[token_id]

    def token_text(self, token_id: int) -> str:
        """One token as text for people, U+FFFD where it is only part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """The id of a token by its vocabulary spelling, None if there is none."""
        found: int | None = self.backend.token_to_id(token)
        return found


def _load_backend(files: ModelFiles) -> tokenizers.Tokenizer:
    text = files.read_text("tokenizer.json")
    if text is None:
        raise ModelError(
            code="tokenizer_missing",
            what=f"{files.name} has no tokenizer.json",
            why="other tokenizer files (tokenizer.model, vocab.txt) are not read",
            fix="save it with transformers' AutoTokenizer, which writes tokenizer.json",
        )
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise bad_config(str(files.path / "tokenizer.json"), str(error)) from error


def _chat_templates(files: ModelFiles, config: dict[str, Any]) -> dict[str, str]:
    """A template file wins over tokenizer_config.json, which may hold one or a named list."""
    given = config.get("chat_template")
    if given is None:
        given = (files.read_json("chat_template.json") or {}).get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(given, str):
        templates["default"] = given
    elif isinstance(given, list):
        for entry in given:
            match entry:
                case {"name": str(name), "template": str(template)}:
                    templates[name] = template
                case _:
                    raise bad_config("tokenizer_config.json", "a chat template has no name")
    elif given is not None:
        raise bad_config("tokenizer_config.json", "chat_template is neither text nor a list")
    for path in sorted(files.path.glob("additional_chat_templates/*.jinja")):
        templates[path.stem] = files.read_text(f"additional_chat_templates/{path.name}") or ""
    own = files.read_text("chat_template.jinja")
    if own is not None:
        templates["default"] = own
    return templates
