"""What a parser's events come to, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from quire.dialects.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from quire.dialects.parser import OutputParser


@dataclass
class Read:
    reasoning: str = ""
    content: str = ""
    calls: list[list[str]] = field(default_factory=list)  # name, arguments
    complete: list[int] = field(default_factory=list)
    # Kinds in order, neighbours joined: content between two calls stays between them.
    order: list[str] = field(default_factory=list)


def read(events: Iterable[Event]) -> Read:
    """Events added up; an event out of place fails."""
    found = Read()
    for event in events:
        match event:
            case Reasoning(text):
                assert text and not found.content and not found.calls
                found.reasoning += text
            case Content(text):
                assert text
                found.content += text
            case CallStart(index, name):
                assert index == len(found.calls)
                found.calls.append([name, ""])
            case CallArguments(index, text):
                assert text and index == len(found.calls) - 1 and index not in found.complete
                found.calls[-1][1] += text
            case CallEnd(index):
                assert index == len(found.calls) - 1 and index not in found.complete
                found.complete.append(index)
        kind = type(event).__name__
        if found.order[-1:] != [kind]:
            found.order.append(kind)
    return found


def parse(
    text: str | Sequence[str], tools: str = "none", reasoning: str = "none", prompt: str = ""
) -> Read:
    """A text, whole or in pieces, through a fresh parser."""
    parser = OutputParser(tools, reasoning, prompt)
    events: list[Event] = []
    for piece in [text] if isinstance(text, str) else text:
        events += parser.feed(piece)
    return read(events + parser.finish())
