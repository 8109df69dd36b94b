"""A choice's text as OpenAI's message or delta: content, reasoning and tool calls."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from quire.dialects.dialect import Dialect
from quire.dialects.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from quire.server.chat_prompt import Rendered


@dataclass
class Piece:
    """What is new in a choice. `calls`: OpenAI's tool call objects, in order."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def delta(self) -> dict[str, Any]:
        """As the `delta` of a stream's frame."""
        found: dict[str, Any] = {}
        if self.content:
            found["content"] = self.content
        if self.reasoning:
            found["reasoning"] = self.reasoning
        if self.calls:
            found["tool_calls"] = self.calls
        return found

    def message(self) -> dict[str, Any]:
        """As a whole `message`."""
        silent = not self.content and (self.calls or self.reasoning)
        found: dict[str, Any] = {
            "role": "assistant",
            "content": None if silent else self.content,
            "refusal": None,
        }
        if self.reasoning:
            found["reasoning"] = self.reasoning
        if self.calls:
            found["tool_calls"] = [
                {name: value for name, value in call.items() if name != "index"}
                for call in self.calls
            ]
        return found


@dataclass(frozen=True)
class Reading:
    """How the answers of one request are read. `parallel` false keeps only a choice's first tool
    call and what is before it."""

    dialect: Dialect
    prompt: Rendered
    tools: bool
    parallel: bool = True

    def choice(self) -> ChoiceReader:
        """A reader for one choice."""
        return ChoiceReader(self)


class ChoiceReader:
    """Reads one choice as its text comes."""

    def __init__(self, reading: Reading):
        prompt = reading.prompt
        self._parser = reading.dialect.parser(prompt.text, reading.tools, prompt.resumed)
        self._parallel = reading.parallel
        self._calls, self._ended = 0, 0

    def read(self, text: str, end: bool) -> Piece:
        """What `text`, the next of the choice, brings; `end`: there is no more."""
        events = self._parser.feed(text)
        if end:
            events += self._parser.finish()
        piece = Piece()
        for event in events:
            if self._parallel or not self._ended:
                self._take(event, piece)
        return piece

    def finish_reason(self, reason: str | None) -> str | None:
        """ "tool_calls" for a choice that ended by itself, with its calls complete."""
        done = reason == "stop" and 0 < self._calls == self._ended
        return "tool_calls" if done else reason

    def _take(self, event: Event, piece: Piece) -> None:
        match event:
            case Content(text):
                piece.content += text
            case Reasoning(text):
                piece.reasoning += text
            case CallStart(index, name):
                self._calls += 1
                call = {
                    "index": index,
                    "id": "call_" + secrets.token_hex(12),
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }
                piece.calls.append(call)
            case CallArguments(index, text):
                if not piece.calls or piece.calls[-1]["index"] != index:
                    piece.calls.append({"index": index, "function": {"arguments": ""}})
                piece.calls[-1]["function"]["arguments"] += text
            case CallEnd():
                self._ended += 1
