"""The text of `quire bench quality`: what is computed on it as prompts, and what is continued."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.flags import CommandLineError
from quire.errors import UsageError

if TYPE_CHECKING:
    from quire.tokenization.tokenizer import Tokenizer

# Where --tokens, --context and --output-tokens are not given.
TOKENS, CONTEXT, OUTPUT = 1024, 512, 64

Piece = list[int]


@dataclass(frozen=True)
class Sizes:
    """How much is compared; None: what the text and the models allow, at most the constants."""

    tokens: int | None
    context: int | None
    output: int | None
    prompts: int

    def fit(self, longest: int) -> tuple[int, int]:
        """(tokens of a piece, tokens of a continuation), together at most `longest`.

        Raises CommandLineError where what was given does not fit.
        """
        output = self.output or max(1, min(OUTPUT, longest // 4))
        context = self.context or min(CONTEXT, longest - output)
        if context < 2 or context + output > longest:
            raise CommandLineError(
                "invalid_flag",
                f"--context {context} and --output-tokens {output} do not fit the models",
                why=f"pieces need 2 tokens, and both together may have {longest}",
                field="--context",
            )
        return context, output


@dataclass(frozen=True)
class Work:
    """`pieces` are computed as prompts, each from an empty context: all its positions but the last
    are compared. `prompts`, beginnings of pieces, are continued greedily by `output` tokens.
    `tokens`: of the text, in the pieces."""

    pieces: list[Piece]
    prompts: list[Piece]
    output: int
    tokens: int
    digest: str

    @property
    def positions(self) -> int:
        return sum(len(piece) - 1 for piece in self.pieces)

    def to_dict(self) -> dict[str, Any]:
        """For a record."""
        return {
            "sha256": self.digest,
            "tokens": self.tokens,
            "pieces": len(self.pieces),
            "prompts": len(self.prompts),
            "output_tokens": self.output,
        }


def read_text(path: str | None) -> str:
    """The text of --text. Raises CommandLineError where it is not named or cannot be read."""
    if path is None:
        fix = "name a text of the kind that the model is for: --text FILE"
        raise CommandLineError("usage", "bench quality needs a text", fix=fix, field="--text")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandLineError(
            "cannot_read", f"cannot read {path} as UTF-8 text", why=str(error), field="--text"
        ) from None


def encode(text: str, tokenizer: Tokenizer | None) -> tuple[Piece, list[Piece]]:
    """(what the tokenizer puts before a text, the texts); without a tokenizer each line holds the
    token ids of a text. Raises UsageError."""
    if tokenizer is None:
        try:
            return [], [[int(word) for word in line.split()] for line in text.splitlines()]
        except ValueError as error:
            fix = "give ids in digits, a text in each line, or leave --skip-tokenizer-init out"
            raise UsageError(
                "text_invalid", "the text is not token ids", why=str(error), fix=fix, field="--text"
            ) from None
    plain, whole = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    starts = range(len(whole) - len(plain) + 1)
    lead = next((whole[:i] for i in starts if whole[i : i + len(plain)] == plain), [])
    return lead, [plain]


def make_work(lead: Piece, texts: list[Piece], sizes: Sizes, longest: int, vocab_size: int) -> Work:
    """Cut the first tokens of the texts into pieces, each after `lead`, and choose prompts.

    Raises UsageError where the text is too short or has tokens that the models do not.
    """
    context, output = sizes.fit(longest)
    there = sum(len(text) for text in texts)
    wanted = sizes.tokens or min(TOKENS, there)
    if there < wanted:
        raise _too_short(f"the text has {there} tokens, and --tokens asks for {wanted}")
    foreign = next((t for text in texts for t in text if not 0 <= t < vocab_size), None)
    if foreign is not None:
        raise UsageError(
            "invalid_token",
            f"the text has the token {foreign}, the models have 0 to {vocab_size - 1}",
            field="--text",
        )
    pieces, left = [], wanted
    for text in texts:
        used = text[:left]
        left -= len(used)
        step = max(1, context - len(lead))
        cut = (lead + used[i : i + step] for i in range(0, len(used), step))
        pieces += [piece for piece in cut if len(piece) > 1]
    prompts = choose_prompts(pieces, sizes.prompts)
    digest = hashlib.sha256(" ".join(str(t) for piece in pieces for t in piece).encode())
    return Work(pieces, prompts, output, wanted - left, digest.hexdigest())


def choose_prompts(pieces: list[Piece], count: int) -> list[Piece]:
    """Beginnings of pieces, `count` different ones: a share of 1/2 of each, or where there are
    fewer pieces than that, 1/3 and 2/3, and so on. Raises UsageError where the text is too short.
    """
    most = max((len(piece) for piece in pieces), default=0)
    long = [piece for piece in pieces if 2 * len(piece) >= most]  # not what is left at an end
    rounds = -(-count // max(1, len(long)))
    if not long or min(len(piece) for piece in long) <= rounds:
        raise _too_short(f"pieces of at most {most} tokens do not make {count} prompts")
    return [
        piece[: len(piece) * (turn + 1) // (rounds + 1)] for turn in range(rounds) for piece in long
    ][:count]


def _too_short(what: str) -> UsageError:
    fix = "give a longer --text, or lower --tokens or --prompts"
    return UsageError("text_too_short", what, fix=fix, field="--text")
