"""The contract of proposers that need tokens only, and which one a configuration means."""

from __future__ import annotations

from typing import Protocol

from quire.config.speculation import Speculation
from quire.speculative.ngram import NgramDrafter


class Drafter(Protocol):
    """Guesses how one request goes on. What it says costs time where it is wrong, and can change
    no token: the target samples every position itself."""

    def propose(self, tokens: list[int], count: int) -> list[int]:
        """At most `count` tokens that may follow `tokens` (prompt and output so far), in order.
        From call to call `tokens` only grows; it is not to be changed."""


class Proposer(Protocol):
    """Makes a Drafter for each request. The engine thread calls both."""

    def drafter(self) -> Drafter: ...


class NgramProposer:
    """Prompt lookup: what followed the last tokens when they came before."""

    def __init__(self, config: Speculation):
        self._least, self._most = config.prompt_lookup_min, config.prompt_lookup_max

    def drafter(self) -> NgramDrafter:
        return NgramDrafter(self._least, self._most)


class Returned:
    """What the runner's drafter has made behind the last row of a request."""

    def __init__(self) -> None:
        self._length, self._drafts = 0, list[int]()

    def take(self, length: int, drafts: list[int]) -> None:
        """Drafts of what follows `length` tokens."""
        self._length, self._drafts = length, drafts

    def propose(self, tokens: list[int], count: int) -> list[int]:
        """At most `count` of them; see Drafter."""
        return self._drafts[:count] if len(tokens) == self._length else []


class RunnerProposer:
    """Drafts come with the results of steps: from a model on the runner."""

    def drafter(self) -> Returned:
        return Returned()


def make_proposer(config: Speculation) -> Proposer:
    """What the scheduler asks for drafts."""
    return NgramProposer(config) if config.method == "ngram" else RunnerProposer()
