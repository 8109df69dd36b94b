"""What a person sees while waiting: phases of start-up, sizes, and safe text."""

from __future__ import annotations

import re
import sys
import time
from typing import TextIO

from quire.settings import settings

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def dim(text: str, stream: TextIO) -> str:
    """Grey on a terminal, as it is elsewhere or with NO_COLOR."""
    if settings().no_color or not stream.isatty():
        return text
    return f"\x1b[2m{text}\x1b[0m"


def printable(text: str, stream: TextIO) -> str:
    """`text` as it is safe to show: a model's control characters do not reach a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if stream.isatty() else text


class Phases:
    """Shows start-up: one live line on a terminal, else a short line per phase; or nothing.

    Call it with a phase's name and the fraction done; `finish` ends the last phase.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._live = self._stream.isatty()
        self._started = time.monotonic()
        self._phase = ""
        self._since = self._started
        self._shown = 0.0
        self.seconds: dict[str, float] = {}

    def __call__(self, phase: str, fraction: float = 0.0) -> None:
        now = time.monotonic()
        begins = phase != self._phase
        if begins:
            self._end_phase(now)
            self._phase, self._since = phase, now
        if self._quiet:
            return
        if not self._live:
            if begins:
                print(f"{phase} ...", file=self._stream, flush=True)
        elif begins or now - self._shown > 0.05:
            self._shown = now
            share = f" {fraction:4.0%}" if 0 < fraction < 1 else ""
            self._stream.write(f"\r\x1b[2K{phase}{share}")
            self._stream.flush()

    def finish(self) -> float:
        """End the last phase and clear the live line; returns the seconds of all phases."""
        now = time.monotonic()
        self._end_phase(now)
        self._phase = ""
        if self._live and not self._quiet:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
        return now - self._started

    def summary(self) -> str:
        """The phases that took long, with their times."""
        shown = [f"{name} {took:.1f} s" for name, took in self.seconds.items() if took >= 0.1]
        return ", ".join(shown)

    def _end_phase(self, now: float) -> None:
        if self._phase:
            took = now - self._since
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + took
