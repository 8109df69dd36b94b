"""How long the device worked on steps, and how long it waited for the next."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class DeviceClock:
    """Events before and after each step on the stream. Only benchmarks pay for them: with
    `host_seconds` of the engine's thread so far."""

    def __init__(self) -> None:
        self.host_seconds = 0.0
        self._steps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        """A step's first work is about to be launched."""
        started = time.perf_counter()
        step = self._spare.pop() if self._spare else (_event(), _event())
        self._steps.append(step)
        step[0].record()
        self.host_seconds += time.perf_counter() - started

    def end(self) -> None:
        """A step's last work has been launched."""
        started = time.perf_counter()
        self._steps[-1][1].record()
        self.host_seconds += time.perf_counter() - started

    def read(self) -> tuple[float, float]:
        """(busy, idle) seconds of all steps since the last reading, once they are done."""
        torch.cuda.synchronize()
        steps, self._steps = self._steps, []
        busy = sum(begin.elapsed_time(end) for begin, end in steps)
        idle = sum(last.elapsed_time(begin) for (_, last), (begin, _) in pairwise(steps))
        self._spare += steps
        return busy / 1e3, idle / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
