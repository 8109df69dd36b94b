"""The parser of one choice's text: thoughts first, then tool calls in what is left."""

from __future__ import annotations

from quire.dialects.dsml import DsmlParser
from quire.dialects.events import Event, Parser, Plain
from quire.dialects.hermes import HermesParser
from quire.dialects.reasoning import FORMATS, ReasoningParser

TOOL_PARSERS: dict[str, type[Parser]] = {"hermes": HermesParser, "deepseek_v4": DsmlParser}
REASONING_PARSERS = tuple(FORMATS)
# Long texts go in such pieces: a parser copies what it has not settled of a piece, for every
# call in it.
PIECE = 4096


class OutputParser:
    """See Parser. `tools`, `reasoning`: a parser's name, or "none"; `prompt`: what is answered."""

    def __init__(self, tools: str, reasoning: str, prompt: str):
        parser: Parser = Plain() if tools == "none" else TOOL_PARSERS[tools]()
        if reasoning != "none":
            parser = ReasoningParser(FORMATS[reasoning], prompt, parser)
        self._parser = parser

    def feed(self, text: str) -> list[Event]:
        """See Parser."""
        if len(text) <= PIECE:
            return self._parser.feed(text)
        events: list[Event] = []
        for start in range(0, len(text), PIECE):
            events += self._parser.feed(text[start : start + PIECE])
        return events

    def finish(self) -> list[Event]:
        """See Parser."""
        return self._parser.finish()
