"""Streaming text equals text decoded at once, wherever the stream is cut."""

from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from quire.errors import ModelError
from quire.tokenization.detokenizer import Detokenizer
from quire.tokenization.tokenizer import Tokenizer

from .vocabularies import byte_level, sentence_piece

BYTE_LEVEL = Tokenizer(byte_level())
LLAMA = Tokenizer(sentence_piece(strip=True))
GEMMA = Tokenizer(sentence_piece(strip=False))
TOKENIZERS = {"byte level": BYTE_LEVEL, "llama": LLAMA, "gemma": GEMMA}

which = st.sampled_from(sorted(TOKENIZERS))
texts = st.text(
    st.one_of(st.sampled_from(" the cating▁éß日本語😀👩‍👧\n\t"), st.characters(codec="utf-8")),
    max_size=40,
)


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int], **options: bool) -> list[str]:
    """The pieces that come out when the ids go in cut at the given places."""
    detokenizer = Detokenizer(tokenizer, **options)
    places = sorted({0, len(ids), *[cut for cut in cuts if cut < len(ids)]})
    pieces = [detokenizer.push(ids[a:b]) for a, b in pairwise(places)]
    return [*pieces, detokenizer.finish()]


def sentence_piece_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Known characters as tokens, others as their bytes."""
    ids = []
    for character in text.replace(" ", "▁"):
        token = tokenizer.token_id(character)
        ids += [3 + byte for byte in character.encode()] if token is None else [token]
    return ids


@settings(max_examples=150, deadline=None)
@given(which, texts, st.lists(st.integers(0, 200), max_size=30), st.booleans())
def test_pieces_of_any_split_join_to_the_librarys_decoding_of_real_text(
    name: str, text: str, cuts: list[int], skip: bool
) -> None:
    tokenizer = TOKENIZERS[name]
    if name == "byte level":
        ids = tokenizer.encode(text)
    else:
        ids = [1, *sentence_piece_ids(tokenizer, text), 2]
    pieces = stream(tokenizer, ids, cuts, skip_special_tokens=skip)
    expected = tokenizer.backend.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces) == expected
    assert tokenizer.decode(ids, skip) == expected


@settings(max_examples=150, deadline=None)
@given(which, st.lists(st.integers(0, 500), max_size=40), st.lists(st.integers(0, 40)))
def test_pieces_of_any_split_of_any_tokens_join_to_decode(
    name: str, ids: list[int], cuts: list[int]
) -> None:
    tokenizer = TOKENIZERS[name]
    joined = "".join(stream(tokenizer, ids, cuts))
    assert joined == tokenizer.decode(ids)
    if name == "byte level":
        assert joined == tokenizer.backend.decode(ids)


@settings(max_examples=60, deadline=None)
@given(which, texts)
def test_only_whole_characters_leave(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text) if name == "byte level" else sentence_piece_ids(tokenizer, text)
    if "\ufffd" not in text:
        pieces = stream(tokenizer, ids, list(range(len(ids))))
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_cut_character_waits_and_ends_as_a_replacement() -> None:
    smile = [3 + byte for byte in "😀".encode()]
    detokenizer = Detokenizer(LLAMA)
    assert [detokenizer.push([i]) for i in smile] == ["", "", "", "😀"]
    assert detokenizer.push(smile[:2]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_continuation_keeps_its_first_space_and_a_text_does_not() -> None:
    the = LLAMA.token_id("▁the")
    assert the is not None
    assert Detokenizer(LLAMA).push([the, the]) == "the the"
    assert Detokenizer(LLAMA, continuation=True).push([the, the]) == " the the"
    assert Detokenizer(GEMMA).push([the]) == " the"


def test_special_tokens_show_only_on_demand_and_unknown_ids_are_nothing() -> None:
    end, tool = BYTE_LEVEL.token_id("<|end|>"), BYTE_LEVEL.token_id("<tool call>")
    assert end is not None
    assert tool is not None
    ids = [end, tool, 1 << 20]
    assert Detokenizer(BYTE_LEVEL).push(ids) == "<tool call>"
    assert Detokenizer(BYTE_LEVEL, skip_special_tokens=False).push(ids) == "<|end|><tool call>"


def test_a_metaspace_decoder_streams_like_the_library() -> None:
    backend = sentence_piece()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    ids = [tokenizer.token_id(token) for token in ("▁the", "▁cat", "▁▁", "ing")]
    assert tokenizer.decode(ids) == backend.decode(ids) == "the cat  ing"  # type: ignore[arg-type]


def test_a_decoder_that_cannot_stream_is_refused_but_decodes() -> None:
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"[UNK]": 0, "run": 1, "##ning": 2}, unk_token="[UNK]")
    )
    backend.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode([1, 2]) == "running"
    with pytest.raises(ModelError, match="cannot be streamed"):
        Detokenizer(tokenizer)
