"""Tool calls as DeepSeek V4 writes them: DSML, tags with a token of their own.

    <|DSML|tool_calls>
    <|DSML|invoke name="get_weather">
    <|DSML|parameter name="city" string="true">Paris</|DSML|parameter>
    </|DSML|invoke>
    </|DSML|tool_calls>

(with U+FF5C for the bars). Parameters become one JSON object, streamed as they come: text as a
JSON string, everything else as the model wrote it. A call begins with its `invoke` tag. What is no
markup where markup must be ends the call, and is content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from quire.dialects.events import CallArguments, CallEnd, CallStart, Content, Event
from quire.dialects.markers import held_back, split_off

BAR = "\uff5c"
TOKEN = f"{BAR}DSML{BAR}"
OPEN, CLOSE = f"<{TOKEN}tool_calls>", f"</{TOKEN}tool_calls>"
END_INVOKE, END_PARAMETER = f"</{TOKEN}invoke>", f"</{TOKEN}parameter>"
MAX_TAG = 1024  # characters of a tag, with the white space before it

_INVOKE = re.compile(rf'<{TOKEN}invoke\s+name="([^"<>]{{1,256}})"\s*>')
_PARAMETER = re.compile(
    rf'<{TOKEN}parameter\s+name="([^"<>]{{1,256}})"\s+string="(true|false)"\s*>'
)
_END_VALUE = re.compile(f"{END_PARAMETER}|{END_INVOKE}")


State = Callable[[list[Event]], bool]


class DsmlParser:
    """State machine; see Parser. Tags are held until they are complete."""

    def __init__(self) -> None:
        self._buffer = ""
        self._state: State = self._content
        self._calls = 0
        self._marker = ""  # the opening marker that is being looked at, as it was written
        self._first = False  # no call yet in this block
        self._parameters = 0
        self._text = False  # the value is text, not JSON
        self._empty = False  # nothing of the value came yet

    def feed(self, text: str) -> list[Event]:
        """See Parser."""
        self._buffer += text
        events: list[Event] = []
        while self._buffer and self._state(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """See Parser. Markup of a call that was cut is dropped, with white space around it."""
        events: list[Event] = []
        text, self._buffer = self._buffer, ""
        if self._state == self._value:
            self._add_value(text, events)
        elif self._state == self._block and self._first:
            events.append(Content(self._marker + text))
        elif self._state == self._block:
            if not CLOSE.startswith(text.strip()):
                events.append(Content(text))
        elif self._state == self._content and text:
            events.append(Content(text))
        return events

    # States: each takes what is settled out of the buffer, and says whether to go on.

    def _content(self, events: list[Event]) -> bool:
        before, found, after = self._buffer.partition(OPEN)
        if found:  # two line ends before it belong to the markup
            text = before.removesuffix("\n").removesuffix("\n")
            self._marker = before[len(text) :] + OPEN
            before, self._buffer = text, after
            self._state, self._first = self._block, True
        else:
            count = held_back(before, "\n\n" + OPEN, "\n" + OPEN, OPEN)
            before, self._buffer = split_off(before, count)
        if before:
            events.append(Content(before))
        return bool(found)

    def _block(self, events: list[Event]) -> bool:
        """Between calls."""
        tag = self._tag()
        if tag is None:
            return False
        invoke = _INVOKE.fullmatch(tag)
        if invoke is not None:
            self._take_tag()
            events += [CallStart(self._calls, invoke[1]), CallArguments(self._calls, "{")]
            self._calls += 1
            self._state, self._first, self._parameters = self._invoke, False, 0
        elif tag == CLOSE and not self._first:
            self._take_tag()
            self._state = self._content
        else:
            if self._first:
                events.append(Content(self._marker))
            self._state = self._content
        return True

    def _invoke(self, events: list[Event]) -> bool:
        """Between parameters."""
        tag = self._tag()
        if tag is None:
            return False
        parameter = _PARAMETER.fullmatch(tag)
        if parameter is not None:
            self._take_tag()
            self._begin_value(parameter[1], parameter[2] == "true", events)
        elif tag in (END_INVOKE, CLOSE):
            self._take_tag()
            self._end_call(events, self._block if tag == END_INVOKE else self._content)
        else:
            self._end_call(events, self._content)
        return True

    def _value(self, events: list[Event]) -> bool:
        found = _END_VALUE.search(self._buffer)
        if found is None:
            count = held_back(self._buffer, END_PARAMETER, END_INVOKE)
            value, self._buffer = split_off(self._buffer, count)
            self._add_value(value, events)
            return False
        self._add_value(self._buffer[: found.start()], events)
        self._buffer = self._buffer[found.end() :]
        if self._text or self._empty:
            events.append(CallArguments(self._calls - 1, '"' if self._text else "null"))
        if found[0] == END_PARAMETER:
            self._state = self._invoke
        else:  # the parameter's own end is missing
            self._end_call(events, self._block)
        return True

    def _begin_value(self, name: str, text: bool, events: list[Event]) -> None:
        separator = ", " if self._parameters else ""
        start = f"{separator}{json.dumps(name, ensure_ascii=False)}: " + ('"' if text else "")
        events.append(CallArguments(self._calls - 1, start))
        self._parameters += 1
        self._state, self._text, self._empty = self._value, text, True

    def _add_value(self, value: str, events: list[Event]) -> None:
        if value:
            self._empty = False
            written = json.dumps(value, ensure_ascii=False)[1:-1] if self._text else value
            events.append(CallArguments(self._calls - 1, written))

    def _end_call(self, events: list[Event], state: State) -> None:
        events += [CallArguments(self._calls - 1, "}"), CallEnd(self._calls - 1)]
        self._state = state

    def _tag(self) -> str | None:
        """The tag behind white space; None while it is incomplete, "" where there is none."""
        rest = self._buffer.lstrip()
        space = len(self._buffer) - len(rest)
        end = rest.find(">") + 1
        if not _is_markup(rest):
            return ""
        if end:
            return rest[:end] if space + end <= MAX_TAG else ""
        return None if len(self._buffer) < MAX_TAG else ""

    def _take_tag(self) -> None:
        """Take the tag, which is complete, out of the buffer."""
        self._buffer = self._buffer[self._buffer.find(">") + 1 :]


def _is_markup(text: str) -> bool:
    """Whether `text` begins as a tag does, as far as it goes."""
    return any(
        text.startswith(start) or start.startswith(text) for start in (f"<{TOKEN}", f"</{TOKEN}")
    )
