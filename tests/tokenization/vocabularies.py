"""Small tokenizers made in the tests: byte-level BPE and SentencePiece-like BPE."""

from functools import lru_cache

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "Größe, naïve café: déjà vu — 日本語のテキスト и русский текст",
    "emoji 😀😃 and 👩‍👩‍👧 family; def main(): return {'a': [1, 2]}\n\n\tend",
]


@lru_cache(maxsize=1)
def byte_level_json() -> str:
    """A trained byte-level BPE with one special and one plain added token, as tokenizer.json."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(
            vocab_size=420,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=["<|end|>", "<|start|>"],
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    return backend.to_str()


def byte_level() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(byte_level_json())


def sentence_piece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and token types as a GGUF file of Llama 2's kind has them."""
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    kinds = [2, 3, 3] + [6] * 256
    scores = [0.0] * len(tokens)
    merged = ["▁t", "he", "▁the", "in", "▁a", "er", "▁▁", "at", "▁cat", "ca", "▁c", "éé", "▁▁▁▁",
              "th", "▁th", "ing", "nin", "ain"]  # fmt: skip
    for rank, piece in enumerate(merged):
        tokens.append(piece)
        scores.append(-1.0 - rank)
    for character in "▁abcdefghinrstéß":
        tokens.append(character)
        scores.append(-100.0 - len(tokens))
    kinds += [1] * (len(tokens) - len(kinds))
    tokens += ["<tool>", "[code]"]
    scores += [-1000.0, -1000.0]
    kinds += [3, 4]
    return tokens, scores, kinds


def sentence_piece(strip: bool = True) -> tokenizers.Tokenizer:
    """The same vocabulary with the decoder of Llama 2 (strip) or Gemma (no strip)."""
    tokens, _, kinds = sentence_piece_vocabulary()
    vocabulary = {token: place for place, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind in (2, 3)])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend
