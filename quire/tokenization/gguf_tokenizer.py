"""A tokenizer out of GGUF metadata.

Keys and token types: gguf-py/gguf/constants.py; pre-tokenizer names: src/llama-vocab.cpp, both of
llama.cpp. The split patterns are those of the models' own tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Callable

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from quire.errors import ModelError
from quire.tokenization.deepseek_splits import deepseek_v2, deepseek_v3
from quire.tokenization.token_bytes import SPACE_MARK
from quire.weights.gguf_header import GgufHeader, corrupt, unsupported

_PREFIX = "tokenizer.ggml"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPECIAL_KEYS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token",
                 "padding": "pad_token"}  # fmt: skip
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split_by(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": _split_by(_LLAMA3_SPLIT),
    "llama3": _split_by(_LLAMA3_SPLIT),
    "llama-v3": _split_by(_LLAMA3_SPLIT),
    "qwen2": _split_by(_QWEN2_SPLIT),
    "deepseek-r1-qwen": _split_by(_QWEN2_SPLIT),
    "deepseek-llm": deepseek_v2,
    "deepseek-v3": deepseek_v3,
}
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_NFC_NAMES = ("qwen2", "deepseek-r1-qwen")


def build(header: GgufHeader) -> tokenizers.Tokenizer:
    """The tokenizer that a GGUF file describes. ModelError if it is corrupt or of unknown kind."""
    kind = header.text(f"{_PREFIX}.model")
    tokens: list[str] = header.items(f"{_PREFIX}.tokens", str)
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for place, token in enumerate(tokens) if vocabulary[token] != place)
        raise corrupt(header.path, f"token {twice!r} is in the vocabulary twice")
    try:
        if kind == "gpt2":
            backend = _byte_level(header, vocabulary)
        elif kind == "llama":
            backend = _sentence_piece(header, tokens, vocabulary)
        else:
            known = "known: gpt2, llama"
            raise unsupported(header.path, f"its tokenizer is of the kind {kind!r}", known)
        _add_special(header, backend, tokens, normalized=kind == "llama" and not _prefix(header))
        _add_post_processor(header, backend, tokens, kind)
    except ModelError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise corrupt(header.path, f"its tokenizer: {error}") from error
    return backend


def special_tokens(header: GgufHeader) -> dict[str, str]:
    """Special tokens by the names that chat templates use."""
    tokens = header.items(f"{_PREFIX}.tokens", str)
    return {
        name: _token(header, tokens, key)
        for key, name in _SPECIAL_KEYS.items()
        if f"{_PREFIX}.{key}_token_id" in header.metadata
    }


def chat_templates(header: GgufHeader) -> dict[str, str]:
    """Jinja text by name."""
    templates = {}
    if "tokenizer.chat_template" in header.metadata:
        templates["default"] = header.text("tokenizer.chat_template")
    for key in header.metadata:
        if key.startswith("tokenizer.chat_template."):
            templates[key.removeprefix("tokenizer.chat_template.")] = header.text(key)
    return templates


def _token(header: GgufHeader, tokens: list[str], key: str) -> str:
    token_id = header.integer(f"{_PREFIX}.{key}_token_id")
    if not 0 <= token_id < len(tokens):
        raise corrupt(header.path, f"{key}_token_id is {token_id}, there are {len(tokens)} tokens")
    return tokens[token_id]


def _prefix(header: GgufHeader) -> bool:
    """Whether a space is put before a text (SentencePiece's add_dummy_prefix)."""
    return header.flag(f"{_PREFIX}.add_space_prefix", True)


def _byte_level(header: GgufHeader, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    pre = header.text(f"{_PREFIX}.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        known = f"known: {', '.join(_PRE_TOKENIZERS)}"
        raise unsupported(header.path, f"its pre-tokenizer is {pre!r}", known)
    merges = []
    for merge in header.items(f"{_PREFIX}.merges", str):
        left, space, right = merge.partition(" ")
        if not space:
            raise corrupt(header.path, f"the merge {merge!r} is not two tokens")
        merges.append((left, right))
    # Llama 3 takes a piece that is a whole token as it is, whatever the merges say.
    model = models.BPE(vocabulary, merges, ignore_merges=pre in _LLAMA3_NAMES)
    backend = tokenizers.Tokenizer(model)
    if pre in _NFC_NAMES:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(
    header: GgufHeader, tokens: list[str], vocabulary: dict[str, int]
) -> tokenizers.Tokenizer:
    scores: list[float] = header.items(f"{_PREFIX}.scores", float)
    if len(scores) != len(tokens):
        raise corrupt(header.path, f"{len(scores)} scores for {len(tokens)} tokens")
    unknown = special_tokens(header).get("unk_token")
    merges = _merges_of_scores(tokens, scores, vocabulary)
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    mark = normalizers.Replace(" ", SPACE_MARK)
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _prefix(header):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), mark])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = mark
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_of_scores(
    tokens: list[str], scores: list[float], vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """SentencePiece merges the adjacent pair whose joined piece scores highest: the same as
    merges in order of score, with every way to cut a piece into two known pieces."""
    merges: list[tuple[str, str]] = []
    for token_id in sorted(range(len(tokens)), key=[-score for score in scores].__getitem__):
        piece = tokens[token_id]
        merges += [
            (piece[:cut], piece[cut:])
            for cut in range(len(piece) - 1, 0, -1)
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary
        ]
    return merges


def _add_special(
    header: GgufHeader, backend: tokenizers.Tokenizer, tokens: list[str], normalized: bool
) -> None:
    """Control tokens are special; user-defined ones are matched first but show as text.

    `normalized`: user-defined tokens are matched after spaces became marks.
    """
    kinds: list[int] = header.items(f"{_PREFIX}.token_type", int, [])
    if len(kinds) not in (0, len(tokens)):
        raise corrupt(header.path, f"{len(kinds)} token types for {len(tokens)} tokens")
    typed = list(zip(kinds, tokens, strict=False))
    special = {token for kind, token in typed if kind in (_UNKNOWN, _CONTROL)}
    special.update(special_tokens(header).values())
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in tokens if token in special]
    )
    backend.add_tokens(
        [
            AddedToken(token, normalized=normalized, special=False)
            for kind, token in typed
            if kind == _USER_DEFINED and token not in special
        ]
    )


def _add_post_processor(
    header: GgufHeader, backend: tokenizers.Tokenizer, tokens: list[str], kind: str
) -> None:
    """Adds bos and eos as the file says; where it does not, as llama.cpp does for the kind."""
    pre = header.text(f"{_PREFIX}.pre", "default")
    usual = (
        kind == "llama" or pre in _LLAMA3_NAMES
    ) and f"{_PREFIX}.bos_token_id" in header.metadata
    add_bos = header.flag(f"{_PREFIX}.add_bos_token", usual)
    before = [_token(header, tokens, "bos")] if add_bos else []
    add_eos = header.flag(f"{_PREFIX}.add_eos_token", False)
    after = [_token(header, tokens, "eos")] if add_eos else []
    if before or after:
        ids = {token: tokens.index(token) for token in before + after}
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=list(ids.items()),
        )
