"""A model's thoughts, set off from its answer: <think> ... </think>."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quire.dialects.events import Event, Parser, Reasoning
from quire.dialects.markers import held_back, split_off

OPEN, CLOSE = "<think>", "</think>"
MAX_LEADING_SPACE = 8  # characters before <think> that are dropped with it

# Where an answer begins if the prompt does not say: with <think> or in the answer; in thoughts,
# with <think> or without; in the answer.
Beginning = Literal["tag", "thoughts", "answer"]


@dataclass(frozen=True)
class ReasoningFormat:
    """How a family writes its thoughts.

    `inner`: line ends that belong to the markup right behind <think> and right before </think>;
    `outer`: those right behind </think>.
    """

    beginning: Beginning
    inner: int = 0
    outer: int = 0


FORMATS = {
    # <think>\n ... \n</think>\n\n, as Qwen3's and DeepSeek R1's templates write past turns.
    "qwen3": ReasoningFormat("tag", inner=1, outer=2),
    "deepseek_r1": ReasoningFormat("thoughts", inner=1, outer=2),
    "deepseek_v4": ReasoningFormat("answer"),
}


class ReasoningParser:
    """Splits off thoughts; the rest goes through `rest`, the parser of the answer.

    `prompt`: the end of the prompt tells whether it has opened or closed the thoughts already.
    Thoughts that are never closed are thoughts to the end. Only the first ones count: tags in the
    answer are answer.
    """

    def __init__(self, form: ReasoningFormat, prompt: str, rest: Parser):
        self._form, self._rest = form, rest
        self._buffer = ""
        self._line_ends = 0  # that may still be dropped
        self._state = self._first_state(prompt)

    def _first_state(self, prompt: str) -> str:
        end = prompt[-64:]
        written = len(end) - len(end.rstrip("\n"))
        end = end.rstrip("\n")
        if end.endswith(OPEN):
            self._line_ends = max(0, self._form.inner - written)
            return "opened"
        if end.endswith(CLOSE) or self._form.beginning == "answer":
            return "answer"
        return "begin"

    def feed(self, text: str) -> list[Event]:
        """See Parser."""
        if self._state == "answer":
            return self._rest.feed(text)
        self._buffer += text
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """See Parser."""
        events: list[Event] = []
        text, self._buffer = self._buffer, ""
        thinking = self._state in ("opened", "thoughts")
        if self._state == "begin" and self._form.beginning == "thoughts":
            thinking = True
        if thinking and text:
            events.append(Reasoning(text))
        elif text:
            events += self._rest.feed(text)
        return events + self._rest.finish()

    def _step(self, events: list[Event]) -> bool:
        """Take what is settled out of the buffer; whether there may be more."""
        if not self._buffer:
            return False
        if self._state == "begin":
            return self._begin()
        if self._state in ("opened", "closed"):
            return self._drop_line_ends()
        if self._state == "thoughts":
            return self._thoughts(events)
        text, self._buffer = self._buffer, ""
        events += self._rest.feed(text)
        return False

    def _begin(self) -> bool:
        stripped = self._buffer.lstrip()
        if len(self._buffer) - len(stripped) <= MAX_LEADING_SPACE:
            if stripped.startswith(OPEN):
                self._buffer = stripped[len(OPEN) :]
                self._state, self._line_ends = "opened", self._form.inner
                return True
            if OPEN.startswith(stripped):
                return False
        self._state = "thoughts" if self._form.beginning == "thoughts" else "answer"
        return True

    def _drop_line_ends(self) -> bool:
        if self._line_ends and self._buffer[0] == "\n":
            self._line_ends -= 1
            self._buffer = self._buffer[1:]
        else:
            self._state = "thoughts" if self._state == "opened" else "answer"
        return True

    def _thoughts(self, events: list[Event]) -> bool:
        line_ends = "\n" * self._form.inner
        before, found, after = self._buffer.partition(CLOSE)
        if found:
            if before.endswith(line_ends):
                before = before[: len(before) - len(line_ends)]
            self._buffer = after
            self._state, self._line_ends = "closed", self._form.outer
        else:
            count = held_back(self._buffer, line_ends + CLOSE, CLOSE)
            before, self._buffer = split_off(self._buffer, count)
        if before:
            events.append(Reasoning(before))
        return bool(found)
