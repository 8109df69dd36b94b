"""The contract of tiers below DRAM: blocking stores of pages by identity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Missing(Exception):
    """The page is not there (any more)."""


class Damaged(Exception):
    """What is there is not the page, and can never become it. `kind` names the reason in a word."""

    def __init__(self, kind: str, what: str):
        super().__init__(what)
        self.kind = kind


# Takes the identity of a page that was deleted for room, and the page; None: it could not be read.
Evicted = Callable[[bytes, memoryview | None], None]


class ColdTier(Protocol):
    """All methods may block and run on a tier's worker threads, several at a time; `used` and
    `evictions` return at once. What they raise besides Missing and Damaged (OSError first of all)
    is a fault of the tier: it never means that a page is bad, and nothing is deleted for it.
    """

    name: str
    capacity: int  # bytes; 0: not known here
    # Whether it can hand on what it deletes for room: `evicted` is called with each such page.
    hands_on: bool
    evicted: Evicted | None

    def start(self) -> None:
        """Get ready: index what is there, sweep what an earlier process has left."""

    def present(self, identities: Sequence[bytes]) -> set[bytes]:
        """Which of these pages are probably there."""

    def load(self, identity: bytes, into: memoryview) -> None:
        """Read a page, as long as `into`, and check it. Raises Missing, or Damaged (the page is
        gone then). After an exception `into` holds anything."""

    def store(self, identity: bytes, page: memoryview) -> bool:
        """Keep a page; False where it is there already."""

    def forget(self, identity: bytes) -> None:
        """Delete a page, if it is there."""

    def clear(self) -> int:
        """Delete every page of this engine's model and layout; returns how many."""

    def close(self) -> None:
        """Give back what was opened."""

    @property
    def used(self) -> int:
        """Bytes kept, as far as is known here."""

    @property
    def count(self) -> int:
        """Pages kept, of all models, as far as is known here."""

    @property
    def evictions(self) -> int:
        """Pages deleted for room."""
