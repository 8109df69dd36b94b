"""Special tokens of a model's files, read without loading its tokenizer."""

from __future__ import annotations

from typing import Any

import msgspec

from quire.weights.hub import ModelFiles, bad_config

# Names that chat templates know special tokens by.
SPECIAL_TOKEN_NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Vocabulary(msgspec.Struct):
    """Ids by token, or (Unigram) pairs of token and score in order of ids."""

    vocab: dict[str, int] | list[tuple[str, float]] = {}


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_AddedToken] | None = None
    model: msgspec.Raw = msgspec.Raw(b"{}")


def eos_token_ids(files: ModelFiles, tokenizer: bool = True) -> list[int]:
    """Every id that ends a generation: those of generation_config.json, else of config.json, and
    (`tokenizer`) the tokenizer's own, as vLLM has it. ModelError where a file is bad."""
    ends = _configured(files.generation_config()) or _configured(files.config())
    own = _own_eos(files) if tokenizer and files.kind != "gguf" else None
    return list(dict.fromkeys([*ends, *([] if own is None else [own])]))


def _configured(config: dict[str, Any]) -> list[int]:
    given = config.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise bad_config("the model's configuration", f"eos_token_id is {given!r}")
    return ids


def _own_eos(files: ModelFiles) -> int | None:
    config = files.read_json("tokenizer_config.json") or {}
    token = special_tokens(files, config).get("eos_token")
    text = files.read_text("tokenizer.json")
    if token is None or text is None:
        return None
    try:
        found = msgspec.json.decode(text, type=_TokenizerFile)
        for added in found.added_tokens or ():
            if added.content == token:
                return added.id
        vocabulary = msgspec.json.decode(found.model, type=_Vocabulary).vocab
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise bad_config(str(files.path / "tokenizer.json"), str(error)) from error
    if isinstance(vocabulary, dict):
        return vocabulary.get(token)
    return next((i for i, (each, _) in enumerate(vocabulary) if each == token), None)


def special_tokens(files: ModelFiles, config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; each is a string or an object with its content."""
    older = files.read_json("special_tokens_map.json") or {}
    found: dict[str, str] = {}
    for name in SPECIAL_TOKEN_NAMES:
        token = config.get(name, older.get(name))
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
        elif token is not None:
            raise bad_config("tokenizer_config.json", f"{name} is neither text nor a token")
    return found
