"""Regular expressions of quantisation configs, matched in time linear in the name.

A config comes with the model, and Python's `re` can take forever on a few characters. Here an
expression becomes an automaton (Glushkov 1961): a position for each character of the expression,
and for each position those that may follow it; a state is the set of positions that the name's
characters so far may have reached, an int with a bit for each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quire.quant.errors import bad_quantization

MAX_PATTERN, MAX_DEPTH = 400, 8
MAX_KNOWN = 4096  # steps that are remembered
_TOKEN = re.compile(
    r"(?P<set>\[\^?(?:\\[dwsDWS]|\\[^a-zA-Z0-9]|[^\\\[\]])+\])"
    r"|(?P<escape>\\[dwsDWS]|\\[^a-zA-Z0-9])"
    r"|(?P<open>\((?:\?:)?(?!\?))"
    r"|(?P<operator>[)|*+?^$])"
    r"|(?P<plain>[^\\\[\](){}])",
    re.DOTALL,
)
_START, _FOUND = -1, -2


@dataclass(frozen=True)
class _Part:
    """A piece of an expression: the positions that it may begin and end with, as bits, and whether
    it may be empty."""

    first: int = 0
    last: int = 0
    empty: bool = True


class Expression:
    """Characters, escapes, sets, `.`, `*`, `+`, `?`, groups, `|`, `^` at the beginning and `$`; no
    counts, look-ahead or references. Raises ModelError for others, and for long ones."""

    def __init__(self, text: str):
        self.text = text
        if len(text) > MAX_PATTERN:
            raise self._bad(f"is longer than {MAX_PATTERN} characters")
        self._tokens = self._split()
        # Each `$` takes one end of the name, of which there are enough.
        self._ends = [""] * sum(token == "$" for _, token in self._tokens)
        self._next = 0
        self._positions: list[re.Pattern[str]] = []
        self._follow: list[int] = []
        self._whole = self._alternatives(0)
        if self._next < len(self._tokens):
            raise self._bad("has a ) without a (")
        self._steps: dict[tuple[int, str], int] = {}
        self._quick = self._as_python()

    def matches(self, name: str) -> bool:
        """Whether the beginning of a name is what the expression means, as `re.match` tells."""
        if self._quick is not None:
            return self._quick.match(name) is not None
        state = _FOUND if self._whole.empty else _START
        for character in (*name, *self._ends):
            if state in (_FOUND, 0):
                break
            key = (state, character)
            following = self._steps.get(key)
            if following is None:
                if len(self._steps) >= MAX_KNOWN:
                    self._steps.clear()
                following = self._steps[key] = self._step(state, character)
            state = following
        return state == _FOUND

    def _as_python(self) -> re.Pattern[str] | None:
        """The same for `re`, which is faster, where it cannot take long either: with no choices and
        one repetition at most, but for a last `.*`, which changes nothing."""
        tokens = [token for _, token in self._tokens]
        if tokens[-2:] == [".", "*"]:
            del tokens[-2:]
        choices = [k == "open" or t in ("*", "+", "?", "|") for k, t in self._tokens]
        quick = sum(choices[: len(tokens)]) <= 1 and not {"(", "(?:", "|"}.intersection(tokens)
        return re.compile("".join(tokens)) if quick else None

    def _step(self, state: int, character: str) -> int:
        reached = 0
        for place in _bits(self._whole.first if state == _START else self._after(state)):
            if self._positions[place].fullmatch(character):
                reached |= 1 << place
        return _FOUND if reached & self._whole.last else reached

    def _after(self, state: int) -> int:
        after = 0
        for place in _bits(state):
            after |= self._follow[place]
        return after

    def _split(self) -> list[tuple[str, str]]:
        tokens, start = [], 0
        while start < len(self.text):
            token = _TOKEN.match(self.text, start)
            if token is None:
                raise self._bad(f"has {self.text[start : start + 8]!r}, which is not known here")
            tokens.append((token.lastgroup or "", token.group()))
            start = token.end()
        return tokens

    def _peek(self) -> str:
        return self._tokens[self._next][1] if self._next < len(self._tokens) else ""

    def _alternatives(self, depth: int) -> _Part:
        if depth > MAX_DEPTH:
            raise self._bad(f"has more than {MAX_DEPTH} groups in each other")
        part = self._sequence(depth)
        while self._peek() == "|":
            self._next += 1
            other = self._sequence(depth)
            part = _Part(
                part.first | other.first, part.last | other.last, part.empty or other.empty
            )
        return part

    def _sequence(self, depth: int) -> _Part:
        part = _Part()
        while self._peek() not in ("", "|", ")"):
            following = self._repeated(depth)
            self._join(part.last, following.first)
            part = _Part(
                part.first | (following.first if part.empty else 0),
                following.last | (part.last if following.empty else 0),
                part.empty and following.empty,
            )
        return part

    def _repeated(self, depth: int) -> _Part:
        part = self._atom(depth)
        sign = self._peek()
        if sign not in ("*", "+", "?"):
            return part
        self._next += 1
        if sign != "?":
            self._join(part.last, part.first)
        if self._peek() == "?":
            self._next += 1  # as few as possible: it matches the same names
        if self._peek() in ("*", "+", "?"):
            raise self._bad("repeats a repetition")
        return _Part(part.first, part.last, part.empty or sign != "+")

    def _atom(self, depth: int) -> _Part:
        kind, text = self._tokens[self._next]
        self._next += 1
        if kind == "open":
            part = self._alternatives(depth + 1)
            if self._peek() != ")":
                raise self._bad("has a ( without a )")
            self._next += 1
            return part
        if text == "^" and self._next == 1:
            return _Part()
        if kind == "operator" and text != "$":
            raise self._bad(f"has {text!r} where there is nothing for it")
        if kind == "set" and re.search(r"--|&&|~~|\|\|", text):
            raise self._bad(f"has {text!r}, which is not known here")
        try:
            # Of one character: nothing in it repeats.
            position = re.compile("" if text == "$" else text)
        except re.error as error:
            raise self._bad(f"is bad: {error}") from None
        self._positions.append(position)
        self._follow.append(0)
        bit = 1 << (len(self._positions) - 1)
        return _Part(bit, bit, False)

    def _join(self, last: int, first: int) -> None:
        for place in _bits(last):
            self._follow[place] |= first

    def _bad(self, why: str) -> Exception:
        return bad_quantization(f"the pattern {self.text[:80]!r} {why}")


def _bits(state: int) -> list[int]:
    """The places of the bits that are set."""
    places = []
    while state:
        lowest = state & -state
        places.append(lowest.bit_length() - 1)
        state ^= lowest
    return places
