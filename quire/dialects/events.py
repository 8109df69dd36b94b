"""What a parser finds in a model's answer, piece by piece, and what every parser does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's thoughts."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """Tool call `index` (from 0) begins: its function's name is known."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call's arguments are complete. A call without this was cut."""

    index: int


Event = Reasoning | Content | CallStart | CallArguments | CallEnd


class Parser(Protocol):
    """An incremental state machine over one choice's text.

    The events of all `feed`s and of `finish`, with neighbouring pieces joined, do not depend on
    how the text was split. Time is linear in the text; what is held back is bounded.
    """

    def feed(self, text: str) -> list[Event]:
        """What `text`, the next piece, settles."""
        ...

    def finish(self) -> list[Event]:
        """What was held back. To be called once, at the end of the text."""
        ...


class Plain:
    """Nothing is parsed: all text is content."""

    def feed(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []
