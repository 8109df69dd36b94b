"""Stop strings over streamed text.

The strings are compiled into one automaton (Aho and Corasick, "Efficient string matching", 1975),
so the work is constant per character and a match does not depend on how the text was cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.errors import UsageError


@dataclass
class _State:
    """A prefix of some stop string. `depth`: its length; `match`: the longest stop it ends with."""

    depth: int
    match: str | None = None
    following: dict[str, _State] = field(default_factory=dict)
    shorter: _State | None = None


class StopChecker:
    """Finds the first stop string that completes in a text that arrives in pieces.

    Of strings that complete at the same character the longest counts. The text ends before the
    match, or after it with `include`. Matches that end inside the text of the first `min_tokens`
    tokens do not count, as in vLLM. UsageError for an empty stop string.

    `matched` is the stop string found, None so far; after a match no more text comes out.
    """

    def __init__(self, stop: Sequence[str], include: bool = False, min_tokens: int = 0):
        if "" in stop:
            raise UsageError(code="stop_invalid", what="a stop string is empty", field="stop")
        self.matched: str | None = None
        self._include = include
        self._min_tokens = min_tokens
        self._tokens = 0
        self._held = ""
        self._state = self._root = _compile(stop)

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
            self._state = _advance(self._state, self._root, character)
            found = self._state.match
            if found is not None and not exempt:
                return self._stop(self._held + text[: place + 1], found)
        return self._show(self._held + text, 0 if self._include else self._state.depth)

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


def _advance(state: _State, root: _State, character: str) -> _State:
    """The longest known prefix that the text now ends with."""
    while character not in state.following:
        if state.shorter is None:
            return root
        state = state.shorter
    return state.following[character]


def _compile(stop: Sequence[str]) -> _State:
    root = _State(0)
    for string in stop:
        state = root
        for character in string:
            if character not in state.following:
                state.following[character] = _State(state.depth + 1)
            state = state.following[character]
        state.match = string
    # Breadth first, so that shorter states are complete before longer ones point to them.
    queue = deque(root.following.values())
    for state in queue:
        state.shorter = root
    while queue:
        state = queue.popleft()
        for character, longer in state.following.items():
            assert state.shorter is not None
            longer.shorter = _advance(state.shorter, root, character)
            longer.match = longer.match or longer.shorter.match
            queue.append(longer)
    return root
