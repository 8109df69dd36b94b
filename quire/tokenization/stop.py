"""Stop strings over streamed text.

The strings are compiled into one automaton (Aho and Corasick, "Efficient string matching", 1975),
so the work is constant per character and a match does not depend on how the text was cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from quire.errors import UsageError

_CODE_POINT_BITS = 21


class StopStrings:
    """Stop strings, compiled. Immutable: one serves any number of checkers.

    A state is a prefix of some stop string, and a number: 0 is the empty prefix. `depth`: a
    prefix's length; `match`: the longest stop string it ends with. UsageError for an empty stop
    string.
    """

    __slots__ = ("_following", "_shorter", "depth", "match")

    def __init__(self, strings: Sequence[str]):
        if "" in strings:
            raise UsageError(code="stop_invalid", what="a stop string is empty", field="stop")
        # (state, character) in one number -> the state after it; the numbers take a third of the
        # memory of pairs.
        self._following: dict[int, int] = {}
        self.depth: list[int] = [0]
        self.match: list[str | None] = [None]
        # The longest other state that each state ends with.
        self._shorter: list[int] = [0]
        before = [(0, "")]  # how each state is reached: from which, by which character
        for string in strings:
            state = 0
            for character in string:
                key = state << _CODE_POINT_BITS | ord(character)
                if key not in self._following:
                    self._following[key] = len(before)
                    before.append((state, character))
                    self.depth.append(self.depth[state] + 1)
                    self.match.append(None)
                    self._shorter.append(0)
                state = self._following[key]
            self.match[state] = string
        # Shorter states are complete before longer ones ask for them.
        for state in sorted(range(1, len(before)), key=self.depth.__getitem__):
            parent, character = before[state]
            if parent:
                self._shorter[state] = self.advance(self._shorter[parent], character)
                self.match[state] = self.match[state] or self.match[self._shorter[state]]

    def advance(self, state: int, character: str) -> int:
        """The longest known prefix that the text ends with after one more character."""
        point = ord(character)
        while True:
            longer = self._following.get(state << _CODE_POINT_BITS | point)
            if longer is not None or state == 0:
                return longer or 0
            state = self._shorter[state]


class StopChecker:
    """Finds the first stop string that completes in a text that arrives in pieces.

    Of strings that complete at the same character the longest counts. The text ends before the
    match, or after it with `include`. Matches that end inside the text of the first `min_tokens`
    tokens do not count, as in vLLM.

    `matched` is the stop string found, None so far; after a match no more text comes out.
    """

    def __init__(self, stop: StopStrings, include: bool = False, min_tokens: int = 0):
        self.matched: str | None = None
        self._stop_strings = stop
        self._include = include
        self._min_tokens = min_tokens
        self._tokens = 0
        self._held = ""
        self._state = 0

    def push(self, text: str, tokens: int = 1) -> str:
        """The text of `tokens` more tokens in, the text that can be shown out.

        Text that may still turn out to be part of a stop string is held back (unless `include`:
        then it will be shown in any case). ValueError if these tokens cross `min_tokens`: up to
        there push them one by one, so that it is known which text is whose.
        """
        before = self._tokens
        self._tokens += tokens
        if before < self._min_tokens < self._tokens:
            raise ValueError(f"{tokens} tokens at once cross min_tokens={self._min_tokens}")
        if self.matched is not None:
            return ""
        exempt = self._tokens <= self._min_tokens
        for place, character in enumerate(text):
            self._state = self._stop_strings.advance(self._state, character)
            found = self._stop_strings.match[self._state]
            if found is not None and not exempt:
                return self._stop(self._held + text[: place + 1], found)
        depth = self._stop_strings.depth[self._state]
        return self._show(self._held + text, 0 if self._include else depth)

    def finish(self) -> str:
        """What was held back, when the text ends for another reason."""
        return self._show(self._held, 0)

    def _stop(self, text: str, found: str) -> str:
        self.matched = found
        self._held = ""
        return text if self._include else text[: len(text) - len(found)]

    def _show(self, text: str, hold: int) -> str:
        cut = len(text) - hold
        self._held = text[cut:]
        return text[:cut]
