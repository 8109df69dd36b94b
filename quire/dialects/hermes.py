"""Tool calls as Hermes and Qwen write them.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

A call is one as soon as its name and the beginning of its arguments are there: from then on the
arguments stream as the model writes them, and are not corrected. What goes wrong before that is
content.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from quire.dialects.events import CallArguments, CallEnd, CallStart, Content, Event
from quire.dialects.markers import held_back, split_off

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_NAME = 256
MAX_HELD = 32768  # characters of a call whose arguments cannot stream: those before the name
MAX_TAIL = 64  # characters from the end of the arguments to that of the call
MAX_SPACE = 16  # characters of white space between calls

_VIABLE = re.compile(r'\s*(\{\s*(".*)?)?', re.DOTALL)
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*', re.DOTALL)
_TAIL = re.compile(rf"\s*(?:\}}\s*)?{CLOSE}")
_OUTSIDE_STRINGS = re.compile(rf'[{{}}\[\]"]|{CLOSE}')
# A line end is no part of a JSON string: behind one the marker ends a call whose string is open.
_INSIDE_STRINGS = re.compile(rf'["\\]|\n{CLOSE}')


State = Callable[[list[Event]], bool]


class HermesParser:
    """State machine; see Parser. Everything but arguments is held until it is settled."""

    def __init__(self) -> None:
        self._buffer = ""
        self._state: State = self._content
        self._calls = 0
        self._marker = ""  # the opening marker that is being looked at, as it was written
        self._whole = False  # the arguments cannot stream: the call waits for its end
        self._depth, self._string, self._escaped = 0, False, False

    def feed(self, text: str) -> list[Event]:
        """See Parser."""
        self._buffer += text
        events: list[Event] = []
        while self._buffer and self._state(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """See Parser. White space and closing markup behind a complete call are dropped."""
        events: list[Event] = []
        text, self._buffer = self._buffer, ""
        if self._state == self._arguments:
            if text:
                events.append(CallArguments(self._calls - 1, text))
        elif self._state == self._head:
            if not self._take_whole(text, events):
                events.append(Content(self._marker + text))
        else:
            dropped = self._state == self._tail or (
                self._state == self._between and not text.strip()
            )
            if text and not dropped:
                events.append(Content(text))
        return events

    # States: each takes what is settled out of the buffer, and says whether to go on.

    def _content(self, events: list[Event]) -> bool:
        before, found, after = self._buffer.partition(OPEN)
        if found:
            line_end = "\n" if before.endswith("\n") else ""
            before, self._buffer = before.removesuffix("\n"), after
            self._enter_head(line_end)
        else:
            before, self._buffer = split_off(before, held_back(before, "\n" + OPEN, OPEN))
        if before:
            events.append(Content(before))
        return bool(found)

    def _enter_head(self, space: str) -> None:
        self._state, self._whole, self._marker = self._head, False, space + OPEN

    def _head(self, events: list[Event]) -> bool:
        """Behind the opening marker, before it is known whether this is a call."""
        text = self._buffer
        if not _VIABLE.fullmatch(text):
            return self._refuse(events)
        end, again = text.find(CLOSE), text.find(OPEN)
        limit = min(at for at in (end, again, MAX_HELD) if at >= 0)
        brace = text.find("{", text.find("{") + 1)
        if not self._whole and 0 < brace < limit:
            if self._start_call(text[:brace], events):
                self._buffer = text[brace:]
                return True
            self._whole = True
        if end == limit:
            if not self._take_whole(text[:end], events):
                return self._refuse(events)
            self._buffer = text[end + len(CLOSE) :]
            self._state = self._between
            return True
        if again == limit or len(text) > MAX_HELD + len(CLOSE):
            return self._refuse(events)
        return False

    def _refuse(self, events: list[Event]) -> bool:
        """The marker was no call: it is content, and what follows is looked at again."""
        events.append(Content(self._marker))
        self._state = self._content
        return True

    def _start_call(self, head: str, events: list[Event]) -> bool:
        """Whether `head`, up to the arguments' brace, begins a call; then its start is told."""
        match = _HEAD.fullmatch(head)
        if match is None:
            return False
        try:
            name = msgspec.json.decode(match[1].encode(), type=str)
        except (msgspec.MsgspecError, UnicodeError):
            return False
        if not _is_name(name):
            return False
        events.append(CallStart(self._calls, name))
        self._calls += 1
        self._state = self._arguments
        self._depth, self._string, self._escaped = 0, False, False
        return True

    def _take_whole(self, text: str, events: list[Event]) -> bool:
        """Whether `text` is a complete call; then it is told."""
        call = _decode_call(text)
        if call is None:
            return False
        name, arguments = call
        events += [
            CallStart(self._calls, name),
            CallArguments(self._calls, arguments),
            CallEnd(self._calls),
        ]
        self._calls += 1
        return True

    def _arguments(self, events: list[Event]) -> bool:
        """Braces are counted, strings are passed over, and everything streams."""
        text, at, call = self._buffer, 0, self._calls - 1
        while at < len(text):
            if self._escaped:
                self._escaped, at = False, at + 1
                continue
            found = (_INSIDE_STRINGS if self._string else _OUTSIDE_STRINGS).search(text, at)
            if found is None:
                break
            at = found.end()
            if found[0].endswith(CLOSE):
                return self._end_call(text[: found.start()], text[at:], self._between, events)
            self._count(found[0])
            if self._depth == 0:
                return self._end_call(text[:at], text[at:], self._tail, events)
        else:
            self._buffer = ""
            events.append(CallArguments(call, text))
            return False
        marker = "\n" + CLOSE if self._string else CLOSE
        sent, self._buffer = split_off(text, held_back(text[at:], marker))
        if sent:
            events.append(CallArguments(call, sent))
        return False

    def _count(self, character: str) -> None:
        if character == '"':
            self._string = not self._string
        elif character == "\\":
            self._escaped = True
        else:
            self._depth += 1 if character in "{[" else -1

    def _end_call(self, arguments: str, rest: str, state: State, events: list[Event]) -> bool:
        if arguments:
            events.append(CallArguments(self._calls - 1, arguments))
        events.append(CallEnd(self._calls - 1))
        self._buffer, self._state = rest, state
        return True

    def _tail(self, events: list[Event]) -> bool:
        """Behind the arguments: the object's brace and the closing marker."""
        found = _TAIL.match(self._buffer[:MAX_TAIL])
        if found is not None:
            self._buffer, self._state = self._buffer[found.end() :], self._between
            return True
        rest = self._buffer.lstrip().removeprefix("}").lstrip()
        if len(self._buffer) < MAX_TAIL and CLOSE.startswith(rest):
            return False
        self._state = self._content
        return True

    def _between(self, events: list[Event]) -> bool:
        """Behind a call: white space is dropped if another call or the end follows."""
        rest = self._buffer.lstrip()
        if len(self._buffer) - len(rest) <= MAX_SPACE:
            if rest.startswith(OPEN):
                self._enter_head(self._buffer[: len(self._buffer) - len(rest)])
                self._buffer = rest[len(OPEN) :]
                return True
            if OPEN.startswith(rest):
                return False
        self._state = self._content
        return True


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


def _decode_call(text: str) -> tuple[str, str] | None:
    """Name and arguments (JSON text of an object, as written) of a complete call."""
    try:
        call = msgspec.json.decode(text.encode(), type=_Call)
        arguments = bytes(call.arguments)
        if arguments.startswith(b'"'):  # JSON in a string
            arguments = msgspec.json.decode(arguments, type=str).encode()
        if arguments == b"null":
            arguments = b"{}"
        msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return (call.name, arguments.decode()) if _is_name(call.name) else None


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME
